"""What a pattern of attention leaves out, and what choosing the rest takes: pairs, scored cells, the pyramid's memory.

The pyramid keeps, beside every page of the cache, the mean key and value of the cells that end there and what its query
block has opened, for every level (`ops/csrc/pyramid.h`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from dseek.core.attention_pattern import BLOCK_TOKENS, RADIX, AttentionPattern, row_top_level, top_level
from dseek.core.shape import ModelShape


@functools.lru_cache(maxsize=4096)
def seen_tokens(pattern: AttentionPattern, begin: int, end: int, num_kv_heads: int) -> float:
    """Count the exact tokens that a query sees.

    Args:
        pattern: how it attends.
        begin: first position that is counted.
        end: the position behind the last one.
        num_kv_heads: key-value heads.

    Returns:
        Mean over the positions and the heads, the query's own position included.
    """
    total, start = 0.0, begin
    while start < end:
        stop = min(end, (start // BLOCK_TOKENS + 1) * BLOCK_TOKENS)
        # Inside a block every position sees one more than the one before it.
        total += (stop - start) * (pattern.visible_tokens(start + 1, num_kv_heads) + (stop - start - 1) / 2)
        start = stop
    return total / (end - begin)


def skipped_share(pattern: AttentionPattern, num_tokens: int, num_kv_heads: int, *, first_token: int = 0) -> float:
    """Say how much of causal attention a pattern leaves out.

    Args:
        pattern: how the heads attend.
        num_tokens: length of the sequence.
        num_kv_heads: key-value heads.
        first_token: first query position that is counted.

    Returns:
        Pairs of a query and an earlier position (or its own) that are not looked at, as a share of all of them.
    """
    seen = seen_tokens(pattern, first_token, num_tokens, num_kv_heads)
    return 1 - seen / ((first_token + num_tokens + 1) / 2)


def scored_cells(pattern: AttentionPattern, context_tokens: int, level: int) -> int:
    """Count the cells that a descent meets, at most.

    Args:
        pattern: how the heads attend.
        context_tokens: positions before the query block.
        level: of the largest cells.

    Returns:
        All cells of the highest level, below it the children of what was opened and fewer than eight that begin there,
        but never more than the cells there are.
    """
    if pattern.kind != "dynamic":
        return 0
    blocks = context_tokens // BLOCK_TOKENS
    if pattern.min_share:
        highest = row_top_level(blocks)
        return min(blocks, blocks // int(RADIX**highest) + (int(pattern.expected_blocks) + 3) * RADIX * highest)
    below = ((pattern.top_blocks + 3) * RADIX + RADIX) * level
    largest: int = RADIX**level
    return min(blocks * RADIX // (RADIX - 1), blocks // largest + below)


STRIPS = 4
"""Runs of sixteen queries in a block."""

GATE_DIM = 32
"""Width of a gate, as `dseek train-gate` makes it by default."""


def pyramid_page_bytes(shape: ModelShape, patterns: Sequence[AttentionPattern], num_pages: int) -> int:
    """Size of what the pyramid keeps beside a page of the cache.

    Args:
        shape: the model.
        patterns: of all layers.
        num_pages: pages of the cache, which decide how many levels there are.

    Returns:
        Bytes for all layers, which all have room once one of them is not dense.
    """
    if all(pattern.kind == "dense" for pattern in patterns):
        return 0
    most = max(0 if pattern.min_share else pattern.top_blocks for pattern in patterns)
    by_rows = max(pattern.top_blocks if pattern.min_share else 0 for pattern in patterns)
    levels = top_level(num_pages * BLOCK_TOKENS) + 1
    openings = -(-(1 + most) * 4 // 64) * 64
    means = 2 * shape.head_dim * 4
    statistics = (4 * shape.head_dim + GATE_DIM) * 4 if any(pattern.gate for pattern in patterns) else 0
    record = levels * (means + statistics + openings)
    if by_rows:
        record += (row_top_level(num_pages) + 1) * STRIPS * (1 + by_rows) * 4
    return shape.num_layers * shape.num_kv_heads * -(-record // 64) * 64
