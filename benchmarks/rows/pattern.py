"""The pattern of the rows on dynamic attention, in the one place that all of them take it from."""

from __future__ import annotations

from typing import Any

BLOCK_TOKENS = 64

WINDOW_TOKENS = 256
"""Tokens before the own block that every query sees."""

TOP_BLOCKS = 9
"""Blocks selected beside the window."""

LOAD_OPTIONS: dict[str, Any] = {
    "attention": "dynamic",
    "attention_window": WINDOW_TOKENS,
    "attention_top_blocks": TOP_BLOCKS,
    "attention_far": False,
}
"""The pattern as the plan's wish: arguments of `dseek.load`."""

FIELDS: dict[str, Any] = {"window_tokens": WINDOW_TOKENS, "top_blocks": TOP_BLOCKS}
"""The pattern as arguments of the workers' operations, which build an `AttentionPattern` without far cells of it."""


def visible_tokens(context_tokens: float) -> float:
    """Tokens that one query sees at most: the first block, the window, the selected blocks and its own.

    Args:
        context_tokens: tokens so far.
    """
    return min(context_tokens, float(WINDOW_TOKENS + (TOP_BLOCKS + 2) * BLOCK_TOKENS))


def prefill_pairs(num_tokens: int) -> float:
    """Pairs of a query and a key that attention over a prompt looks at, its own block by half.

    Args:
        num_tokens: tokens of the prompt.
    """
    before = WINDOW_TOKENS + (TOP_BLOCKS + 1) * BLOCK_TOKENS
    own = num_tokens * (BLOCK_TOKENS + 1) / 2
    return own + sum(min(start, before) * BLOCK_TOKENS for start in range(0, num_tokens, BLOCK_TOKENS))
