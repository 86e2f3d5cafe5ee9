"""Layout of int8 convolution weights for the kernels.

Depthwise weights (one input and one output channel a group) lie tap after tap, all channels side by side. Others are
one packed weight of the format i8p a group (`dseek.ops.linear`), whose inputs run over kernel rows, columns and
channels, as the pixels of an image do whose channels lie side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dseek.ops.linear.integers import channel_integers
from dseek.ops.linear.packing import pack

LANES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedConv:
    """A weight as the kernels read it."""

    data: torch.Tensor
    """uint8 [bytes] of all groups' blobs, or int8 [KH * KW, C padded to 16] of a depthwise weight."""
    scale: torch.Tensor | None
    """float32 [C padded to 16] of a depthwise weight; other weights have theirs inside."""
    shape: tuple[int, int, int, int]
    """N, C / groups, KH, KW."""
    groups: int
    """Of channels."""


def pack_conv(values: torch.Tensor, scale: torch.Tensor, groups: int) -> PackedConv:
    """Lay out a weight.

    Args:
        values: int8 [N, C / groups, KH, KW].
        scale: float32 [N].
        groups: of channels.

    Returns:
        The packed weight.

    Raises:
        ConfigError: there are no native kernels.
        ValueError: sizes that do not fit.
    """
    num_outputs, of_group, height, width = (int(size) for size in values.shape)
    if values.dtype != torch.int8 or scale.shape != (num_outputs,) or num_outputs % groups:
        raise ValueError(
            f"{values.dtype} {tuple(values.shape)}, scales {tuple(scale.shape)}, {groups} groups; needed: int8 "
            "[N, C / groups, KH, KW], a scale for each of N, and groups that divide N"
        )
    shape = (num_outputs, of_group, height, width)
    if of_group == 1 and num_outputs == groups:
        taps = torch.zeros(height * width, -(-num_outputs // LANES) * LANES, dtype=torch.int8)
        taps[:, :num_outputs] = values.flatten(1).T
        padded = torch.zeros(taps.shape[1])
        padded[:num_outputs] = scale
        return PackedConv(data=taps, scale=padded, shape=shape, groups=groups)
    rows = np.ascontiguousarray(values.permute(0, 2, 3, 1).reshape(num_outputs, -1).numpy())
    scales = scale.float().numpy()
    each = num_outputs // groups
    blobs = [
        pack(
            "i8p",
            [channel_integers("weight", rows[start : start + each], scales[start : start + each])],
            lambda tensor: np.empty(0),
        )
        for start in range(0, num_outputs, each)
    ]
    return PackedConv(data=torch.from_numpy(np.concatenate(blobs)), scale=None, shape=shape, groups=groups)
