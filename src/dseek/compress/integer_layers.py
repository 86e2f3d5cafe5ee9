"""Linear and convolution layers that hold integers and run on the integer kernels: what `convert` makes.

Where there are no kernels, or the tensors are on another device, the same integers are multiplied by PyTorch. No layer
here has a gradient. Each keeps its integers beside the packed copy that the kernels read, so that its state is what a
file holds: int8 `values`, float32 `scale` (and int8 `zero_point`), `bias`, `input_step`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dseek.compress.qat_rounding import integer_range
from dseek.compress.qat_steps import GROUP, MOST_ROWS_IN_GROUPS, dynamic_step
from dseek.ops import native
from dseek.ops.conv.dispatch import integer_conv
from dseek.ops.conv.packing import PackedConv, pack_conv
from dseek.ops.linear.dispatch import linear
from dseek.ops.linear.integers import channel_integers, group_integers
from dseek.ops.linear.packing import pack


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """How a converted layer rounds its inputs and what its integers mean."""

    weight_bits: int
    """2 to 8."""
    group_size: int | None
    """Inputs that share a scale; None is a whole channel."""
    activations: str
    """dynamic, static, or none: then the weight is widened and multiplied in float."""
    activation_bits: int
    """2 to 8."""
    unsigned: bool
    """Whether static inputs are rounded to integers from zero on."""

    @property
    def integers(self) -> tuple[int, int]:
        """Least and largest integer of the inputs."""
        return integer_range(self.activation_bits, unsigned=self.unsigned)


class IntegerLayer(torch.nn.Module):
    """What both kinds share; a base class only, whose children pack when they are made.

    Args:
        scheme: how to round.
        values: int8 [N, ...].
        scale: float32 [N], or [N, G] of groups.
        zero_point: int8 [N, G] of groups that are not symmetric, else None.
        bias: float32 [N], or None.
        input_step: float32 scalar of static activations, else None.
    """

    values: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    bias: torch.Tensor | None
    input_step: torch.Tensor | None
    _packed: torch.Tensor | PackedConv | None

    def __init__(
        self,
        scheme: Scheme,
        values: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        bias: torch.Tensor | None,
        input_step: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.register_buffer("values", values.contiguous())
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("bias", bias)
        self.register_buffer("input_step", input_step)

    def pack(self) -> None:
        """Lay the integers out for the kernels, where there are any."""
        raise NotImplementedError

    def wide_weight(self) -> torch.Tensor:
        """Return the weight as floats, float32."""
        if self.scheme.group_size is None:
            return self.values.float() * self.scale.view(-1, *(1,) * (self.values.dim() - 1))
        padded = F.pad(self.values, (0, -self.values.shape[1] % self.scheme.group_size))
        groups = padded.unflatten(1, (self.scale.shape[1], -1)).float()
        rounded = groups * self.scale[:, :, None]
        if self.zero_point is not None:
            minimum = (self.scale * (-8 - self.zero_point.float())).half().float()
            rounded = (groups + 8) * self.scale[:, :, None] + minimum[:, :, None]
        return rounded.flatten(1)[:, : self.values.shape[1]]

    def _runs_natively(self, x: torch.Tensor) -> bool:
        return self._packed is not None and x.device.type == "cpu" and self.values.device.type == "cpu"

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.pack()


class IntegerLinear(IntegerLayer):
    """y = x W^T + b over integers; see `IntegerLayer` for the arguments.

    Args:
        scheme, values, scale, zero_point, bias, input_step: of `IntegerLayer`; values are [N, K].
    """

    def __init__(
        self,
        scheme: Scheme,
        values: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        bias: torch.Tensor | None,
        input_step: torch.Tensor | None,
    ) -> None:
        super().__init__(scheme, values, scale, zero_point, bias, input_step)
        self.pack()

    def pack(self) -> None:
        """Lay the integers out for the kernels, where there are any."""
        self._packed = None
        if native.module() is None or self.values.device.type != "cpu" or self.scheme.activations == "none":
            return
        if self.scheme.group_size is not None:
            self._packed = torch.from_numpy(self._pack_groups())
        elif self._by_token:
            encoded = channel_integers("weight", self.values.numpy(), self.scale.numpy())
            self._packed = torch.from_numpy(pack("i8p", [encoded], lambda tensor: np.empty(0)))
        else:
            self._packed = pack_conv(self.values[:, :, None, None], self.scale, 1)

    @property
    def _by_token(self) -> bool:
        """Whether inputs are rounded as the linear kernel does by itself."""
        return self.scheme.activations == "dynamic" and self.scheme.activation_bits == 8

    def _pack_groups(self) -> np.ndarray:
        """Groups in blocks of 32; a short last group is filled with integers that meet zeros."""
        values, scale, zero_point = self.values, self.scale, self.zero_point
        group = self.scheme.group_size
        assert group is not None
        values = F.pad(values, (0, -values.shape[1] % group))
        encoded = group_integers(
            "weight",
            values.numpy(),
            scale.numpy(),
            num_bits=self.scheme.weight_bits,
            zero_point=None if zero_point is None else zero_point.numpy(),
        )
        return pack("i8g" if self.scheme.weight_bits == 8 else "i4g", [encoded], lambda tensor: np.empty(0))

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply; `x` is [..., K]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        num_outputs = self.values.shape[0]
        if not self._runs_natively(x) or len(rows) == 0:
            out = self._in_torch(rows)
        elif isinstance(self._packed, PackedConv):
            step = None if self.input_step is None else self.input_step.reshape(1)
            out = integer_conv(
                rows[:, :, None, None], self._packed, self.bias, step, integers=self.scheme.integers
            ).flatten(1)
            return out.reshape(*x.shape[:-1], num_outputs).to(x.dtype)
        else:
            assert isinstance(self._packed, torch.Tensor)
            if self.scheme.group_size is not None:
                rows = F.pad(rows, (0, -rows.shape[1] % self.scheme.group_size))
            out = linear(rows, self._packed, num_outputs)
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(*x.shape[:-1], num_outputs).to(x.dtype)

    def _in_torch(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply [M, K] without kernels, no bias added."""
        if self.scheme.activations == "none":
            return F.linear(rows, self.wide_weight())
        if self.scheme.group_size is not None:
            return F.linear(_round_by_groups(rows), self.wide_weight())
        low, high = self.scheme.integers
        step = dynamic_step(rows, (-1,), high) if self.input_step is None else self.input_step
        integers = (rows / step).round().clamp(low, high)
        return F.linear(integers, self.values.float()) * (step * self.scale)

    def extra_repr(self) -> str:
        """Sizes and scheme."""
        return f"{self.values.shape[1]}, {self.values.shape[0]}, {self.scheme}"


