"""Convolving an input that is constant on blocks: kernels over the blocks' means, one for each phase of the output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def axis_taps(kernel: int, stride: int, dilation: int, before: int, factor: int) -> list[list[int]]:
    """Say which block each tap of each output phase reads.

    Output o reads the input at o s - p + t d for tap t, that is block floor((o s - p + t d) / r). With
    P = r / gcd(s, r) and o = P a + phase, this is a (P s / r) plus a number that depends on the phase and the tap only.

    Args:
        kernel: taps, k.
        stride: s.
        dilation: d.
        before: zeros in front of the input, p.
        factor: pixels of a block, r.

    Returns:
        For each of the P phases, the block of each tap, relative to a (P s / r).
    """
    phases = factor // math.gcd(stride, factor)
    return [[(phase * stride - before + tap * dilation) // factor for tap in range(kernel)] for phase in range(phases)]


@dataclass(slots=True)
class Phase:
    """The kernel over blocks that some phases of the output share."""

    weight: torch.Tensor
    start: tuple[int, int]
    """Block of the first tap, relative to the output's."""
    places: list[tuple[int, int]]
    """Phases that it computes."""


@dataclass(slots=True)
class Kernels:
    """What is derived from a weight, and which one it was."""

    source: torch.Tensor
    """The weight."""
    version: int | None
    """Its version counter then; None where it has none."""
    low: list[Phase]
    """Of the low part; at full resolution one, with the convolution's own kernel."""
    high: torch.Tensor
    """Of the rest."""
    phases: tuple[int, int]
    """Phases of the output's rows and columns."""
    steps: tuple[int, int]
    """Blocks from one output of a phase to the next."""


def gather_taps(weight: torch.Tensor, taps: Sequence[int], axis: int) -> torch.Tensor:
    """Sum the taps of an axis that fall into the same block.

    Args:
        weight: [O, C, k, k].
        taps: block of each tap.
        axis: 2 for rows, 3 for columns.

    Returns:
        The kernel over blocks, from the first one that is read.
    """
    first = min(taps)
    size = list(weight.shape)
    size[axis] = max(taps) - first + 1
    index = torch.tensor(taps, device=weight.device) - first
    return weight.new_zeros(size).index_add(axis, index, weight)


def add_phases(
    out: torch.Tensor | None, means: torch.Tensor, kernels: Kernels, size: tuple[int, int], groups: int
) -> torch.Tensor:
    """Add the convolution of the low part, phase by phase.

    Args:
        out: float32 [N, O, H, W] to add to (is left as it is), or None.
        means: [N, C, ceil(H / r), ceil(W / r)] in the dtype of the kernels.
        kernels: of the phases.
        size: H and W of the output.
        groups: of the convolution.

    Returns:
        float32 [N, O, H, W].
    """
    height, width = size
    counts = (-(-height // kernels.phases[0]), -(-width // kernels.phases[1]))
    products = [_phase_outputs(means, phase, kernels.steps, counts, groups) for phase in kernels.low]
    whole = counts[0] * kernels.phases[0] == height and counts[1] * kernels.phases[1] == width
    if len(products) == 1 and whole and out is not None:
        return spread(out, products[0], kernels.phases)
    wide = products[0].new_empty((*products[0].shape[:2], counts[0], kernels.phases[0], counts[1], kernels.phases[1]))
    for phase, product in zip(kernels.low, products, strict=True):
        for i, j in phase.places:
            wide[:, :, :, i, :, j] = product
    full = wide.flatten(4, 5).flatten(2, 3)[..., :height, :width]
    return full if out is None else out + full


def _phase_outputs(
    means: torch.Tensor, phase: Phase, steps: tuple[int, int], counts: tuple[int, int], groups: int
) -> torch.Tensor:
    """Outputs of one phase, float32; padding is cut or added so that there are exactly `counts` of them."""
    room: list[int] = []
    for axis in (1, 0):
        taps = phase.weight.shape[2 + axis]
        end = (counts[axis] - 1) * steps[axis] + phase.start[axis] + taps
        room += [-phase.start[axis], end - means.shape[2 + axis]]
    padded = F.pad(means, room) if any(room) else means
    return F.conv2d(padded, phase.weight, None, steps, 0, 1, groups).float()


def spread(x: torch.Tensor, blocks: torch.Tensor, factor: int | tuple[int, int]) -> torch.Tensor:
    """Add to every pixel its block's value.

    Args:
        x: [N, C, H, W], whole blocks.
        blocks: [N, C, H / r, W / r].
        factor: block side r, or those of rows and columns.

    Returns:
        [N, C, H, W].
    """
    rows, columns = (factor, factor) if isinstance(factor, int) else factor
    sizes = (*x.shape[:2], x.shape[2] // rows, rows, x.shape[3] // columns, columns)
    return (x.reshape(sizes) + blocks[:, :, :, None, :, None]).reshape(x.shape)


def whole_blocks(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Append zeros until blocks fit.

    Args:
        x: [N, C, H, W].
        factor: block side.

    Returns:
        `x`, or a longer copy.
    """
    below, right = -x.shape[2] % factor, -x.shape[3] % factor
    return F.pad(x, (0, right, 0, below)) if below or right else x
