"""What the pyramid is worth in answers found far away: `python -m benchmarks.experiments.pyramid_f1`.

Trains small readers from scratch on documents of 4,096 words in which the answer stands in one paragraph among many,
with the pyramid's attention, with its window alone, and densely, and prints the F1 of answers to held-out questions.
An interrupted run goes on where it stopped when it is given the same folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.errors import BenchmarkError
from benchmarks.experiments.pyramid_f1.experiment import TWINS, Experiment, Recipe
from benchmarks.experiments.pyramid_f1.training import PATTERNS


def main() -> int:
    """Run the experiment and print its tables.

    Returns:
        Exit status: 2 for a user's error.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.pyramid_f1", description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help="questions, JSON lines, gz")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results, to go on with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--twins", nargs="+", default=list(TWINS), choices=list(PATTERNS))
    parser.add_argument("--threads", type=int, default=2, help="threads (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    began = time.monotonic()

    def log(line: str) -> None:
        print(f"[{time.monotonic() - began:6.0f} s] {line}", file=sys.stderr, flush=True)

    recipe = Recipe(seeds=tuple(arguments.seeds), twins=tuple(arguments.twins))
    try:
        summary = Experiment(recipe=recipe, files=arguments.data, folder=arguments.out, log=log).run()
    except BenchmarkError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    print(report(summary, recipe))
    return 0


def report(summary: dict[str, Any], recipe: Recipe) -> str:
    """Write a summary for people.

    Args:
        summary: as `summarise` gives it.
        recipe: what was run.

    Returns:
        A table in Markdown, and the gain.
    """
    seeds = [str(seed) for seed in recipe.seeds]
    best = 100 * summary["best_f1"]
    lines = [
        f"{summary['questions']} questions, documents of {recipe.length} words; F1 in points, at most {best:.1f}",
        "",
        "| twin | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | spread | right paragraph | rate |",
        "|---" * (len(seeds) + 5) + "|",
    ]
    for name, twin in summary["twins"].items():
        each = " | ".join(f"{100 * twin['f1'][seed]:.2f}" for seed in seeds)
        spread = "" if twin["spread"] is None else f"{100 * twin['spread']:.2f}"
        lines.append(
            f"| {name} | {each} | {100 * twin['mean_f1']:.2f} | {spread} | {twin['right_paragraph']:.1%} "
            f"| {twin['rate']:g} |"
        )
    if "gain" in summary:
        gain = summary["gain"]
        error = "" if gain["standard_error"] is None else f" +- {100 * gain['standard_error']:.2f}"
        each = ", ".join(f"{100 * value:+.2f}" for value in gain["by_seed"])
        lines += ["", f"pyramid less window: {100 * gain['mean']:+.2f}{error} points (by seed {each})"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
