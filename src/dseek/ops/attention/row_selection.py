"""Selection by rows: each query opens the cells that hold a share of its attention mass; its strip keeps them open.

For query t and one group of heads, the mass of a head is expected to fall on the visible blocks as 2 to the scores.
A cell is opened when its share of some head's whole mass is `min_share` or more. The shares of one row sum to 1, so a
row opens at most 1 / min_share cells a level, and as a cell's mass is that of its children together, a descent with one
bound misses nothing that scoring every block would find, as far as the scores agree between levels.

Sixteen neighbouring queries are a strip: what one row opens, the later rows of its strip attend to as well, since the
block is in the cache by then. No row depends on a later one. This is the yardstick of the native kernels, written row
by row.

T tokens, H query heads in G groups of h, C cells of a level, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from dseek.core.attention_pattern import BLOCK_TOKENS, RADIX, cell_blocks, row_top_level
from dseek.ops.attention.pyramid import CellLevel, build_pyramid

STRIP_ROWS = 16
"""Queries of a strip."""


class RowScorer(Protocol):
    """What a cell's attention mass is expected to be, as natural logarithms on one scale for all levels."""

    def cells(self, position: int, group: int, level: int, indices: Sequence[int]) -> torch.Tensor:
        """Score cells for one query.

        Args:
            position: of the query.
            group: its group of heads.
            level: of the cells.
            indices: of C cells.

        Returns:
            [h, C].
        """
        ...

    def own_block(self, position: int, group: int) -> torch.Tensor:
        """Score the query's own block up to itself.

        Args:
            position: of the query.
            group: its group of heads.

        Returns:
            [h]; minus infinity leaves the block out of what shares are of.
        """
        ...


class MeanKeyRowScorer:
    """The scorer that needs no training: all keys of a cell are their mean, and the own block is left out.

    Args:
        q_THd: rotated queries of positions 0 to T - 1.
        pyramid: statistics of the cells of the same positions' keys.
    """

    def __init__(self, q_THd: torch.Tensor, pyramid: Sequence[CellLevel]) -> None:
        self._q_THd = q_THd.detach().to(pyramid[0].key_sum.dtype)
        self._means_CGd = [cells.key_mean.detach() for cells in pyramid]
        self._heads = q_THd.shape[1] // self._means_CGd[0].shape[1]

    def cells(self, position: int, group: int, level: int, indices: Sequence[int]) -> torch.Tensor:
        """Score cells: q . mean key / sqrt(d) + log(blocks of the cell).

        Args:
            position: of the query.
            group: its group of heads.
            level: of the cells.
            indices: of C cells.

        Returns:
            [h, C].
        """
        q_hd = self._q_THd[position, group * self._heads : (group + 1) * self._heads]
        k_Cd = self._means_CGd[level][list(indices), group]
        return q_hd @ k_Cd.T / math.sqrt(q_hd.shape[1]) + math.log(cell_blocks(level))

    def own_block(self, position: int, group: int) -> torch.Tensor:
        """Leave the own block out.

        Args:
            position: of the query.
            group: its group of heads.

        Returns:
            [h], minus infinity.
        """
        return torch.full((self._heads,), float("-inf"), dtype=self._q_THd.dtype)


