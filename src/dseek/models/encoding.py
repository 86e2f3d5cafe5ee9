"""Widens stored weights to float32: the reference for the native packers, and the way into the torch module.

The simple encodings are written out here in numpy; the K-quants (two levels of scales in blocks of 256) use the `gguf`
package, imported only then.

Source: block layouts in ggml, `ggml-common.h`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dseek.core.errors import UnsupportedModelError
from dseek.ops.tensor import BLOCK_SIZES, CHANNEL_ENCODING, EncodedTensor


def to_float32(tensor: EncodedTensor) -> np.ndarray:
    """Widen a tensor to float32.

    Args:
        tensor: any encoding of `BLOCK_SIZES`, or `CHANNEL_ENCODING`.

    Returns:
        float32, of the tensor's shape; exact for F32, F16 and BF16, and for the others the value the encoding stands
        for.

    Raises:
        UnsupportedModelError: an unknown encoding.
    """
    if tensor.encoding == CHANNEL_ENCODING:
        return _widen_channels(tensor.data.reshape(tensor.shape[0], -1))
    if tensor.encoding not in BLOCK_SIZES:
        raise UnsupportedModelError(
            f"tensor {tensor.name} is encoded as {tensor.encoding}", needed="one of " + ", ".join(BLOCK_SIZES)
        )
    _, block_bytes = BLOCK_SIZES[tensor.encoding]
    blocks = tensor.data.reshape(-1, block_bytes)
    widen = _WIDEN.get(tensor.encoding)
    values = widen(blocks) if widen is not None else _widen_with_gguf(blocks, tensor.encoding)
    return values.reshape(tensor.shape)


def _halves(blocks: np.ndarray, start: int) -> np.ndarray:
    """float32 [blocks, 1] from two bytes of each block."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(blocks: np.ndarray, start: int) -> np.ndarray:
    """uint8 [blocks, 32]: the low halves of 16 bytes, then the high ones."""
    packed = blocks[:, start : start + 16]
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(blocks: np.ndarray, start: int) -> np.ndarray:
    """uint8 [blocks, 32]: 32 bits, each as 0 or 16."""
    bits = np.unpackbits(np.ascontiguousarray(blocks[:, start : start + 4]), axis=1, bitorder="little")
    return bits << 4


def _widen_f32(blocks: np.ndarray) -> np.ndarray:
    return np.array(blocks.reshape(-1), copy=True).view("<f4").astype(np.float32, copy=False)


def _widen_f16(blocks: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(blocks).reshape(-1).view("<f2").astype(np.float32)


def _widen_bf16(blocks: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(blocks).reshape(-1).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _widen_q8_0(blocks: np.ndarray) -> np.ndarray:
    return _halves(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _widen_q4_0(blocks: np.ndarray) -> np.ndarray:
    return _halves(blocks, 0) * (_nibbles(blocks, 2).astype(np.float32) - 8)


def _widen_q4_1(blocks: np.ndarray) -> np.ndarray:
    return _halves(blocks, 0) * _nibbles(blocks, 4).astype(np.float32) + _halves(blocks, 2)


def _widen_q5_0(blocks: np.ndarray) -> np.ndarray:
    return _halves(blocks, 0) * ((_nibbles(blocks, 6) | _fifth_bits(blocks, 2)).astype(np.float32) - 16)


def _widen_q5_1(blocks: np.ndarray) -> np.ndarray:
    values = (_nibbles(blocks, 8) | _fifth_bits(blocks, 4)).astype(np.float32)
    return _halves(blocks, 0) * values + _halves(blocks, 2)


def _widen_channels(rows: np.ndarray) -> np.ndarray:
    scale = np.ascontiguousarray(rows[:, :4]).view("<f4")
    return scale * rows[:, 4:].view(np.int8).astype(np.float32)


def _widen_with_gguf(blocks: np.ndarray, encoding: str) -> np.ndarray:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    values: np.ndarray = dequantize(np.ascontiguousarray(blocks), GGMLQuantizationType[encoding])
    return values


_WIDEN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": _widen_f32,
    "F16": _widen_f16,
    "BF16": _widen_bf16,
    "Q8_0": _widen_q8_0,
    "Q4_0": _widen_q4_0,
    "Q4_1": _widen_q4_1,
    "Q5_0": _widen_q5_0,
    "Q5_1": _widen_q5_1,
}
