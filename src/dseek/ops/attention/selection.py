"""The descent through the pyramid: which blocks a query attends to token by token, and which cells stand for the rest.

A choice is made once for a block of 64 queries and a group of heads, from the block's first query and the complete
blocks before it; the other 63 positions keep it. So it never depends on a later token, and a prompt computed at once,
in chunks or token by token chooses the same. Everything here is detached from autograd.

T query rows, S key rows, C cells, H query heads in G groups (h in one of them), d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dseek.core.attention_pattern import (
    BLOCK_TOKENS,
    RADIX,
    AttentionPattern,
    cell_blocks,
    check_window,
    start_cells,
    top_level,
)
from dseek.ops.attention.pyramid import CellLevel, build_pyramid

Cell = tuple[int, int]
"""Level and index."""

CellScorer = Callable[[int, int, int, Sequence[int]], Sequence[float]]
"""(query block, group, level, indices of cells) to the score of each; the higher, the sooner a cell is opened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockChoice:
    """What the queries of one block and one group attend to before their own block."""

    exact_blocks: tuple[int, ...]
    """Blocks attended token by token, rising: the sink block 0, the window's, and those the descent selected."""
    far_cells: tuple[Cell, ...] = ()
    """Cells attended through their mean key and value, by level from the top, then by index."""
    num_scores: int = 0
    """Cells that the gate scored."""


