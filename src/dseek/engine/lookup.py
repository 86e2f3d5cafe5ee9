"""Speculation by prompt lookup: guess that a text goes on as it did before, and check several guesses in one step.

Answers repeat what is in their prompts: names, quotations, code, the document that is summarised. So the tokens that
followed the last occurrence of the newest few are a fair guess (Saxena 2023, Prompt Lookup Decoding; Yang et al. 2023,
LLMA). A step computes the newest token and the guesses after it together, which costs little more than the newest token
alone while the weights have to be read anyway. The token of each position is then chosen as ever, from the logits and
the request's own random numbers; a guess that equals it is computed already, and what follows the first other one is
forgotten. The answer is that of a run without guesses, greedy or sampled, as far as the kernels give the logits of a
row alike whatever is computed beside it.

Guessing stops where it does not pay: a request's drafts grow while they are right and shrink to where they went wrong,
and it pauses while so few are right that the time for their rows is worth more than the steps they save.
"""

from __future__ import annotations

import numpy as np

from dseek.engine.request import Request
from dseek.engine.step_clock import StepClock

LONGEST_MATCH = 4
"""So many of the newest tokens are looked for; more do not make a better guess."""

SHORTEST_MATCH = 2
"""A guess needs so many tokens to have been seen before."""

NEWEST_SHARE = 0.3
"""Weight of the newest draft in the mean share of right guesses."""

PAUSE_TOKENS = 32
"""After so many tokens without drafts another one is tried."""


class DraftState:
    """What is known of one request's text and of its drafts."""

    __slots__ = ("_ids", "_num_ids", "length", "paused_until", "share")

    def __init__(self, length: int) -> None:
        self.length = length
        """Tokens of the next draft."""
        self.share = 1.0
        """Running mean of the share of guesses that were right; begins with hope."""
        self.paused_until = 0
        """No drafts before the text has so many tokens."""
        self._ids = np.empty(0, dtype=np.int32)
        self._num_ids = 0

    def guess(self, token_ids: list[int], most: int) -> list[int]:
        """Guess how a text goes on.

        Args:
            token_ids: the text so far, which only ever grows.
            most: tokens to guess.

        Returns:
            What followed the longest match of the newest tokens, of equals the latest; none where there is no match of
            `SHORTEST_MATCH`. A match that reaches to the end goes on with its own guesses.
        """
        ids = self._as_array(token_ids)
        last = len(ids) - 1
        ends = np.flatnonzero(ids[:last] == ids[last])
        if most < 1 or not len(ends):
            return []
        lengths = np.ones(len(ends), dtype=np.int32)
        goes_on = np.ones(len(ends), dtype=bool)
        for back in range(1, min(LONGEST_MATCH, last)):
            goes_on &= (ends >= back) & (ids[ends - back] == ids[last - back])
            lengths += goes_on
        longest = int(lengths.max())
        if longest < SHORTEST_MATCH:
            return []
        start = int(ends[np.flatnonzero(lengths == longest)[-1]]) + 1
        guesses: list[int] = ids[start : start + most].tolist()
        period = len(guesses)
        while len(guesses) < most:
            guesses.append(guesses[len(guesses) - period])
        return guesses

    def learn(self, num_guessed: int, num_right: int, num_tokens: int, most: int) -> None:
        """Draw conclusions from a draft.

        Args:
            num_guessed: its length, at least 1.
            num_right: how many of its tokens were right.
            num_tokens: tokens of the text by now.
            most: longest draft.
        """
        self.share += NEWEST_SHARE * (num_right / num_guessed - self.share)
        self.length = min(most, 2 * self.length) if num_right == num_guessed else max(1, num_right + 1)
        if num_right == 0 and self.share < 1 / (most + 1):
            self.pause(num_tokens)

    def pause(self, num_tokens: int) -> None:
        """Make no drafts for a while.

        Args:
            num_tokens: tokens of the text by now.
        """
        self.paused_until = num_tokens + PAUSE_TOKENS
        self.share = max(self.share, 0.5)

    def _as_array(self, token_ids: list[int]) -> np.ndarray:
        """The text as an array that grows with it."""
        if len(token_ids) > len(self._ids):
            grown = np.empty(2 * len(token_ids), dtype=np.int32)
            grown[: self._num_ids] = self._ids[: self._num_ids]
            self._ids = grown
        self._ids[self._num_ids : len(token_ids)] = token_ids[self._num_ids :]
        self._num_ids = len(token_ids)
        return self._ids[: self._num_ids]


class Speculator:
    """Makes drafts for the answers of an engine.

    Args:
        most: longest draft in tokens.
        clock: what steps take, to tell whether drafts pay; None does not ask, as ranks must decide alike.
    """

    def __init__(self, most: int, clock: StepClock | None) -> None:
        assert most > 0
        self.most = most
        self._clock = clock

    def draft(self, request: Request, limit: int, num_answers: int) -> list[int]:
        """Guess an answer's next tokens.

        Args:
            request: all of its tokens but the newest are computed.
            limit: rows and pages allow no longer draft.
            num_answers: answers that get a token in this step.

        Returns:
            The draft, perhaps empty.
        """
        num_tokens = len(request.token_ids)
        state = request.draft_state = request.draft_state or DraftState(self.most)
        # The last token of an answer need not be computed, and a guess of it helps nobody.
        limit = min(limit, state.length, request.max_tokens - num_tokens - 1)
        if limit < 1 or num_tokens < state.paused_until:
            return []
        if not self._pays(state, num_answers):
            state.pause(num_tokens)
            return []
        return state.guess(request.token_ids, limit)

    def learn(self, request: Request, num_right: int) -> None:
        """Draw conclusions from the draft of the step that has run.

        Args:
            request: its `drafts` are still those of the step.
            num_right: how many of them were right.
        """
        if request.drafts and request.draft_state is not None:
            request.draft_state.learn(len(request.drafts), num_right, len(request.token_ids), self.most)

    def _pays(self, state: DraftState, num_answers: int) -> bool:
        """Whether the share of a step that a right guess saves is worth more than the row of every guess."""
        if self._clock is None:
            return True
        return state.share * self._clock.answers_s > self._clock.row_s * num_answers
