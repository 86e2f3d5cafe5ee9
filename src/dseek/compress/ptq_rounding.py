"""Grids of integers and rounding to them: what every method of post-training quantisation here ends in.

A weight is cut into groups of inputs, each with a scale and, where the scheme is asymmetric, a zero point. A group's
range is the one, among the full range and some that are cut short, whose rounding error is least. Axes: N output
channels, K inputs, G groups, g inputs of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dseek.core.errors import ConfigError

LEAST_SCALE = 2.0**-17
"""Smaller scales are raised to it: bfloat16 and half hold the same numbers from here on."""
_ZERO_SCALE_BITS = 7
_SHRINKS = tuple(1 - step / 20 for step in range(9))


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """How weights, and perhaps activations, are stored as integers."""

    num_bits: int
    """Of a weight: 8 or 4."""
    group_size: int | None = None
    """Inputs that share a scale; None: all of an output channel."""
    symmetric: bool = True
    """Whether zero points are zero."""
    activation_bits: int | None = None
    """8: activations are int8, one scale a token, found at run time; None: they stay as they are."""

    def __post_init__(self) -> None:
        if self.num_bits not in (4, 8):
            raise ConfigError(f"weights of {self.num_bits} bits were asked for", needed="8 or 4")
        if self.group_size is not None and (self.group_size < 32 or self.group_size % 32):
            raise ConfigError(f"groups of {self.group_size} inputs were asked for", needed="a multiple of 32")
        if self.num_bits == 8 and not self.symmetric:
            raise ConfigError("8 bits with zero points were asked for", needed="4 bits, or a symmetric scheme")
        if self.num_bits == 4 and self.group_size is None:
            raise ConfigError("4 bits with one scale a channel were asked for", needed="groups of 32, 64 or 128")
        if self.activation_bits not in (None, 8) or (self.activation_bits == 8 and self.num_bits == 4):
            raise ConfigError("these activations were asked for", needed="8 bits beside weights of 8 bits, or none")

    @property
    def least(self) -> int:
        """Smallest integer of a weight."""
        return -(1 << (self.num_bits - 1))

    @property
    def most(self) -> int:
        """Largest integer of a weight."""
        return (1 << (self.num_bits - 1)) - 1

    def width(self, num_inputs: int) -> int:
        """Return the inputs of a group.

        Args:
            num_inputs: K.

        Raises:
            ConfigError: they are not a whole number of groups.
        """
        width = self.group_size or num_inputs
        if num_inputs % width:
            raise ConfigError(
                f"a projection has {num_inputs} inputs, which is no multiple of groups of {width}",
                remedy="take a smaller --group-size, or leave the projection out with --ignore",
            )
        return width


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales and zero points of the groups.

    Args:
        scale: float32 [N, G].
        zero: int8 [N, G], or None where the scheme is symmetric.
    """

    scale: torch.Tensor
    zero: torch.Tensor | None

    def round(self, weight_NGg: torch.Tensor, scheme: Scheme) -> torch.Tensor:
        """Round to the nearest point of the grid.

        Args:
            weight_NGg: float32 [N, G, g].
            scheme: the range.

        Returns:
            float32 [N, G, g], whole numbers.
        """
        zero = 0.0 if self.zero is None else self.zero[..., None].float()
        return torch.clamp(torch.round(weight_NGg / self.scale[..., None]) + zero, scheme.least, scheme.most)

    def widen(self, values_NGg: torch.Tensor) -> torch.Tensor:
        """Give what integers stand for.

        Args:
            values_NGg: [N, G, g].

        Returns:
            float32 [N, G, g].
        """
        wide = values_NGg.float()
        if self.zero is not None:
            wide = wide - self.zero[..., None].float()
        return wide * self.scale[..., None]


@dataclass(frozen=True, slots=True)
class RoundedWeight:
    """A weight as integers.

    Args:
        values: int8 [N, K].
        grid: its scales and zero points.
    """

    values: torch.Tensor
    grid: Grid

    def widen(self) -> torch.Tensor:
        """Give the weight it stands for, float32 [N, K]."""
        rows, inputs = self.values.shape
        groups = self.grid.scale.shape[1]
        return self.grid.widen(self.values.view(rows, groups, inputs // groups)).view(rows, inputs)


def choose_grid(
    weight_NGg: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype = torch.float32,
    importance_Gg: torch.Tensor | None = None,
    *,
    search: bool = True,
) -> Grid:
    """Choose the grid of every group.

    Args:
        weight_NGg: float32 [N, G, g].
        scheme: the range.
        scale_dtype: scales are rounded to it, since a file keeps them so; beside zero points to 7 bits.
        importance_Gg: float32 [G, g], what the square of an input's error counts; None: all alike.
        search: with 4 bits try ranges that are cut short too, by up to 40 %, and keep the one with the least error.

    Returns:
        The grid.
    """
    lowest = weight_NGg.amin(-1).clamp_max(0)
    highest = weight_NGg.amax(-1).clamp_min(0)
    shrinks = _SHRINKS if search and scheme.num_bits == 4 else (1.0,)
    best: Grid | None = None
    least_error = torch.empty(0)
    for shrink in shrinks:
        grid = _grid(lowest * shrink, highest * shrink, scheme, scale_dtype)
        if len(shrinks) == 1:
            return grid
        error = (grid.widen(grid.round(weight_NGg, scheme)) - weight_NGg).square_()
        if importance_Gg is not None:
            error *= importance_Gg
        total = error.sum(-1)
        if best is None:
            best, least_error = grid, total
            continue
        better = total < least_error
        least_error = torch.where(better, total, least_error)
        zero = None if best.zero is None or grid.zero is None else torch.where(better, grid.zero, best.zero)
        best = Grid(torch.where(better, grid.scale, best.scale), zero)
    assert best is not None
    return best


def _grid(lowest: torch.Tensor, highest: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
    if scheme.symmetric:
        scale = torch.maximum(-lowest, highest) / scheme.most
    else:
        scale = (highest - lowest) / (scheme.most - scheme.least)
    if scheme.symmetric:
        return Grid(scale.clamp_min(LEAST_SCALE).to(scale_dtype).float(), None)
    # Kernels and GGUF keep a group's minimum, scale times up to 15, as a half: with scales of 7 bits it is exact.
    mantissa, exponent = torch.frexp(scale.clamp_min(LEAST_SCALE))
    scale = torch.ldexp(torch.round(mantissa * 2**_ZERO_SCALE_BITS), exponent - _ZERO_SCALE_BITS)
    zero = torch.clamp(torch.round(scheme.least - lowest / scale), scheme.least, scheme.most)
    return Grid(scale, zero.to(torch.int8))


def round_to_nearest(
    weight_NK: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype = torch.float32,
    importance_K: torch.Tensor | None = None,
    *,
    search: bool = True,
) -> RoundedWeight:
    """Round every weight to the nearest point of its group's grid.

    Args:
        weight_NK: float32 [N, K].
        scheme: the integers.
        scale_dtype: that scales are kept in.
        importance_K: float32 [K], see `choose_grid`.
        search: see `choose_grid`.

    Returns:
        The integers.

    Raises:
        ConfigError: K is not a whole number of groups.
    """
    rows, inputs = weight_NK.shape
    width = scheme.width(inputs)
    groups = weight_NK.reshape(rows, inputs // width, width)
    importance = None if importance_K is None else importance_K.view(-1, width)
    grid = choose_grid(groups, scheme, scale_dtype, importance, search=search)
    return RoundedWeight(grid.round(groups, scheme).to(torch.int8).view(rows, inputs), grid)
