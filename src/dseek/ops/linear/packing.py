"""Packing of weights into the blobs that the native kernels read (layout: `ops/csrc/common/formats.h`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dseek.core.errors import ConfigError, FileFormatError
from dseek.core.logs import get_logger
from dseek.ops import native
from dseek.ops.tensor import CHANNEL_ENCODING, EncodedTensor

PACKED_DIRECTLY = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", CHANNEL_ENCODING)
"""Encodings that the native packer reads itself; Q8_0 is moved into i8g, Q4_0 and Q4_1 into i4g, I8_CHANNEL into
i8p without a change."""

_log = get_logger(__name__)
_HOLDS = {
    "f16": "magnitudes up to 65504",
    "bf16": "magnitudes up to 3.39e38",
    "i8c": "magnitudes up to 1.3e36",
    "i8g": "magnitudes up to 8.3e6",
    "i4g": "magnitudes up to 65504, and ranges of a group up to 15 times that",
}


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

    Values that the format clips by more than half a step, or whose group is too small for a scale, are counted in a
    warning.

    Raises:
        ConfigError: there are no native kernels, or a value would become infinite in the format.
        FileFormatError: a value is not a finite number.
        ValueError: sizes that do not fit.
    """
    pieces = []
    for tensor in tensors:
        if tensor.encoding in PACKED_DIRECTLY:
            pieces.append((tensor.encoding, tensor.shape[0], np.ascontiguousarray(tensor.data)))
        else:
            wide = np.ascontiguousarray(widen(tensor), dtype=np.float32)
            pieces.append(("F32", tensor.shape[0], wide.reshape(-1).view(np.uint8)))
    packed: np.ndarray
    packed, findings = native.require().pack_inspected(weight_format, pieces, tensors[0].shape[1], interleaved)
    for kind, count, row, column, value in findings:
        _tell(kind, count, tensors, row, column, value, weight_format)
    return packed


def check_finite(name: str, values: np.ndarray) -> np.ndarray:
    """Refuse values that are not finite numbers.

    Args:
        name: of the tensor, for the message.
        values: of floats.

    Returns:
        The same values.

    Raises:
        FileFormatError: there is a NaN or an infinity; names the first one.
    """
    if np.isfinite(values).all():
        return values
    bad = ~np.isfinite(values)
    place = tuple(int(index) for index in np.argwhere(bad)[0])
    raise _not_finite(name, int(bad.sum()), place, float(values[place]))


def _tell(
    kind: str, count: int, tensors: Sequence[EncodedTensor], row: int, column: int, value: float, weight_format: str
) -> None:
    """Refuse, or warn of, what packing met; `row` counts through all tensors."""
    owner = 0
    while row >= tensors[owner].shape[0]:
        row -= tensors[owner].shape[0]
        owner += 1
    name, place = tensors[owner].name, (row, column)
    if kind == "not finite":
        raise _not_finite(name, count, place, value)
    if kind == "overflow":
        raise ConfigError(
            f"tensor {name} holds {value:g} at {list(place)}, which {weight_format} cannot hold ({count} in all)",
            needed=_HOLDS[weight_format],
            remedy="choose a wider precision, such as bf16 or fp32",
        )
    if kind == "clipped":
        _log.warning(
            "%d values are clipped in %s by more than half a step, the first at %s in %s",
            count,
            weight_format,
            place,
            name,
        )
    else:
        _log.warning(
            "%d groups of 32 are too small for a scale in %s and become one value each, the first at %s in %s",
            count,
            weight_format,
            place,
            name,
        )


def _not_finite(name: str, count: int, place: Sequence[int], value: float) -> FileFormatError:
    others = "" if count == 1 else f", the first of {count} such values"
    return FileFormatError(
        f"tensor {name} holds {value} at {list(place)}{others}",
        needed="finite numbers",
        remedy="download or convert the model again",
    )


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
