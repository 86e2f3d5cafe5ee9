"""`dseek::decoder_block`: one packed block over one sequence, as a PyTorch operator.

Import this module to register the operator.
"""

from __future__ import annotations

import numpy as np
import torch

from dseek.ops import native

PAGE_TOKENS = 64


@torch.library.custom_op("dseek::decoder_block", mutates_args=(), device_types="cpu")
def decoder_block(
    x: torch.Tensor,
    qkv: torch.Tensor,
    output: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    input_norm: torch.Tensor,
    post_attention_norm: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    eps: float,
    cache_dtype: str,
) -> torch.Tensor:
    """Run one decoder block over one sequence that starts at position 0.

    Args:
        x: float32 [T, D], on the CPU; D is a multiple of 16.
        qkv: packed weight of (H + 2 G) d channels.
        output: packed weight of D channels.
        gate_up: packed weight of 2 F channels, interleaved.
        down: packed weight of D channels.
        input_norm: float32 [D].
        post_attention_norm: float32 [D].
        cos: float32 [T, d / 2].
        sin: float32 [T, d / 2].
        num_heads: H.
        num_kv_heads: G.
        intermediate_size: F.
        eps: of both norms.
        cache_dtype: fp32, bf16 or int8; how keys and values are held.

    Returns:
        float32 [T, D].

    Raises:
        ValueError: sizes that do not fit.
        ConfigError: there are no native kernels.
    """
    decoder = native.require().Decoder(
        hidden_size=x.shape[1],
        intermediate_size=intermediate_size,
        num_layers=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=2 * cos.shape[1],
        vocab_size=1,
        epsilon=eps,
        cache_type=cache_dtype,
    )
    arrays = {"qkv": qkv, "output": output, "gate_up": gate_up, "down": down}
    arrays |= {"input_norm": input_norm, "post_attention_norm": post_attention_norm}
    decoder.add_block(**{name: _array(tensor) for name, tensor in arrays.items()})
    decoder.set_rotary(_array(cos), _array(sin))
    num_pages = -(-len(x) // PAGE_TOKENS)
    decoder.allocate_cache(num_pages)
    positions = np.arange(len(x), dtype=np.int32)
    row_starts = np.array([0, len(x)], dtype=np.int32)
    pages = np.arange(num_pages, dtype=np.int32)[None]
    return torch.from_numpy(decoder.run_blocks(_array(x), positions, row_starts, pages, 0, 1))


def _array(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().contiguous().numpy()
    return array


@decoder_block.register_fake
def _(
    x: torch.Tensor,
    qkv: torch.Tensor,
    output: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    input_norm: torch.Tensor,
    post_attention_norm: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    eps: float,
    cache_dtype: str,
) -> torch.Tensor:
    return torch.empty_like(x)
