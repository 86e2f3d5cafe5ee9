"""`dseek::rms_norm` as a PyTorch operator. Import this module to register it."""

from __future__ import annotations

import torch

from dseek.ops import native
from dseek.ops.norm import reference


@torch.library.custom_op("dseek::rms_norm", mutates_args=(), device_types="cpu")
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale each row to unit root mean square, then by a learned weight.

    Args:
        x: float32 [T, D], on the CPU.
        weight: float32 [D].
        eps: added to the mean of squares.

    Returns:
        float32 [T, D].
    """
    compiled = native.module()
    if compiled is None:
        return reference.rms_norm(x, weight, eps)
    return torch.from_numpy(
        compiled.rms_norm(x.detach().contiguous().numpy(), weight.detach().contiguous().numpy(), eps)
    )


@rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.empty_like(x)
