"""`dseek::linear`: the product with a packed weight as a PyTorch operator.

The blob describes itself, so the operator is a plain function of two tensors and `torch.compile` and `torch.export`
see it with a schema and a shape. Import this module to register the operator.
"""

from __future__ import annotations

import struct

import torch

from dseek.ops import native

_HEADER = struct.Struct("<8I")  # magic, version, format, n, k, n_padded, k_padded, interleaved


@torch.library.custom_op("dseek::linear", mutates_args=(), device_types="cpu")
def linear(x: torch.Tensor, blob: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Multiply rows by a packed weight.

    Args:
        x: float32 [M, K], on the CPU.
        blob: uint8, from `dseek.ops.linear.packing.pack`.
        num_channels: N, the weight's output channels; told here so that tracing knows the shape.

    Returns:
        float32 [M, N].

    Raises:
        ValueError: the blob is none, or has other sizes.
        ConfigError: there are no native kernels.
    """
    if blob.numel() < _HEADER.size or _HEADER.unpack_from(blob[: _HEADER.size].numpy().tobytes())[3] != num_channels:
        raise ValueError(f"the packed weight does not have {num_channels} output channels")
    product = native.require().linear(x.detach().contiguous().numpy(), blob.numpy())
    return torch.from_numpy(product).contiguous()


@linear.register_fake
def _(x: torch.Tensor, blob: torch.Tensor, num_channels: int) -> torch.Tensor:
    return x.new_empty((x.shape[0], num_channels))