def select_rows(
    q_THd: torch.Tensor,
    k_TGd: torch.Tensor,
    *,
    near_blocks: Sequence[int],
    min_share: float,
    top_blocks: int,
    scorer: RowScorer | None = None,
    start: int = 0,
) -> torch.Tensor:
    """Choose the exact blocks of the queries of a sequence.

    Args:
        q_THd: [T, H, d] rotated queries.
        k_TGd: [T, G, d] keys as the cache holds them.
        near_blocks: window of each group in blocks.
        min_share: least share of a head's mass that opens a cell, above 0 and below 1.
        top_blocks: cells that a strip may open on a level; where a row would open more, the largest shares win.
        scorer: None is `MeanKeyRowScorer`.
        start: first query that is chosen for, the first of a strip.

    Returns:
        bool [G, T, B], B blocks: whether the query attends to the block; its own and the window included. Nothing for
        queries before `start`.
    """
    assert start % STRIP_ROWS == 0, "a strip is chosen for as a whole"
    num_tokens, num_groups = len(q_THd), k_TGd.shape[1]
    if scorer is None:
        scorer = MeanKeyRowScorer(q_THd, build_pyramid(k_TGd.detach()))
    chosen_GTB = torch.zeros(num_groups, num_tokens, -(-num_tokens // BLOCK_TOKENS), dtype=torch.bool)
    for group, near in enumerate(near_blocks):
        for first in range(start, num_tokens, STRIP_ROWS):
            rows = range(first, min(first + STRIP_ROWS, num_tokens))
            block = first // BLOCK_TOKENS
            for row, opened in zip(rows, _open(rows, group, near, min_share, top_blocks, scorer), strict=True):
                chosen_GTB[group, row, list(opened)] = True
            chosen_GTB[group, rows.start : rows.stop, max(0, block - near) : block + 1] = True
            chosen_GTB[group, rows.start : rows.stop, 0] = True
    return chosen_GTB


def _open(rows: range, group: int, near: int, min_share: float, top_blocks: int, scorer: RowScorer) -> list[set[int]]:
    """Descend for the rows of one strip; return the blocks each has open beside the near ones."""
    block = rows.start // BLOCK_TOKENS
    first_near = max(0, block - near)
    exact = sorted({*range(first_near, block), *range(min(1, first_near))})
    rest = [scorer.own_block(row, group) for row in rows]
    opened: list[dict[int, int]] = [{} for _ in range(row_top_level(block) + 2)]
    tiled = 0
    for level in range(row_top_level(block), -1, -1):
        width = cell_blocks(level)
        met = {RADIX * parent + child: row for parent, row in opened[level + 1].items() for child in range(RADIX)}
        past = block // width
        met |= dict.fromkeys(range(tiled // width, past), rows.start)
        tiled = past * width
        free: dict[int, int] = {}
        for index, seen_from in sorted(met.items()):
            if index * width >= first_near or (level == 0 and index == 0):
                continue
            if index == 0 or (index + 1) * width > first_near:
                opened[level][index] = seen_from
            else:
                free[index] = seen_from
        if not free:
            continue
        cells = list(free)
        found: dict[int, int] = {}
        for place, row in enumerate(rows):
            scores_hC = scorer.cells(row, group, level, cells)
            hidden = torch.tensor([free[index] > row for index in cells])
            scores_hC = scores_hC.masked_fill(hidden, float("-inf"))
            parts = [rest[place][:, None], scores_hC]
            if level == row_top_level(block) and exact:
                parts.append(scorer.cells(row, group, 0, exact))
            shares_hC = (scores_hC - torch.cat(parts, dim=1).logsumexp(1, keepdim=True)).exp()
            shares = dict(zip(cells, shares_hC.amax(0).tolist(), strict=True))
            worth = [index for index, share in shares.items() if share >= min_share and index not in found]
            worth.sort(key=lambda index: -shares[index])
            found |= dict.fromkeys(worth[: max(0, top_blocks - len(found))], row)
            closed = torch.tensor([index not in found for index in cells])
            parts[1] = scores_hC.masked_fill(~closed, float("-inf"))
            rest[place] = torch.cat(parts, dim=1).logsumexp(1)
        opened[level] |= found
    return [{index for index, first in opened[0].items() if first <= row} for row in rows]


def attend_to_blocks(
    q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGd: torch.Tensor, chosen_GTB: torch.Tensor
) -> torch.Tensor:
    """Attend to the tokens of chosen blocks through one table of scores.

    Args:
        q_THd: [T, H, d] rotated queries.
        k_TGd: [T, G, d] rotated keys.
        v_TGd: [T, G, d] values.
        chosen_GTB: of `select_rows`.

    Returns:
        [T, H, d] in the dtype of the queries; scores and softmax are taken in float32 (float64 where they have it).
        Source: Vaswani et al. 2017, Attention Is All You Need, section 3.2.1.
    """
    num_tokens, num_heads, head_dim = q_THd.shape
    heads = num_heads // k_TGd.shape[1]
    dtype = torch.promote_types(q_THd.dtype, torch.float32)
    k_THd, v_THd = (x.to(dtype).repeat_interleave(heads, dim=1) for x in (k_TGd, v_TGd))
    z_HTS = torch.einsum("thd,shd->hts", q_THd.to(dtype), k_THd) / math.sqrt(head_dim)
    seen_GTS = chosen_GTB.repeat_interleave(BLOCK_TOKENS, dim=2)[:, :, :num_tokens].tril()
    z_HTS = z_HTS.masked_fill(~seen_GTS.repeat_interleave(heads, dim=0), float("-inf"))
    return torch.einsum("hts,shd->thd", z_HTS.softmax(-1), v_THd).to(q_THd.dtype)
