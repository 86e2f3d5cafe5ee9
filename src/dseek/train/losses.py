"""Cross entropy of a linear head that never holds all logits: some rows at a time, gradients made on the way forward.

The gradient of a sum of cross entropies needs nothing but the logits, so each chunk's logits become its gradient where
they lie and are gone before the next chunk is computed. The head is multiplied in the forward pass alone; the backward
pass only scales. N rows, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def plain_cross_entropy(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Sum the cross entropies of all rows, from all logits at once: the reference, and quickest where they fit.

    Args:
        hidden_ND: [N, D] hidden states.
        weight_VD: [V, D] head.
        labels_N: int64 [N], each from 0 to V - 1.

    Returns:
        A scalar in float32 (float64 where the states have it).
    """
    logits_NV = F.linear(hidden_ND, weight_VD)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(logits_NV, labels_N, reduction="sum")


def chunked_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor, chunk_rows: int
) -> torch.Tensor:
    """Sum the cross entropies of all rows, `chunk_rows` at a time.

    Args:
        hidden_ND: [N, D] hidden states.
        weight_VD: [V, D] head.
        labels_N: int64 [N], each from 0 to V - 1.
        chunk_rows: rows whose logits are held at a time.

    Returns:
        A scalar in float32 (float64 where the states have it). It can be differentiated once.

    Source: Hsu et al. 2024, Liger Kernel, section 3.2 (fused linear cross entropy).
    """
    if not torch.is_grad_enabled():  # a function of our own is told what requires gradients, not whether any are wanted
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    return _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, labels_N, chunk_rows)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor, chunk_rows: int
    ) -> torch.Tensor:
        device = hidden_ND.device.type
        # Autocast does not reach into a function of our own: the products' dtype is chosen here.
        autocast = torch.is_autocast_enabled(device)
        ctx.dtype = torch.get_autocast_dtype(device) if autocast else hidden_ND.dtype
        ctx.chunk_rows, ctx.needs = chunk_rows, ctx.needs_input_grad[:2]
        total, gradients = _loss_and_gradients(hidden_ND, weight_VD, labels_N, chunk_rows, ctx.dtype, ctx.needs)
        ctx.save_for_backward(hidden_ND, weight_VD, labels_N)
        ctx.gradients = gradients
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        # They are handed out, scaled where they lie, and not kept: a copy of the head's would be as large as the head.
        # Whoever goes backward a second time has them computed again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            hidden_ND, weight_VD, labels_N = ctx.saved_tensors
            _, gradients = _loss_and_gradients(hidden_ND, weight_VD, labels_N, ctx.chunk_rows, ctx.dtype, ctx.needs)
        grad_ND, grad_VD = (None if part is None else part.mul_(grad.to(part.dtype)) for part in gradients)
        return grad_ND, grad_VD, None, None


@torch.no_grad()
def _loss_and_gradients(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    chunk_rows: int,
    dtype: torch.dtype,
    needs: tuple[bool, bool],
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """The sum, and its gradients by states and head where they are needed."""
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        head_VD = weight_VD.to(dtype)
        total = torch.zeros((), dtype=wide, device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND) if needs[0] else None
        grad_VD = torch.zeros_like(weight_VD) if needs[1] else None
        for first in range(0, len(labels_N), chunk_rows):
            rows = slice(first, first + chunk_rows)
            states_CD, labels_C = hidden_ND[rows].to(dtype), labels_N[rows]
            # One pass makes the logarithms of all probabilities, whose exponentials are the gradient.
            logs_CV = (states_CD @ head_VD.T).to(wide).log_softmax(dim=1)
            total -= logs_CV.gather(1, labels_C[:, None]).sum()
            if grad_ND is None and grad_VD is None:
                continue
            # p - 1 at the label: the gradient of log sum exp(z) - z[label].
            shares_CV = logs_CV.exp_()
            shares_CV[torch.arange(len(labels_C), device=labels_C.device), labels_C] -= 1.0
            grad_CV = shares_CV.to(dtype)
            if grad_ND is not None:
                grad_ND[rows] = grad_CV @ head_VD
            if grad_VD is not None and grad_VD.dtype == dtype:
                grad_VD.addmm_(grad_CV.T, states_CD)
            elif grad_VD is not None:
                grad_VD += grad_CV.T @ states_CD
    return total, (grad_ND, grad_VD)
