"""`StepClock`: learns what steps take, so that a prompt can be cut to pieces which running answers hardly notice.

A step that computes rows of a prompt keeps every running answer waiting for its next token. Two times decide how long:
that of a step of answers alone, and what one more row of a prompt adds to it. Both begin as the plan predicts them and
then follow what is measured, with what is now in the cache and whatever else the machine is doing. A prompt's piece is
as long as makes a step `MOST_STALL` times the usual one; where no answer waits, it is as long as the plan allows.

What it does not know: that rows late in a long prompt cost more than those before (it learns it with a delay of a few
steps), and what a single slow step was slow from, which is why no step counts as more than `MOST_SURPRISE` times what
was expected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dseek.plan.plan import Plan

MOST_STALL = 4.0
"""How many times a usual step a step with a prompt's piece may take."""

MOST_SURPRISE = 3.0
"""A measured time is taken for at most so many times the expected one."""

NEWEST_SHARE = 1 / 3
"""Weight of the newest time in the running mean."""

ROW_STEP = 16
"""Rows of a piece are a multiple of this, and at least so many: kernels work on so many at once."""


class StepClock:
    """What steps are expected to take.

    Args:
        answers_s: seconds of a step that computes only answers, as predicted.
        row_s: seconds that a further row of a prompt takes, as predicted.
    """

    __slots__ = ("answers_s", "row_s")

    def __init__(self, answers_s: float, row_s: float) -> None:
        self.answers_s = answers_s
        self.row_s = row_s

    @classmethod
    def predicted(cls, plan: Plan) -> StepClock:
        """Begin with what a plan predicts for its typical request.

        Args:
            plan: the plan.
        """
        slowest = 1e-9  # a plan file may say anything
        predicted = plan.predicted
        return cls(
            plan.max_batch / max(predicted.decode_tokens_s, slowest), 1 / max(predicted.prefill_tokens_s, slowest)
        )

    def prompt_rows(self, most: int) -> int:
        """Tell how many rows of prompts a step may have in which answers wait.

        Args:
            most: rows that the plan has room for.

        Returns:
            As many as make the step `MOST_STALL` times the usual, in multiples of `ROW_STEP`, within `most`.
        """
        rows = (MOST_STALL - 1) * self.answers_s / max(self.row_s, 1e-9)
        return min(most, max(1, int(min(rows, most)) // ROW_STEP) * ROW_STEP)

    def note(self, seconds: float, *, num_answers: int, other_rows: int) -> None:
        """Learn from a step.

        Args:
            seconds: what it took.
            num_answers: answers that got a token in it.
            other_rows: rows of prompts, and of guesses of answers.
        """
        if not other_rows:
            self.answers_s = _follow(self.answers_s, seconds)
        elif num_answers:
            self.row_s = _follow(self.row_s, max(0.0, seconds - self.answers_s) / other_rows)
        elif other_rows >= ROW_STEP:
            # Nothing else is in the step: it is an upper bound, as reading the weights once is part of it.
            self.row_s = min(self.row_s, _follow(self.row_s, seconds / other_rows))


def _follow(mean: float, newest: float) -> float:
    """Move a running mean."""
    return mean + NEWEST_SHARE * (min(newest, MOST_SURPRISE * mean) - mean)
