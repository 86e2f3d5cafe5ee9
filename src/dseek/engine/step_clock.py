"""`StepClock`: learns what steps take, so that a prompt can be cut to pieces which running answers hardly notice.

A step that computes rows of a prompt keeps every running answer waiting for its next token. Three figures say how long:
the time of a step of answers alone, what a further row of a prompt adds to it, and what that row's attention adds for
every earlier token of its sequence. A prompt's piece is as long as makes a step `AIM` times the usual one, and at least
`LEAST_ROWS`; where no answer waits, it is as long as the plan allows. Every `ALONE_EVERY`th step beside a prompt leaves
it out: answers that go on get slower with every token, and were that time taken for the prompt's, its pieces would
shrink until it stood still.

The figures begin as the plan predicts them, rows with `CAUTION`, since the plan predicts whole chunks and short pieces
take longer a row: the first piece that is too long is a stall that somebody has seen. Then they follow what is
measured, with what is now in the cache and whatever else the machine is doing. What a step took beyond its answers is
shared out between rows and attention as was expected of them, so that early pieces of prompts teach the one and late
ones the other. What it does not know is what a single slow step was slow from, which is why no step counts as more than
`MOST_SURPRISE` times what was expected.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dseek.plan.plan import Plan

AIM = 3.0
"""What a step beside a prompt is to take, in usual steps: below the four that a stream may be kept waiting at most."""

LEAST_ROWS = 4
"""Rows of a piece whatever they take: one alone costs nearly as much, and a prompt must come to its end, too."""

ALONE_EVERY = 16
"""Of so many steps beside a prompt one has answers alone."""

CAUTION = 2.0
"""How much longer a row is taken to need than predicted, until it was measured."""

MOST_SURPRISE = 3.0
"""A measured time is taken for at most so many times the expected one."""

NEWEST_SHARE = 1 / 3
"""Weight of the newest time in the running mean."""


class StepClock:
    """What steps are expected to take.

    Args:
        answers_s: seconds of a step that computes only answers.
        row_s: seconds that a further row of a prompt takes.
        pair_s: seconds that a row takes longer for every earlier token of its sequence.
    """

    __slots__ = ("_num_beside", "answers_s", "pair_s", "row_s")

    def __init__(self, answers_s: float, row_s: float, pair_s: float = 0.0) -> None:
        self.answers_s = answers_s
        self.row_s = row_s
        self.pair_s = pair_s
        self._num_beside = 0

    @classmethod
    def predicted(cls, plan: Plan) -> StepClock:
        """Begin with what a plan predicts for its typical request; attention at the rate of the linear layers.

        Args:
            plan: the plan.
        """
        slowest, shape = 1e-9, plan.shape  # a plan file may say anything
        row_s = CAUTION / max(plan.predicted.prefill_tokens_s, slowest)
        # Multiplications of a row's linear layers, and of its scores and outputs with one earlier token.
        linear = shape.num_layers * shape.num_block_parameters()
        attention = shape.num_layers * shape.num_heads * 2 * shape.head_dim
        answers_s = plan.max_batch / max(plan.predicted.decode_tokens_s, slowest)
        return cls(answers_s, row_s, row_s * attention / linear)

    def prompt_rows(self, most: int, position: int) -> int:
        """Tell how many rows of prompts a step may have in which answers wait.

        Args:
            most: rows that the plan has room for.
            position: tokens of the prompt that are computed already.

        Returns:
            As many as make the step `AIM` times the usual, at least `LEAST_ROWS`, within `most`; 0 where it is time to
            see what answers take alone.
        """
        if self._num_beside >= ALONE_EVERY - 1:
            return 0
        allowed_s = (AIM - 1) * self.answers_s
        first_s, growth_s = self.row_s + self.pair_s * position, self.pair_s / 2
        # rows x first + rows^2 x growth = allowed, solved without a difference of nearly equal numbers.
        root = math.sqrt(first_s * first_s + 4 * growth_s * allowed_s)
        rows = 2 * allowed_s / max(first_s + root, 1e-12)
        return min(max(LEAST_ROWS, int(min(rows, most))), most)

    def note(self, seconds: float, *, num_answers: int, other_rows: int, pairs: int = 0) -> None:
        """Learn from a step.

        Args:
            seconds: what it took.
            num_answers: answers that got a token in it.
            other_rows: rows of prompts, and of guesses of answers.
            pairs: of these rows with earlier tokens of their sequences.
        """
        self._num_beside = self._num_beside + 1 if num_answers and other_rows else 0
        if not other_rows:
            mean = self.answers_s
            self.answers_s = mean + NEWEST_SHARE * (min(seconds, MOST_SURPRISE * mean) - mean)
            return
        rows_s, pairs_s = other_rows * self.row_s, pairs * self.pair_s
        expected_s = max(rows_s + pairs_s, 1e-12)
        surprise = min(max(0.0, seconds - self.answers_s) / expected_s, MOST_SURPRISE) - 1
        if num_answers or surprise > 0:  # a step without answers may be long, and its rows cost less
            self.row_s *= 1 + NEWEST_SHARE * surprise * rows_s / expected_s
            self.pair_s *= 1 + NEWEST_SHARE * surprise * pairs_s / expected_s
