"""Statistics of the pyramid's cells: what a gate scores a cell by, and what a cell counts with where it is not opened.

S tokens, C cells, G key and value heads, d head width. Only complete cells have statistics. All of them are
associative: a cell's follow from those of its eight children, so that a cache can keep them up to date as tokens
arrive.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dseek.core.attention_pattern import BLOCK_TOKENS, RADIX, cell_tokens, num_levels

Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Merges two statistics of the same shape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CellLevel:
    """The complete cells of one level; float32, or float64 where the keys are."""

    num_tokens: int
    """Tokens in each cell."""
    key_sum: torch.Tensor
    """[C, G, d] sum of the rotated keys, as the cache holds them."""
    value_sum: torch.Tensor | None = None
    """[C, G, d] sum of the values; None where none were given."""
    plain_max: torch.Tensor | None = None
    """[C, G, d] largest of each element of the keys before rotation; None where none were given."""
    plain_min: torch.Tensor | None = None
    """[C, G, d] smallest of each element of the keys before rotation."""
    plain_sum: torch.Tensor | None = None
    """[C, G, d] sum of the keys before rotation."""

    @property
    def num_cells(self) -> int:
        """Complete cells, C."""
        return self.key_sum.shape[0]

    @property
    def key_mean(self) -> torch.Tensor:
        """[C, G, d] mean of the rotated keys."""
        return self.key_sum / self.num_tokens

    @property
    def value_mean(self) -> torch.Tensor:
        """[C, G, d] mean of the values."""
        assert self.value_sum is not None, "the pyramid was built without values"
        return self.value_sum / self.num_tokens

    @property
    def plain_mean(self) -> torch.Tensor:
        """[C, G, d] mean of the keys before rotation."""
        assert self.plain_sum is not None, "the pyramid was built without keys before rotation"
        return self.plain_sum / self.num_tokens


def build_pyramid(
    k_SGd: torch.Tensor, v_SGd: torch.Tensor | None = None, plain_k_SGd: torch.Tensor | None = None
) -> tuple[CellLevel, ...]:
    """Summarise a sequence's complete cells, level by level.

    A block is summed token after token, a larger cell child after child: a cache that adds in this order gets the same
    bits, and later tokens do not change the bits of a complete cell.

    Args:
        k_SGd: [S, G, d] keys as the cache holds them (rotated, rounded to its dtype).
        v_SGd: [S, G, d] values, or None where only keys matter.
        plain_k_SGd: [S, G, d] keys before rotation, for a trained gate, or None.

    Returns:
        One `CellLevel` for each of the levels 0 to `top_level(S)`, differentiable; the higher ones may have no cells.
        Source: after the compressed blocks of Yuan et al. 2025, Native Sparse Attention, section 3.3.1; here with
        means, and in several sizes.
    """
    levels = num_levels(k_SGd.shape[0])
    nothing: Sequence[torch.Tensor | None] = [None] * levels
    value_sums = nothing if v_SGd is None else _all_levels(v_SGd, torch.add, levels)
    plain: tuple[Combine, ...] = (torch.maximum, torch.minimum, torch.add)
    maxima, minima, plain_sums = (
        nothing if plain_k_SGd is None else _all_levels(plain_k_SGd, combine, levels) for combine in plain
    )
    return tuple(
        CellLevel(
            num_tokens=cell_tokens(level),
            key_sum=key_sum,
            value_sum=value_sums[level],
            plain_max=maxima[level],
            plain_min=minima[level],
            plain_sum=plain_sums[level],
        )
        for level, key_sum in enumerate(_all_levels(k_SGd, torch.add, levels))
    )


def block_key_sums(k_SGd: torch.Tensor) -> torch.Tensor:
    """Add up the keys of each complete block, which is all that a pyramid of keys needs of them.

    Args:
        k_SGd: [S, G, d] keys as the cache holds them, from a block's first on.

    Returns:
        [S // 64, G, d] in float32, or float64 where the keys are.
    """
    return _reduce_runs(k_SGd.to(torch.promote_types(k_SGd.dtype, torch.float32)), BLOCK_TOKENS, torch.add)


def key_pyramid(block_sum_CGd: torch.Tensor, num_tokens: int) -> tuple[CellLevel, ...]:
    """Summarise the keys of a sequence whose blocks were summed elsewhere, such as on several ranks.

    Args:
        block_sum_CGd: [C, G, d] from `block_key_sums`, of every complete block.
        num_tokens: length of the sequence.

    Returns:
        The levels that `build_pyramid` returns for the keys alone, bit for bit.
    """
    sums = _levels_above(block_sum_CGd, torch.add, num_levels(num_tokens))
    return tuple(CellLevel(num_tokens=cell_tokens(level), key_sum=key_sum) for level, key_sum in enumerate(sums))


def _all_levels(x_SGd: torch.Tensor, combine: Combine, levels: int) -> Sequence[torch.Tensor]:
    """Reduce tokens to blocks, blocks to cells of eight, and so on."""
    wide_SGd = x_SGd.to(torch.promote_types(x_SGd.dtype, torch.float32))
    return _levels_above(_reduce_runs(wide_SGd, BLOCK_TOKENS, combine), combine, levels)


def _levels_above(x_CGd: torch.Tensor, combine: Combine, levels: int) -> Sequence[torch.Tensor]:
    """Reduce blocks to cells of eight, and so on; the blocks come first."""
    reduced = [x_CGd]
    while len(reduced) < levels:
        reduced.append(_reduce_runs(reduced[-1], RADIX, combine))
    return reduced


def _reduce_runs(x_SGd: torch.Tensor, length: int, combine: Combine) -> torch.Tensor:
    """Reduce each complete run of so many rows to one, from the first row on."""
    num_runs = x_SGd.shape[0] // length
    reduced, *others = x_SGd[: num_runs * length].unflatten(0, (num_runs, length)).unbind(1)
    for other in others:
        reduced = combine(reduced, other)
    return reduced


@dataclass(frozen=True, kw_only=True, slots=True)
class CellTable:
    """The cells of all levels in one row of places, level 0 first: what far cells are looked up in."""

    key_mean: torch.Tensor
    """[C, G, d] mean of the rotated keys."""
    value_mean: torch.Tensor
    """[C, G, d] mean of the values."""
    log_tokens: torch.Tensor
    """[C] logarithm of the tokens in each cell."""
    level: torch.Tensor
    """int64 [C] level of each cell."""
    first_place: tuple[int, ...]
    """Place of each level's first cell."""

    def places(self, cells: Sequence[tuple[int, int]]) -> list[int]:
        """Find cells, given as (level, index), in the table.

        Args:
            cells: complete cells.
        """
        return [self.first_place[level] + index for level, index in cells]

    def bias(self, level_bias_HL: torch.Tensor | None) -> torch.Tensor:
        """Say what is added to the scores of each cell: the logarithm of its tokens, and its level's bias.

        Args:
            level_bias_HL: [H, L] with a column for every level that has cells, or None for none.

        Returns:
            [H, C], or [1, C] where there is no bias by level.
        """
        if level_bias_HL is None:
            return self.log_tokens[None]
        return self.log_tokens + level_bias_HL.to(self.log_tokens.dtype)[:, self.level]


def tabulate(pyramid: Sequence[CellLevel]) -> CellTable:
    """Put the cells of all levels into one table.

    Args:
        pyramid: levels that were built with values, level 0 first.

    Returns:
        The table, differentiable.
    """
    counts = [cells.num_cells for cells in pyramid]
    key_mean = torch.cat([cells.key_mean for cells in pyramid])
    level = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(key_mean.device)
    tokens_C = torch.tensor([cells.num_tokens for cells in pyramid], device=level.device)[level]
    return CellTable(
        key_mean=key_mean,
        value_mean=torch.cat([cells.value_mean for cells in pyramid]),
        log_tokens=tokens_C.to(key_mean.dtype).log(),
        level=level,
        first_place=(0, *itertools.accumulate(counts[:-1])),
    )
