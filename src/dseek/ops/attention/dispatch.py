"""`dseek::causal_attention`: dense causal attention of bf16 tensors as a PyTorch operator.

The kernel is the one that reads the paged cache; this door lays a sequence out in pages first. Import this module to
register the operator.
"""

from __future__ import annotations

import torch

from dseek.ops import native
from dseek.ops.attention import reference


@torch.library.custom_op("dseek::causal_attention", mutates_args=(), device_types="cpu")
def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend from each position to itself and everything before it.

    Args:
        q: bfloat16 [H, T, d], on the CPU; d is a multiple of 16 up to 512.
        k: like `q`.
        v: like `q`.

    Returns:
        bfloat16 [H, T, d]; softmax of q k^T / sqrt(d) over the visible keys, times v.

    Raises:
        ValueError: shapes that differ, or another head width.
    """
    compiled = native.module()
    if compiled is None:
        q_THd, k_THd, v_THd = (tensor.transpose(0, 1) for tensor in (q, k, v))
        return reference.causal_attention(q_THd, k_THd, v_THd).transpose(0, 1).contiguous()
    views = [tensor.detach().contiguous().view(torch.uint16).numpy() for tensor in (q, k, v)]
    return torch.from_numpy(compiled.dense_attention(*views)).view(torch.bfloat16)


@causal_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(q)
