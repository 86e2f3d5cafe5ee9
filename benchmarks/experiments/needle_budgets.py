"""What finding every needle takes: the row `needle`'s prompts at several least shares.

Run: `python -m benchmarks.experiments.needle_budgets [--shares S ...] [--window N]`. All is as in the row, but for the
comparison with transformers, which the row makes.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys

from benchmarks.rows import Settings
from benchmarks.rows.attention_quality import DENSE, Budget, dynamic_wish
from benchmarks.rows.needle import DEPTHS, LENGTHS, NEEDLES, ask, make_trials


def main() -> int:
    """Parse the arguments, and print a line for every share as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.024, 0.012, 0.006], metavar="S")
    parser.add_argument("--window", type=int, default=Budget().window_tokens, help="tokens (default: %(default)s)")
    parser.add_argument("--top-blocks", type=int, default=Budget().top_blocks, help="at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    settings = Settings(threads=arguments.threads)
    base = Budget(window_tokens=arguments.window, top_blocks=arguments.top_blocks)
    trials = make_trials(LENGTHS, DEPTHS, NEEDLES)
    right: list[bool] = []
    for share in [None, *arguments.shares]:
        wish = DENSE if share is None else dynamic_wish(dataclasses.replace(base, min_share=share))
        name = "dense" if share is None else f"least share {share}"
        answers, _, skipped = ask(settings, name, wish, trials)
        found = [answer["token_ids"] == trial.answer for answer, trial in zip(answers, trials, strict=True)]
        if share is None:
            right = found
        both = sum(own and dense for own, dense in zip(found, right, strict=True))
        lost = [
            f"{trial.needle.name} {trial.length} at {trial.depth}"
            for trial, own, dense in zip(trials, found, right, strict=True)
            if dense and not own
        ]
        print(
            f"{name}: {both} of {sum(right)} ({both / sum(right):.1%}), {statistics.fmean(skipped or [0.0]):.1%} of "
            f"the pairs skipped; lost: {', '.join(lost) or 'none'}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
