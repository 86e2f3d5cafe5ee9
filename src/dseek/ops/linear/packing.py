"""Packing of weights into the blobs that the native kernels read (layout: `ops/csrc/common/formats.h`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dseek.ops import native
from dseek.ops.tensor import CHANNEL_ENCODING, EncodedTensor

PACKED_DIRECTLY = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", CHANNEL_ENCODING)
"""Encodings that the native packer reads itself; Q8_0 is moved into i8g, Q4_0 and Q4_1 into i4g, I8_CHANNEL into
i8p without a change."""


def pack(
    weight_format: str,
    tensors: Sequence[EncodedTensor],
    widen: Callable[[EncodedTensor], np.ndarray],
    *,
    interleaved: bool = False,
) -> np.ndarray:
    """Pack weights that share their inputs, one below the other, into one blob.

    Args:
        weight_format: f32, f16, bf16, i8c, i8p, i8g or i4g.
        tensors: each [N, K] in its stored encoding.
        widen: gives a tensor's values as float32, for encodings that are not in `PACKED_DIRECTLY`.
        interleaved: alternate panels of the first and the second half of the rows (gate and up).

    Returns:
        uint8 [num_bytes].

    Raises:
        ConfigError: there are no native kernels.
        ValueError: sizes that do not fit.
    """
    pieces = []
    for tensor in tensors:
        if tensor.encoding in PACKED_DIRECTLY:
            pieces.append((tensor.encoding, tensor.shape[0], np.ascontiguousarray(tensor.data)))
        else:
            wide = np.ascontiguousarray(widen(tensor), dtype=np.float32)
            pieces.append(("F32", tensor.shape[0], wide.reshape(-1).view(np.uint8)))
    packed: np.ndarray = native.require().pack_encoded(weight_format, pieces, tensors[0].shape[1], interleaved)
    return packed


def interleave(bias: np.ndarray) -> np.ndarray:
    """Order a joined gate and up bias as the panels of an interleaved weight are.

    Args:
        bias: float32 [2 F], gate first.

    Returns:
        float32 [2 * ceil(F / 16) * 16], padded with zeros.
    """
    half = len(bias) // 2
    panels = -(-half // 16)
    padded = np.zeros((2, panels * 16), dtype=np.float32)
    padded[:, :half] = bias.reshape(2, half)
    return np.ascontiguousarray(padded.reshape(2, panels, 16).transpose(1, 0, 2).reshape(-1))


def pad(bias: np.ndarray) -> np.ndarray:
    """Lengthen a bias to whole panels.

    Args:
        bias: float32 [N].

    Returns:
        float32 [ceil(N / 16) * 16].
    """
    return np.pad(bias.astype(np.float32, copy=False), (0, -len(bias) % 16))
