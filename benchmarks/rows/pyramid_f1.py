"""What the pyramid wins over its window alone in questions whose answers stand far away, in points of F1."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from benchmarks.errors import BenchmarkError, IncorrectError
from benchmarks.experiments.pyramid_f1.experiment import Experiment, Recipe
from benchmarks.experiments.pyramid_f1.training import Stage
from benchmarks.paths import work_dir
from benchmarks.result import Outcome
from benchmarks.rows import Settings

DATA = "BENCHMARKS_SQUAD_FILES"
"""Environment variable: files of questions, parted as the system's search paths are."""
FOLDER = "BENCHMARKS_PYRAMID_F1_DIR"
"""Environment variable: folder of the results, to go on with; by default one in dseek's cache."""

BAR = 0.023
"""Least gain of F1."""
LEAST_BEST = 0.9
"""Least F1 of the best spans that documents allow: if answers were misplaced, it would be far lower."""

SMOKE = Recipe(
    seeds=(0,),
    shared=Stage(length=320, batch=2, steps=2),
    own=(Stage(length=1024, batch=1, steps=1),),
    rates=(1e-3,),
    tune_questions=2,
    test_questions=4,
    max_paragraphs=200,
)


def pyramid_f1(settings: Settings) -> Outcome:
    """Train the twins and compare their F1.

    Args:
        settings: threads, smoke.

    Returns:
        The gain as a fraction of 1; its ratio to the bar, which is negative where the window is better.

    Raises:
        BenchmarkError: no data is given.
        IncorrectError: documents do not hold the answers where they say.
    """
    given = [Path(path).expanduser() for path in os.environ.get(DATA, "").split(os.pathsep) if path]
    if not given:
        raise BenchmarkError(
            f"pyramid-f1 needs questions, and {DATA} is not set: name files of JSON lines under gzip there, each line "
            f"with context and questions, separated by {os.pathsep!r}"
        )
    recipe = SMOKE if settings.smoke else Recipe()
    default = work_dir() / ("pyramid-f1-smoke" if settings.smoke else "pyramid-f1")
    torch.set_num_threads(settings.threads)
    folder = Path(os.environ.get(FOLDER) or default).expanduser()
    summary = Experiment(recipe=recipe, files=given, folder=folder, log=_log).run()
    if not summary["best_f1"] >= LEAST_BEST:
        raise IncorrectError(f"the best spans of the documents have an F1 of only {summary['best_f1']:.3f}")
    gain = summary["gain"]["mean"]
    return Outcome(value=gain, unit="fraction", ratio=gain / BAR, details=summary)


def _log(line: str) -> None:
    print(f"benchmarks: pyramid-f1: {line}", file=sys.stderr, flush=True)
