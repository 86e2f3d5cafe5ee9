"""Rotary position embedding of heads in plain PyTorch; the angles come from `dseek.models.rope` or a module.

Pairs are element i and i + d/2 of a head (the layout of Hugging Face weights), not neighbours.
"""

from __future__ import annotations

import torch


def rotate(x_THd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn every pair of every head by the angle of its position.

    Args:
        x_THd: [..., T, H, d] queries or keys.
        cos: [T, d / 2], in the dtype to compute in.
        sin: [T, d / 2].

    Returns:
        The same shape; dtype by promotion of `x_THd` with `cos`.
        Source: Su et al. 2021, RoFormer, section 3.4.2.
    """
    half = x_THd.shape[-1] // 2
    first, second = x_THd[..., :half], x_THd[..., half:]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
