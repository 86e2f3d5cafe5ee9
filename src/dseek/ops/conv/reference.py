"""What a convolution of integers computes, in plain PyTorch. B samples, C channels, N output channels, H x W pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

LEAST_STEP = torch.finfo(torch.float32).tiny


def dynamic_steps(x: torch.Tensor, high: int) -> torch.Tensor:
    """Step of each sample by its largest magnitude.

    Args:
        x: float32 [B, ...].
        high: the largest integer.

    Returns:
        float32 [B].
    """
    return (x.abs().amax(tuple(range(1, x.dim()))) / high).clamp_min(LEAST_STEP)


def round_inputs(x: torch.Tensor, steps: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Round to whole steps, halves to even, and clip.

    Args:
        x: float32 [B, ...].
        steps: float32 [B], above zero.
        low, high: least and largest integer.

    Returns:
        Integers in float32, of x's shape.
    """
    return (x / steps.view(-1, *(1,) * (x.dim() - 1))).round().clamp(low, high)


def integer_conv(
    x: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    steps: torch.Tensor | None,
    *,
    integers: tuple[int, int] = (-127, 127),
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> torch.Tensor:
    """Convolve.

    Args:
        x: float32 [B, C, H, W].
        values: int8 [N, C / groups, KH, KW].
        scale: float32 [N].
        bias: float32 [N], or None.
        steps: float32 [B] of the inputs; None takes each sample's own (`dynamic_steps`).
        integers: least and largest that inputs are rounded to.
        stride, dilation: down and across.
        padding: zeros at the top, bottom, left and right.
        groups: of channels.

    Returns:
        float32 [B, N, OH, OW]: steps * scale * (integers convolved, exactly) + bias.
    """
    if steps is None:
        steps = dynamic_steps(x, integers[1])
    rounded = round_inputs(x, steps, *integers)
    top, bottom, left, right = padding
    padded = F.pad(rounded.double(), (left, right, top, bottom))
    exact = F.conv2d(padded, values.double(), None, tuple(stride), 0, tuple(dilation), groups)
    product = exact.float() * (steps.view(-1, 1, 1, 1) * scale.view(1, -1, 1, 1))
    return product if bias is None else product + bias.view(1, -1, 1, 1)
