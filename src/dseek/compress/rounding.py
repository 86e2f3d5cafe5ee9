"""Runs a `Decoder` with some of its projections in a narrower format, as the kernels would compute them.

Each projection named is replaced, for the time of a `with` block, by one that multiplies the rounded inputs by the
rounded weights in float32: what `dseek.ops.linear.reference` defines, without its sums in double precision, whose own
rounding is orders of magnitude below that of any format but f32.

The formats in groups of 32 round their inputs in two ways: to int8 groups where few rows are multiplied, as while an
answer is written, and to bf16 in long prompts. `few_rows` says which; the first loses more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from dseek.models.decoder import Decoder
from dseek.models.tensor_names import ROLE_MODULES
from dseek.ops.linear.reference import rotate, round_groups, round_rows, round_weight

Formats = Mapping[tuple[int, str], str]
"""Weight formats by layer and role; projections that are not named stay as they are."""


def round_inputs(x_RK: torch.Tensor, weight_format: str, *, few_rows: bool = True) -> torch.Tensor:
    """Round the inputs of a projection as the kernels do before they multiply.

    Args:
        x_RK: float32 [R, K].
        weight_format: f32, f16, bf16, i8c, i8p, i8g or i4g.
        few_rows: whether formats in groups take int8 groups of inputs or bf16.

    Returns:
        float32 [R, K]; for i8c [R, ceil(K / 16) * 16], still rotated.
    """
    if weight_format in ("f32", "f16"):
        return x_RK
    if weight_format == "i8c":
        return round_rows(rotate(x_RK))
    if weight_format == "i8p":
        return round_rows(x_RK)
    if weight_format == "bf16" or not few_rows:
        return x_RK.bfloat16().float()
    return round_groups(x_RK)


class RoundedLinear(nn.Module):
    """A linear layer in one of the packed formats.

    Args:
        linear: the layer, in float32; it is not changed.
        weight_format: see `round_inputs`.
        few_rows: see `round_inputs`.
    """

    def __init__(self, linear: nn.Linear, weight_format: str, *, few_rows: bool = True) -> None:
        super().__init__()
        self.weight_format, self.few_rows = weight_format, few_rows
        with torch.no_grad():
            weight_NK = round_weight(linear.weight.detach().float(), weight_format)
            if weight_format in ("i8g", "i4g") and not few_rows:
                weight_NK = weight_NK.bfloat16().float()
        self.weight_NK = weight_NK
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply rows `x`, [..., K]; gives [..., N]."""
        rounded = round_inputs(x.reshape(-1, x.shape[-1]), self.weight_format, few_rows=self.few_rows)
        return F.linear(rounded, self.weight_NK, self.bias).reshape(*x.shape[:-1], -1)


@contextmanager
def rounded(decoder: Decoder, formats: Formats, *, few_rows: bool = True) -> Iterator[None]:
    """Put projections of a model into formats while a `with` block runs.

    Args:
        decoder: the model, in float32; it is as it was afterwards.
        formats: which projections, and how.
        few_rows: see `round_inputs`.
    """
    before: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for (layer, role), weight_format in formats.items():
            if weight_format == "f32":
                continue
            for path in ROLE_MODULES[role]:
                parent_name, name = path.split(".")
                parent = decoder.model.layers[layer].get_submodule(parent_name)
                linear = parent.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                before.append((parent, name, linear))
                setattr(parent, name, RoundedLinear(linear, weight_format, few_rows=few_rows))
        yield
    finally:
        for parent, name, linear in before:
            setattr(parent, name, linear)
