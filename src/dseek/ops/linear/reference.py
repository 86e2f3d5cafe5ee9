"""What a linear layer over a packed weight computes, in plain PyTorch.

Each format is a rounding of the weight and a rounding of the activations; between them stands an exact product. M rows,
K inputs, N output channels.
"""

from __future__ import annotations

import math

import torch

GROUP = 32
_LARGEST_RUN = 64  # registers of sixteen values, as in ops/csrc/common/rotation.h


def hadamard(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Build Sylvester's orthonormal Hadamard matrix.

    Args:
        size: a power of two.
        dtype: of the result.

    Returns:
        [size, size]. Source: Sylvester 1867; H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt(2).
    """
    matrix = torch.ones(1, 1, dtype=dtype)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / math.sqrt(size)


def rotate(x_MK: torch.Tensor) -> torch.Tensor:
    """Apply the block-diagonal Hadamard rotation of the i8c format to each row.

    The row, padded to a multiple of 16, is cut into runs of 2^p registers of sixteen values, the longest first; each
    run is multiplied by the Hadamard matrix of its size.

    Args:
        x_MK: [M, K].

    Returns:
        [M, ceil(K / 16) * 16]. Source: Ashkboos et al. 2024, QuaRot, section 4 (the idea of rotating outliers away).
    """
    x = torch.nn.functional.pad(x_MK, (0, -x_MK.shape[1] % 16))
    parts, start, left = [], 0, x.shape[1] // 16
    while left:
        run = min(1 << (left.bit_length() - 1), _LARGEST_RUN)
        block = x[:, start : start + run * 16].reshape(-1, run, 16)
        block = torch.einsum("rs,msl->mrl", hadamard(run, x.dtype), block) @ hadamard(16, x.dtype)
        parts.append(block.reshape(-1, run * 16))
        start += run * 16
        left -= run
    return torch.cat(parts, 1)


def round_rows(x_MK: torch.Tensor) -> torch.Tensor:
    """Round each row to int8 with one symmetric scale, and back.

    Args:
        x_MK: [M, K].

    Returns:
        [M, K], values of scale * {-127 .. 127}, scale = max |row| / 127.
    """
    scale = (x_MK.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(x_MK.dtype).tiny)
    return torch.round(x_MK / scale) * scale


def round_groups(x_MK: torch.Tensor) -> torch.Tensor:
    """Round every 32 neighbouring values to int8 with one symmetric scale, and back.

    Args:
        x_MK: [M, K]; the last group may be short.

    Returns:
        [M, K].
    """
    rows, inputs = x_MK.shape
    padded = torch.nn.functional.pad(x_MK, (0, -inputs % GROUP))
    return round_rows(padded.reshape(-1, GROUP)).reshape(rows, -1)[:, :inputs]


def round_weight(weight_NK: torch.Tensor, weight_format: str) -> torch.Tensor:
    """Round a weight as packing does.

    Args:
        weight_NK: float32 [N, K].
        weight_format: f32, f16, bf16, i8c, i8p, i8g or i4g.

    Returns:
        float32 [N, K]; for i8c [N, ceil(K / 16) * 16], still rotated.
    """
    if weight_format == "f32":
        return weight_NK
    if weight_format == "f16":
        return weight_NK.half().float()
    if weight_format == "bf16":
        return weight_NK.bfloat16().float()
    if weight_format == "i8c":
        return round_rows(rotate(weight_NK))
    if weight_format == "i8p":
        return round_rows(weight_NK)
    rows, inputs = weight_NK.shape
    groups = torch.nn.functional.pad(weight_NK, (0, -inputs % GROUP)).reshape(-1, GROUP)
    if weight_format == "i8g":
        scale = (groups.abs().amax(-1, keepdim=True) / 127).half().float()
        rounded = torch.round(groups / scale.clamp_min(1e-30)).clamp(-127, 127) * scale
    elif weight_format == "i4g":
        least, largest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale, minimum = ((largest - least) / 15).half().float(), least.half().float()
        rounded = torch.round((groups - minimum) / scale.clamp_min(1e-30)).clamp(0, 15) * scale + minimum
    else:
        raise ValueError(f"unknown weight format {weight_format!r}")
    return rounded.reshape(rows, -1)[:, :inputs]


def linear(x_MK: torch.Tensor, weight_NK: torch.Tensor, weight_format: str, *, few_rows: bool) -> torch.Tensor:
    """Multiply by a weight in one of the packed formats.

    Args:
        x_MK: float32 [M, K].
        weight_NK: float32 [N, K], before rounding.
        weight_format: f32, f16, bf16, i8c, i8p, i8g or i4g.
        few_rows: whether grouped formats take int8 activations (few rows) or widen the weight to bf16 (many).

    Returns:
        float32 [M, N].
    """
    weight = round_weight(weight_NK, weight_format)
    if weight_format in ("f32", "f16"):
        rounded = x_MK
    elif weight_format == "i8c":
        rounded = round_rows(rotate(x_MK))
    elif weight_format == "i8p":
        rounded = round_rows(x_MK)
    elif weight_format == "bf16" or not few_rows:
        rounded, weight = x_MK.bfloat16().float(), weight.bfloat16().float()
    else:
        rounded = round_groups(x_MK)
    return (rounded.double() @ weight.double().T).float()