def _round_by_groups(rows: torch.Tensor) -> torch.Tensor:
    """Round inputs of grouped weights as the kernels do."""
    if len(rows) > MOST_ROWS_IN_GROUPS:
        return rows.bfloat16().float()
    groups = F.pad(rows, (0, -rows.shape[1] % GROUP)).unflatten(-1, (-1, GROUP))
    step = dynamic_step(groups, (-1,), 127)
    return ((groups / step).round() * step).flatten(-2)[:, : rows.shape[1]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvGeometry:
    """Where a convolution's kernel goes; of one dimension the first numbers are 1 and 0."""

    stride: tuple[int, int]
    """Down and across."""
    padding: tuple[int, int, int, int]
    """Top, bottom, left and right."""
    dilation: tuple[int, int]
    """Down and across."""
    groups: int
    """Of channels."""
    padding_mode: str
    """zeros, reflect, replicate or circular."""
    num_dims: int
    """1 or 2."""

    @classmethod
    def of(cls, layer: torch.nn.modules.conv._ConvNd) -> ConvGeometry:
        """Read it off a `layer`."""
        dims = len(layer.kernel_size)
        # As F.pad wants it: the last dimension first. "same" may need more behind than in front.
        pads = list(layer._reversed_padding_repeated_twice) + [0, 0] * (2 - dims)
        return cls(
            stride=_pair(layer.stride, 1),
            padding=(pads[2], pads[3], pads[0], pads[1]),
            dilation=_pair(layer.dilation, 1),
            groups=layer.groups,
            padding_mode=layer.padding_mode,
            num_dims=dims,
        )


def _pair(numbers: tuple[int, ...], missing: int) -> tuple[int, int]:
    """Two numbers from one or two."""
    return (missing, numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


class IntegerConv(IntegerLayer):
    """A convolution of one or two dimensions over integers.

    Args:
        scheme, values, scale, bias, input_step: of `IntegerLayer`; values are [N, C / groups, ...].
        geometry: where the kernel goes.
    """

    def __init__(
        self,
        scheme: Scheme,
        values: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        input_step: torch.Tensor | None,
        geometry: ConvGeometry,
    ) -> None:
        super().__init__(scheme, values, scale, None, bias, input_step)
        self.geometry = geometry
        self.pack()

    def pack(self) -> None:
        """Lay the integers out for the kernels, where there are any."""
        self._packed = None
        if native.module() is None or self.values.device.type != "cpu" or self.scheme.activations == "none":
            return
        values = self.values if self.geometry.num_dims == 2 else self.values[:, :, None]
        self._packed = pack_conv(values, self.scale, self.geometry.groups)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve; `x` is [B, C, ...] or [C, ...]."""
        geometry = self.geometry
        if x.dim() < geometry.num_dims + 2:
            return self.forward(x[None])[0]
        images = x.float() if geometry.num_dims == 2 else x.float()[:, :, None]
        top, bottom, left, right = geometry.padding
        steps = None if self.input_step is None else self.input_step.reshape(1)
        if geometry.padding_mode != "zeros":
            # What is repeated was there before, so that the largest magnitude, and the step with it, stays.
            if geometry.num_dims == 1:
                images = F.pad(images[:, :, 0], (left, right), geometry.padding_mode)[:, :, None]
            else:
                images = F.pad(images, (left, right, top, bottom), geometry.padding_mode)
            top = bottom = left = right = 0
        if self._runs_natively(x):
            assert isinstance(self._packed, PackedConv)
            out = integer_conv(
                images,
                self._packed,
                self.bias,
                steps,
                integers=self.scheme.integers,
                stride=geometry.stride,
                padding=(top, bottom, left, right),
                dilation=geometry.dilation,
            )
        else:
            out = self._in_torch(images, steps, (left, right, top, bottom))
        return (out if geometry.num_dims == 2 else out[:, :, 0]).to(x.dtype)

    def _own_steps(self, images: torch.Tensor) -> torch.Tensor:
        """Dynamic steps [B]."""
        return dynamic_step(images, (1, 2, 3), self.scheme.integers[1]).flatten()

    def _in_torch(self, images: torch.Tensor, steps: torch.Tensor | None, pads: tuple[int, ...]) -> torch.Tensor:
        """Convolve without kernels."""
        geometry, channels = self.geometry, (1, -1, 1, 1)
        values = self.values if geometry.num_dims == 2 else self.values[:, :, None]
        if self.scheme.activations == "none":
            weight = values.float() * self.scale.view(-1, 1, 1, 1)
            return F.conv2d(
                F.pad(images, pads), weight, self.bias, geometry.stride, 0, geometry.dilation, geometry.groups
            )
        if steps is None:
            steps = self._own_steps(images)
        step = steps.view(-1, 1, 1, 1)
        integers = F.pad((images / step).round().clamp(*self.scheme.integers), pads)
        product = F.conv2d(integers, values.float(), None, geometry.stride, 0, geometry.dilation, geometry.groups)
        product = product * (step * self.scale.view(channels))
        return product if self.bias is None else product + self.bias.view(channels)

    def extra_repr(self) -> str:
        """Sizes and scheme."""
        return f"{tuple(self.values.shape)}, {self.geometry}, {self.scheme}"
