"""`FrequencySplitConv2d`: a convolution that treats the slow and the fast part of its input apart.

A convolution is linear, so conv(x) = conv(low) + conv(x - low). Here `low` is constant on blocks of r x r pixels: their
mean. The convolution of such an input needs no pixel of it twice: written by phases of the output it is a convolution
of the means alone, with kernels whose taps are summed where they fall into the same block, and that is exact, for
strides, padding, dilation and groups as well. What is left, x - low, is orthogonal to `low`.

Two things can be done with that. Where both terms are kept (`terms`), only rounding is lost, and either term may be the
one in 16 bits. Where the fast part of some channels is dropped (`channels`, as in Chen et al. 2019, Drop an Octave),
their product costs 1 / r^2 of the work, and what they held above the blocks' frequency is lost. `frequency_split`
chooses.

What it does not know: the module takes and gives full resolution, so that neighbours need not know of it; an octave
network that stays at low resolution between layers would save the pooling and the widening, and has to be trained.
N images, C input and O output channels, H and W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from dseek.compress.frequency_split_phases import (
    Kernels,
    Phase,
    add_phases,
    axis_taps,
    gather_taps,
    spread,
    whole_blocks,
)
from dseek.core.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of the dtypes of the parts."""

UNIT_ROUNDOFF = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
"""Largest relative error of one rounding to nearest. Source: Higham 2002, Accuracy and Stability, section 2.1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """How one convolution is split."""

    kind: Literal["terms", "channels"]
    """terms: all channels, both parts of each. channels: of the low channels the blocks' means alone."""
    factor: int
    """Pixels of a block's side; 1 is full resolution, where only the dtype differs."""
    low_channels: tuple[int, ...]
    """Input channels that have a low part, rising; all of them for `terms`."""
    low_dtype: str = "bf16"
    """Of the part at reduced resolution."""
    high_dtype: str = "fp32"
    """Of the rest."""

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as plain values, for JSON."""
        return dataclasses.asdict(self)


class FrequencySplitConv2d(nn.Module):
    """A convolution with the parameters of another one, computed in two parts.

    Args:
        convolution: a plain `nn.Conv2d`; its parameters are shared, under the same names in the state dict.
        split: which part of which channels.

    Kernels of the parts are derived from `weight` when it has changed; with gradients enabled they are derived anew at
    every call, so that `weight` can be trained.

    Raises:
        ConfigError: the split does not fit the convolution.
    """

    _low_index: torch.Tensor
    _high_index: torch.Tensor

    def __init__(self, convolution: nn.Conv2d, split: Split) -> None:
        super().__init__()
        _check(convolution, split)
        self.weight = convolution.weight
        self.bias = convolution.bias
        self.split = split
        self.stride = _pair(convolution.stride)
        self.dilation = _pair(convolution.dilation)
        self.groups = convolution.groups
        self.padding_mode = convolution.padding_mode
        self.padding = _padding(convolution)
        """Zeros before and after the rows, and before and after the columns."""
        chosen = set(split.low_channels)
        others = [channel for channel in range(convolution.in_channels) if channel not in chosen]
        self._all_low = not others
        self.register_buffer("_low_index", torch.tensor(split.low_channels, dtype=torch.int64), persistent=False)
        self.register_buffer("_high_index", torch.tensor(others, dtype=torch.int64), persistent=False)
        self._kernels: Kernels | None = None
        self.train(convolution.training)

    def extra_repr(self) -> str:
        """Describe the split for `print`."""
        outputs, inputs, *kernel = self.weight.shape
        split = self.split
        return (
            f"{inputs * self.groups}, {outputs}, kernel_size={tuple(kernel)}, stride={self.stride}, {split.kind} "
            f"1/{split.factor}, {len(split.low_channels)} low channels in {split.low_dtype}, rest in {split.high_dtype}"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve `x`, float32 [N, C, H, W] or [C, H, W], and give float32 of the convolution's size."""
        if x.dim() == 3:
            return self.forward(x[None])[0]
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, (*padding[2:], *padding[:2]), mode=self.padding_mode), (0, 0, 0, 0)
        size = self._output_size(x, padding)
        kernels = self._current_kernels()
        split = self.split

        # 1. Means of the blocks, of the low channels. Zeros up to whole blocks are zeros that padding would bring.
        blocks = whole_blocks(x, split.factor)
        low = blocks if self._all_low else blocks.index_select(1, self._low_index)
        means = (F.avg_pool2d(low, split.factor) if split.factor > 1 else low).to(DTYPES[split.low_dtype])

        # 2. The rest: what the means leave (of the rounded ones, so that their rounding is made good), or the other
        #    channels as they are.
        out: torch.Tensor | None = None
        if split.kind == "terms":
            rest = low - means.float() if split.factor == 1 else spread(low, -means.float(), split.factor)
            out = self._plain(rest, kernels.high, split.high_dtype, padding)[..., : size[0], : size[1]]
        elif not self._all_low:
            out = self._plain(x.index_select(1, self._high_index), kernels.high, split.high_dtype, padding)

        # 3. The low part on top.
        if split.factor == 1:
            product = self._plain(means, kernels.low[0].weight, split.low_dtype, padding)
            out = product if out is None else out + product
        else:
            out = add_phases(out, means, kernels, size, self.groups)
        return out if self.bias is None else out + self.bias[:, None, None]

    def low_products(self) -> float:
        """Count the products of the low part for one value of the output, on average.

        A phase has one in P of the outputs in each direction, and phases that share a kernel are computed once.
        """
        kernels = self._current_kernels()
        taps = sum(phase.weight[0].numel() for phase in kernels.low)
        return taps / (kernels.phases[0] * kernels.phases[1])

    def error_bound(self, x: torch.Tensor) -> torch.Tensor:
        """Bound the difference from the exact convolution, element by element.

        With |W| * |x| for the convolution of magnitudes, u_l and u_h the unit roundoffs of the parts, n products a sum,
        g(n) = n u / (1 - n u) for sums in fp32 (u = 2^-24):

        - `channels`: |W_L| * |x_L - low| is lost (aliasing: the exact residual, no estimate).
        - A low part in 16 bits: its weights, and for `channels` its inputs, are rounded, and so is its sum:
          ((1 + u_l)^3 - 1) |W_L| * |low|, plus g(n + 4) of the same; the r^2 values of a mean are summed in fp32.
        - The rest likewise with u_h and |x - low|; in fp32 only g(n) remains.

        Source: Higham 2002, Accuracy and Stability of Numerical Algorithms, sections 2.2 and 3.1, for linear operators.

        Args:
            x: float32 [N, C, H, W].

        Returns:
            float64, of the output's size.
        """
        split, weight = self.split, self.weight.detach().double().abs()
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, (*padding[2:], *padding[:2]), mode=self.padding_mode), (0, 0, 0, 0)
        height, width = self._output_size(x, padding)
        exact = whole_blocks(x.detach().double(), split.factor)
        is_low = torch.zeros(x.shape[1], 1, 1, dtype=torch.bool)
        is_low[list(split.low_channels)] = True

        def means(values: torch.Tensor) -> torch.Tensor:
            blocks = F.avg_pool2d(values, split.factor)
            wide = blocks.repeat_interleave(split.factor, 2).repeat_interleave(split.factor, 3)
            return torch.where(is_low, wide, 0.0)

        magnitude, rest = means(exact).abs(), (exact - means(exact)).abs()
        averaged = means(exact.abs())  # magnitudes where the blocks are summed, in fp32

        def convolved(values: torch.Tensor) -> torch.Tensor:
            padded = F.pad(values, (*padding[2:], *padding[:2]))
            wide = F.conv2d(padded, weight, None, self.stride, 0, self.dilation, self.groups)
            return wide[..., :height, :width]

        products = weight[0].numel() + 4
        bound = _rounding(split.low_dtype, products) * convolved(magnitude)
        bound = bound + _gamma(split.factor**2 + 2) * convolved(averaged)
        if split.kind == "channels":
            dropped, kept = torch.where(is_low, rest, 0.0), torch.where(is_low, 0.0, rest)
            bound = bound + convolved(dropped) + _rounding(split.high_dtype, products) * convolved(kept)
        else:
            # The rest also takes up the rounding of the means.
            rest = rest + UNIT_ROUNDOFF[split.low_dtype] * magnitude
            bound = bound + (_rounding(split.high_dtype, products) + _gamma(2)) * convolved(rest)
        return bound + _gamma(3) * (convolved(magnitude + rest) + self._bias_size())

    def _bias_size(self) -> torch.Tensor | float:
        return 0.0 if self.bias is None else self.bias.detach().double().abs()[:, None, None]

    def _output_size(self, x: torch.Tensor, padding: Sequence[int]) -> tuple[int, int]:
        sizes = [
            (x.shape[2 + axis] + sum(padding[2 * axis : 2 * axis + 2]) - self.dilation[axis] * (kernel - 1) - 1)
            // self.stride[axis]
            + 1
            for axis, kernel in enumerate(self.weight.shape[2:])
        ]
        return sizes[0], sizes[1]

    def _plain(self, x: torch.Tensor, weight: torch.Tensor, dtype: str, padding: Sequence[int]) -> torch.Tensor:
        """Convolve at full resolution in a dtype; gives float32."""
        if padding[0] == padding[1] and padding[2] == padding[3]:
            around: tuple[int, int] = (padding[0], padding[2])
        else:
            x, around = F.pad(x, (*padding[2:], *padding[:2])), (0, 0)
        return F.conv2d(x.to(DTYPES[dtype]), weight, None, self.stride, around, self.dilation, self.groups).float()

    def _current_kernels(self) -> Kernels:
        """The parts' kernels, derived again where `weight` is not what they were derived from."""
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return self._derive()
        version = None if self.weight.is_inference() else self.weight._version
        kernels = self._kernels
        if kernels is None or kernels.source is not self.weight or kernels.version != version:
            with torch.no_grad():
                kernels = self._derive()
            kernels.version = version
            self._kernels = kernels
        return kernels

    def _derive(self) -> Kernels:
        split = self.split
        low = self.weight if self._all_low else self.weight.index_select(1, self._low_index)
        rest = self.weight if split.kind == "terms" else self.weight.index_select(1, self._high_index)
        padding = (0, 0, 0, 0) if self.padding_mode != "zeros" else self.padding
        height, width = self.weight.shape[2:]
        rows = axis_taps(height, self.stride[0], self.dilation[0], padding[0], split.factor)
        columns = axis_taps(width, self.stride[1], self.dilation[1], padding[2], split.factor)
        phases: list[Phase] = []
        if split.factor == 1:
            phases.append(Phase(low.to(DTYPES[split.low_dtype]), (0, 0), [(0, 0)]))
        else:
            by_taps: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[int, int]]] = {}
            for i, row_taps in enumerate(rows):
                for j, column_taps in enumerate(columns):
                    by_taps.setdefault((tuple(row_taps), tuple(column_taps)), []).append((i, j))
            for (row_taps_, column_taps_), places in by_taps.items():
                summed = gather_taps(gather_taps(low, row_taps_, 2), column_taps_, 3)
                start = (min(row_taps_), min(column_taps_))
                phases.append(Phase(summed.to(DTYPES[split.low_dtype]), start, places))
        steps = (len(rows) * self.stride[0] // split.factor, len(columns) * self.stride[1] // split.factor)
        high = rest.to(DTYPES[split.high_dtype])
        return Kernels(self.weight, None, phases, high, (len(rows), len(columns)), steps)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kernels": None}  # derived again where it is needed


def _gamma(count: int) -> float:
    """n u / (1 - n u) for fp32."""
    product = count * UNIT_ROUNDOFF["fp32"]
    return product / (1 - product)


def _rounding(dtype: str, products: int) -> float:
    """Relative bound of a sum whose factors and result are rounded to a dtype."""
    narrow = 0.0 if dtype == "fp32" else (1 + UNIT_ROUNDOFF[dtype]) ** 3 - 1
    return narrow + (1 + narrow) * _gamma(products)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _padding(convolution: nn.Conv2d) -> tuple[int, int, int, int]:
    """Padding before and after the rows, before and after the columns."""
    kernel, dilation = _pair(convolution.kernel_size), _pair(convolution.dilation)
    if convolution.padding == "same":
        totals = [dilation[axis] * (kernel[axis] - 1) for axis in range(2)]
        return totals[0] // 2, totals[0] - totals[0] // 2, totals[1] // 2, totals[1] - totals[1] // 2
    if isinstance(convolution.padding, str):
        return 0, 0, 0, 0
    rows, columns = _pair(convolution.padding)
    return rows, rows, columns, columns


def _check(convolution: nn.Conv2d, split: Split) -> None:
    """Refuse a split that the convolution cannot have."""
    channels = convolution.in_channels
    if split.factor < 1:
        raise ConfigError(f"factor {split.factor} of a frequency split", needed="a whole number from 1 on")
    for dtype in (split.low_dtype, split.high_dtype):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} of a frequency split", needed="one of " + ", ".join(DTYPES))
    if split.kind not in ("terms", "channels"):
        raise ConfigError(f"kind {split.kind!r} of a frequency split", needed="terms or channels")
    low = split.low_channels
    if not low or list(low) != sorted(set(low)) or low[0] < 0 or low[-1] >= channels:
        raise ConfigError("low channels of a frequency split", needed=f"rising indices from 0 to {channels - 1}")
    if len(low) < channels and (split.kind == "terms" or convolution.groups > 1):
        raise ConfigError(
            f"{len(low)} low channels of {channels}", needed="all of them, for split terms and for grouped convolutions"
        )
    if convolution.weight.dtype != torch.float32:
        raise ConfigError(f"a convolution in {convolution.weight.dtype}", needed="float32 weights")
