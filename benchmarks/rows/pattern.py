"""The pattern of the rows on dynamic attention, in the one place that all of them take it from."""

from __future__ import annotations

from typing import Any

from dseek.core.attention_pattern import AttentionPattern
from dseek.plan.selection import seen_tokens

WINDOW_TOKENS = 256
"""Tokens before the own block that every query sees, where a block's first query chooses for all."""

TOP_BLOCKS = 9
"""Blocks selected beside that window."""

FIELDS: dict[str, Any] = {"window_tokens": WINDOW_TOKENS, "top_blocks": TOP_BLOCKS}
"""The pattern as arguments of the workers' operations, which build an `AttentionPattern` without far cells of it."""

MODEL_PATTERN = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=64, min_share=0.03, gate=True)
"""What a whole model attends to: every query selects for itself, by the model's gate."""

DENSE_SHARE = 2 / 90
"""Of the key-value heads of the rows' model, SmolLM2: those that see everything all the same, by its gate."""

LOAD_OPTIONS: dict[str, Any] = {
    "attention": "dynamic",
    "attention_window": MODEL_PATTERN.window_tokens[0],
    "attention_top_blocks": MODEL_PATTERN.top_blocks,
    "attention_min_share": MODEL_PATTERN.min_share,
}
"""The same as the plan's wish: arguments of `dseek.load`."""


def visible_tokens(context_tokens: float) -> float:
    """Tokens that one query of a model is expected to see, in the mean over its heads.

    Args:
        context_tokens: tokens so far.
    """
    seen = min(context_tokens, MODEL_PATTERN.visible_tokens(int(context_tokens), 1))
    return DENSE_SHARE * context_tokens + (1 - DENSE_SHARE) * seen


def prefill_pairs(num_tokens: int) -> float:
    """Pairs of a query and a key that a model's attention over a prompt is expected to look at.

    Args:
        num_tokens: tokens of the prompt.
    """
    seen = seen_tokens(MODEL_PATTERN, 0, num_tokens, 1)
    return num_tokens * (DENSE_SHARE * (num_tokens + 1) / 2 + (1 - DENSE_SHARE) * seen)
