"""`dseek::integer_conv`: convolution of integers as a PyTorch operator, on the native kernels.

Import this module to register the operator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dseek.ops import native
from dseek.ops.conv.packing import PackedConv


@torch.library.custom_op("dseek::integer_conv", mutates_args=(), device_types="cpu")
def _integer_conv(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    steps: torch.Tensor | None,
    weight_shape: Sequence[int],
    geometry: Sequence[int],
    groups: int,
    low: int,
    high: int,
) -> torch.Tensor:
    kernels = native.require()
    pixels = x.detach().permute(0, 2, 3, 1).contiguous()
    out = torch.empty(_result_shape(x, weight_shape, geometry))
    if len(x) == 0:
        return out.permute(0, 3, 1, 2)
    find = steps is None
    own = torch.empty(len(x)) if steps is None else steps.detach().float().reshape(-1).expand(len(x)).contiguous()
    # Unsigned integers are multiplied with 127 taken away, which makes them fit the signed products of every kernel.
    integers = (low, high, max(0, high - 127))
    numbers = [*weight_shape[2:], *geometry]
    shift = None if bias is None else bias.detach().float().contiguous().numpy()
    if scale is None:
        kernels.integer_conv(
            pixels.numpy(), data.numpy(), groups, numbers, own.numpy(), find, integers, shift, out.numpy()
        )
    else:
        kernels.depthwise_conv(
            pixels.numpy(), data.numpy(), scale.numpy(), numbers, own.numpy(), find, integers, shift, out.numpy()
        )
    return out.permute(0, 3, 1, 2)


@_integer_conv.register_fake
def _(x, data, scale, bias, steps, weight_shape, geometry, groups, low, high):  # type: ignore[no-untyped-def]
    return x.new_empty(_result_shape(x, weight_shape, geometry)).permute(0, 3, 1, 2)


def _result_shape(x: torch.Tensor, weight_shape: Sequence[int], geometry: Sequence[int]) -> tuple[int, ...]:
    stride_y, stride_x, dilation_y, dilation_x, top, bottom, left, right = geometry
    height = (x.shape[2] + top + bottom - dilation_y * (weight_shape[2] - 1) - 1) // stride_y + 1
    width = (x.shape[3] + left + right - dilation_x * (weight_shape[3] - 1) - 1) // stride_x + 1
    return (x.shape[0], max(0, height), max(0, width), weight_shape[0])


def integer_conv(
    x: torch.Tensor,
    weight: PackedConv,
    bias: torch.Tensor | None,
    steps: torch.Tensor | None,
    *,
    integers: tuple[int, int] = (-127, 127),
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
) -> torch.Tensor:
    """Convolve by a packed weight; records no gradient.

    Args:
        x: float32 [B, C, H, W], in any memory format; channels last is read without a copy.
        weight: of `dseek.ops.conv.packing.pack_conv`.
        bias: float32 [N], or None.
        steps: float32 [B] or [1] of the inputs; None takes each sample's own, by its largest magnitude.
        integers: least and largest that inputs are rounded to; at most 255 of them, -127 or more.
        stride, dilation: down and across.
        padding: zeros at the top, bottom, left and right.

    Returns:
        float32 [B, N, OH, OW], channels last in memory.

    Raises:
        ValueError: sizes that do not fit.
        ConfigError: there are no native kernels.
    """
    geometry = [*stride, *dilation, *padding]
    if len(geometry) != 8 or min(geometry[:4]) < 1 or min(geometry[4:]) < 0 or x.dim() != 4:
        raise ValueError(
            f"images of {x.dim()} dimensions, stride {stride}, dilation {dilation}, padding {padding}; "
            "needed: [B, C, H, W], two numbers from 1 on, two from 1 on, four from 0 on"
        )
    if steps is not None and steps.numel() not in (1, len(x)):
        raise ValueError(f"{steps.numel()} steps for {len(x)} samples; needed: one, or one each")
    product: torch.Tensor = _integer_conv(
        x, weight.data, weight.scale, bias, steps, list(weight.shape), geometry, weight.groups, *integers
    )
    return product
