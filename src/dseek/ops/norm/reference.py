"""RMSNorm in plain PyTorch: the oracle of the native kernel, and what runs where there is none."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale each row to unit root mean square, then by a learned weight.

    Args:
        x: [..., D], any floating dtype; the statistics are taken in float32.
        weight: [D].
        eps: added to the mean of squares.

    Returns:
        [..., D] in the dtype of `x` (of `weight`, where that is wider).
        Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, equation 4.
    """
    x_float = x.float()
    scale = torch.rsqrt(x_float.square().mean(dim=-1, keepdim=True) + eps)
    return weight * (x_float * scale).to(x.dtype)