Selection = Mapping[int, tuple[BlockChoice, ...]]
"""From the index of a query block to the choice of each group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairCounts:
    """The work of one query block over all groups."""

    pairs: int
    """Pairs of a query and a key or far cell, for one head of each group."""
    scores: int
    """Scores the gate computed."""


def select(
    q_THd: torch.Tensor,
    k_SGd: torch.Tensor,
    pattern: AttentionPattern,
    *,
    start: int | None = None,
    windows: Sequence[int] | None = None,
    scorer: CellScorer | None = None,
    kept: Selection | None = None,
) -> Selection:
    """Choose for every block that has one of the given queries.

    Args:
        q_THd: [T, H, d] rotated queries of positions start to start + T - 1.
        k_SGd: [S, G, d] keys of positions 0 to S - 1 as the cache holds them; H is a multiple of G.
        pattern: what to attend to.
        start: position of the first query; None means the queries are the newest rows, S - T.
        windows: window of each group in tokens; None is the pattern's for all.
        scorer: scores cells; None is `mean_key_scorer`.
        kept: choices made earlier (of tokens that still stand); a block that is in it is not chosen again. Where the
            first query's block begins before `start`, it must be.

    Returns:
        The choices of the blocks from the first query's to the last one's.

    Raises:
        ConfigError: a window that is not one of those there are.
    """
    num_queries, num_groups = q_THd.shape[0], k_SGd.shape[1]
    start = k_SGd.shape[0] - num_queries if start is None else start
    assert 0 <= start <= k_SGd.shape[0] - num_queries, "every query needs its own key"
    if windows is None:
        near = pattern.near_blocks(num_groups) if pattern.kind != "dense" else (1,) * num_groups
        windows = [BLOCK_TOKENS * blocks for blocks in near]
    assert len(windows) == num_groups, "one window a group"
    if scorer is None and pattern.kind == "dynamic":
        scorer = mean_key_scorer(q_THd, build_pyramid(k_SGd.detach()), start)

    selection: dict[int, tuple[BlockChoice, ...]] = {}
    for query_block, _, _ in query_blocks(start, num_queries):
        if kept is not None and query_block in kept:
            selection[query_block] = kept[query_block]
            continue
        assert query_block * BLOCK_TOKENS >= start, "the first query's block began earlier: its choice must be kept"
        selection[query_block] = tuple(
            choose(pattern, query_block, group, scorer, window_tokens=window) for group, window in enumerate(windows)
        )
    return selection


def choose(
    pattern: AttentionPattern,
    query_block: int,
    group: int,
    scorer: CellScorer | None,
    *,
    window_tokens: int | None = None,
) -> BlockChoice:
    """Choose for the queries of one block and one group.

    Args:
        pattern: what to attend to.
        query_block: index of the queries' block.
        group: index of the group; handed on to `scorer`.
        scorer: scores cells; needed for the dynamic kind alone.
        window_tokens: the group's window; None is the pattern's.

    Returns:
        The choice. Its blocks and far cells together cover every block before the query block exactly once, but for the
        window kind and where `pattern.far` is off.

    Raises:
        ConfigError: a window that is not one of those there are.
    """
    if pattern.kind == "dense":
        return BlockChoice(exact_blocks=tuple(range(query_block)))
    if window_tokens is None:
        window_tokens = pattern.window_tokens[group if len(pattern.window_tokens) > 1 else 0]
    check_window(window_tokens)
    first_near = max(0, query_block - window_tokens // BLOCK_TOKENS)
    near = {*range(min(1, query_block)), *range(first_near, query_block)}
    if pattern.kind == "window":
        return BlockChoice(exact_blocks=tuple(sorted(near)))
    assert scorer is not None, "a descent needs scores"
    selected, far_cells, num_scores = _descend(query_block, group, first_near, pattern.top_blocks, scorer)
    return BlockChoice(
        exact_blocks=tuple(sorted(near | set(selected))),
        far_cells=tuple(far_cells) if pattern.far else (),
        num_scores=num_scores,
    )


def _descend(
    query_block: int, group: int, first_near: int, top_blocks: int, scorer: CellScorer
) -> tuple[list[int], list[Cell], int]:
    """Open the best cells of every level; return the selected blocks, the far cells and the number of scores."""
    highest = top_level(query_block * BLOCK_TOKENS)
    starts = start_cells(query_block, highest)
    far_cells: list[Cell] = []
    opened: list[int] = []
    num_scores = 0
    for level in range(highest, -1, -1):
        candidates = [RADIX * parent + child for parent in opened for child in range(RADIX)]
        candidates += [index for start_level, index in starts if start_level == level]
        forced, free = _sort_out(candidates, level, first_near)
        best = free
        if len(free) > top_blocks:
            best = []
            if top_blocks:
                scores = scorer(query_block, group, level, free)
                num_scores += len(free)
                best = [free[place] for place in _best_places(scores, top_blocks)]
        far_cells += [(level, index) for index in sorted(set(free) - set(best))]
        opened = sorted(forced + best)
    return opened, far_cells, num_scores


def _sort_out(candidates: Sequence[int], level: int, first_near: int) -> tuple[list[int], list[int]]:
    """Drop cells whose tokens are near already; part those that must be opened from those that compete for it."""
    width = cell_blocks(level)
    forced: list[int] = []
    free: list[int] = []
    for index in sorted(candidates):
        first, past = index * width, (index + 1) * width
        if first >= first_near or past == 1:
            continue
        (forced if first == 0 or past > first_near else free).append(index)
    return forced, free


def _best_places(scores: Sequence[float], count: int) -> list[int]:
    """Places of the highest scores; among equal ones the earlier wins."""
    return sorted(range(len(scores)), key=lambda place: -scores[place])[:count]


def mean_key_scorer(q_THd: torch.Tensor, pyramid: Sequence[CellLevel], start: int) -> CellScorer:
    """The gate that needs no training: how much attention a cell would get if all its keys were their mean.

    Args:
        q_THd: [T, H, d] rotated queries of positions start to start + T - 1.
        pyramid: statistics of the cells before the last query's block, or of more.
        start: position of the first query.

    Returns:
        The scorer: the largest over the group's heads of q . mean key / sqrt(d) + log(tokens of the cell), in float32
        (float64 where the keys are), q the first query of the query block.
    """
    q_THd = q_THd.detach().to(pyramid[0].key_sum.dtype)
    num_heads, head_dim = q_THd.shape[1:]
    means_CGd = [cells.key_mean.detach() for cells in pyramid]
    heads = num_heads // means_CGd[0].shape[1]

    def score(query_block: int, group: int, level: int, indices: Sequence[int]) -> list[float]:
        q_hd = q_THd[query_block * BLOCK_TOKENS - start, group * heads : (group + 1) * heads]
        k_Cd = means_CGd[level][list(indices), group]
        # Products summed row by row: the bits of a score do not depend on which other cells are scored with it.
        z_hC = (q_hd[:, None] * k_Cd).sum(-1) / math.sqrt(head_dim) + math.log(pyramid[level].num_tokens)
        return [float(value) for value in z_hC.amax(0).tolist()]

    return score


def count_pairs(selection: Selection, num_tokens: int) -> dict[int, PairCounts]:
    """Count the work that a selection causes.

    Args:
        selection: choices, of all blocks of a sequence or of some.
        num_tokens: length of the sequence; the last block may be partial.

    Returns:
        The counts of each query block in `selection`.
    """
    counts: dict[int, PairCounts] = {}
    for query_block, choices in selection.items():
        rows = min(BLOCK_TOKENS, num_tokens - query_block * BLOCK_TOKENS)
        pairs = sum(
            rows * (BLOCK_TOKENS * len(choice.exact_blocks) + len(choice.far_cells)) + rows * (rows + 1) // 2
            for choice in choices
        )
        counts[query_block] = PairCounts(pairs=pairs, scores=sum(choice.num_scores for choice in choices))
    return counts


def query_blocks(start: int, num_queries: int) -> list[tuple[int, int, int]]:
    """List the blocks that consecutive queries lie in.

    Args:
        start: position of the first query.
        num_queries: how many.

    Returns:
        Of each block: its index, the position of its first query, and the position after its last.
    """
    past = start + num_queries
    return [
        (block, max(start, block * BLOCK_TOKENS), min(past, (block + 1) * BLOCK_TOKENS))
        for block in range(start // BLOCK_TOKENS, -(-past // BLOCK_TOKENS))
    ]


def block_tokens(blocks: Sequence[int]) -> torch.Tensor:
    """List the positions in blocks.

    Args:
        blocks: indices of complete blocks.

    Returns:
        int64 [64 x blocks], block after block.
    """
    return (torch.tensor(blocks, dtype=torch.int64)[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)).flatten()
