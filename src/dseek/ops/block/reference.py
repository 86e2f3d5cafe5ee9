"""One decoder block in plain PyTorch, with the roundings of the packed formats.

T tokens of one sequence from position 0, D hidden size, H query heads, G key-value heads, d head width, F MLP width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dseek.ops.attention.reference import causal_attention
from dseek.ops.attention.rotary import rotate
from dseek.ops.linear.reference import linear
from dseek.ops.norm.reference import rms_norm


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTensors:
    """Weights of one block before packing, float32."""

    qkv: torch.Tensor
    """[(H + 2 G) d, D]."""
    output: torch.Tensor
    """[D, H d]."""
    gate_up: torch.Tensor
    """[2 F, D], gate first."""
    down: torch.Tensor
    """[D, F]."""
    input_norm: torch.Tensor
    """[D]."""
    post_attention_norm: torch.Tensor
    """[D]."""


def decoder_block(
    x_TD: torch.Tensor,
    tensors: BlockTensors,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    weight_format: str = "f32",
) -> torch.Tensor:
    """Run one block over one sequence.

    Args:
        x_TD: float32 [T, D].
        tensors: the block's weights.
        cos: float32 [T, d / 2].
        sin: float32 [T, d / 2].
        num_heads: H.
        num_kv_heads: G.
        eps: of both norms.
        weight_format: rounding of weights and activations, for many rows.

    Returns:
        float32 [T, D]. Source: Touvron et al. 2023, LLaMA, section 2.2.
    """
    head_dim = 2 * cos.shape[1]

    def project(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear(rows, weight, weight_format, few_rows=False)

    qkv = project(rms_norm(x_TD, tensors.input_norm, eps), tensors.qkv).view(len(x_TD), -1, head_dim)
    q_THd, k_TGd, v_TGd = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    mixed = causal_attention(rotate(q_THd, cos, sin), rotate(k_TGd, cos, sin), v_TGd)
    x_TD = x_TD + project(mixed.reshape(len(x_TD), -1), tensors.output)
    gate, up = project(rms_norm(x_TD, tensors.post_attention_norm, eps), tensors.gate_up).chunk(2, dim=1)
    return x_TD + project(torch.nn.functional.silu(gate) * up, tensors.down)
