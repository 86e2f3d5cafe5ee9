"""`Counters`: what an engine has done since it was made, for whoever watches it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dseek.engine.request import Request


@dataclass(slots=True)
class Counters:
    """Numbers that only grow."""

    steps: int = 0
    """Batches computed."""
    prefill_rows: int = 0
    """Rows of prompts, or of what was computed again after a preemption."""
    decode_rows: int = 0
    """Rows of answers, drafts included."""
    generated_tokens: int = 0
    """Tokens sampled."""
    saved_tokens: int = 0
    """Tokens whose keys and values were found in the prefix cache."""
    preemptions: int = 0
    """How often a request gave its pages to another."""
    drafted_tokens: int = 0
    """Tokens guessed by speculation."""
    accepted_tokens: int = 0
    """Of these, those that were right."""

    def count(self, scheduled: Sequence[Request]) -> tuple[int, int, int]:
        """Count a step.

        Args:
            scheduled: requests with the rows that were computed, before they are advanced.

        Returns:
            Newest tokens of answers, rows besides (of drafts and prompts), and pairs of these with earlier tokens.
        """
        answers = prompts = drafts = pairs = 0
        for request in scheduled:
            if request.num_scheduled == 1 and request.num_computed + 1 == len(request.token_ids):
                answers += 1
                drafts += len(request.drafts)
                pairs += len(request.drafts) * len(request.token_ids)
            else:
                prompts += request.num_scheduled
                pairs += request.num_scheduled * (2 * request.num_computed + request.num_scheduled) // 2
        self.steps += 1
        self.decode_rows += answers + drafts
        self.prefill_rows += prompts
        self.drafted_tokens += drafts
        return answers, drafts + prompts, pairs
