"""Which key blocks each query block attends to: the form in which a pattern is told to the ranks.

A list belongs to a query block, or to a query block and a group of heads where the groups choose for themselves. Lists
are block-granular; inside a query's own block attention is causal. Far cells are no blocks: they are a partial result
of their own (see `ContextParallel.attention`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockLists:
    """Lists of blocks, one after the other."""

    starts: torch.Tensor
    """int64 [Q * L + 1]: list number n is `blocks[starts[n] : starts[n + 1]]`. Each of the Q query blocks has L, one
    after the other: 1, or as many as key and value heads."""
    blocks: torch.Tensor
    """int64, rising within a list."""

    @property
    def num_lists(self) -> int:
        """Lists, Q * L."""
        return self.starts.numel() - 1

    def list_numbers(self) -> torch.Tensor:
        """Say which list each entry of `blocks` stands in, int64."""
        return torch.repeat_interleave(torch.arange(self.num_lists), self.starts.diff())

    def only(self, wanted: torch.Tensor) -> BlockLists:
        """Keep some blocks and call them by their place among those.

        Args:
            wanted: int64 [N], rising; the blocks to keep.

        Returns:
            As many lists, of indices into `wanted`.
        """
        if wanted.numel() == 0:
            return BlockLists(starts=torch.zeros_like(self.starts), blocks=self.blocks[:0])
        index = torch.searchsorted(wanted, self.blocks).clamp_(max=wanted.numel() - 1)
        kept = wanted[index] == self.blocks
        counts = torch.bincount(self.list_numbers()[kept], minlength=self.num_lists)
        return BlockLists(starts=_starts(counts), blocks=index[kept])


def joined(parts: Sequence[BlockLists], places: Sequence[torch.Tensor]) -> BlockLists:
    """Put lists together that were parted by owner.

    Args:
        parts: as many lists each.
        places: of each part, int64: what its indices mean in the result.

    Returns:
        As many lists, each with the blocks of all parts, rising.
    """
    num_lists = parts[0].num_lists
    numbers = torch.cat([part.list_numbers() for part in parts])
    blocks = torch.cat([place[part.blocks] for part, place in zip(parts, places, strict=True)])
    past = int(blocks.max()) + 1 if blocks.numel() else 1
    order = (numbers * past + blocks).argsort()
    return BlockLists(starts=_starts(torch.bincount(numbers, minlength=num_lists)), blocks=blocks[order])


def dense_lists(query_blocks: Sequence[int]) -> BlockLists:
    """List every block up to each query block.

    Args:
        query_blocks: of this rank.

    Returns:
        One list a query block.
    """
    return listed([range(block + 1) for block in query_blocks])


def window_lists(query_blocks: Sequence[int], window_blocks: int, *, sink: bool = True) -> BlockLists:
    """List each query block, the blocks before it that a window holds, and the first block of all.

    Args:
        query_blocks: of this rank.
        window_blocks: blocks before the query's own; 0 is its own only.
        sink: whether block 0 is always seen.

    Returns:
        One list a query block.
    """
    lists = []
    for block in query_blocks:
        first = max(0, block - window_blocks)
        near = range(first, block + 1)
        lists.append((0, *near) if sink and first > 0 else near)
    return listed(lists)


def listed(lists: Sequence[Sequence[int]]) -> BlockLists:
    """Write down lists.

    Args:
        lists: the blocks of each, rising, the query's own included; see `BlockLists` for their order.

    Returns:
        The same as tensors.
    """
    counts = torch.tensor([len(blocks) for blocks in lists], dtype=torch.int64)
    every = torch.from_numpy(np.fromiter(itertools.chain.from_iterable(lists), dtype=np.int64))
    return BlockLists(starts=_starts(counts), blocks=every)


def _starts(counts: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
