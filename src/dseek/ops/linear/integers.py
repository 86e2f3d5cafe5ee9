"""Weights that are integers already: values and scales that a quantiser chose, as tensors that packing moves unchanged.

One scale an output channel becomes the encoding `I8_CHANNEL`, which the format i8p holds as it is. Scales of groups
become the blocks of GGUF (Q8_0, Q4_0, Q4_1), which i8g and i4g hold as they are; a group of 64 or 128 is several blocks
of 32 with the same scale. Those blocks keep scales as halves: a scale that is none is rounded to one, by 2^-11 of it at
most, and one that is too large or too small for that is refused.
"""

from __future__ import annotations

import numpy as np

from dseek.ops.tensor import EncodedTensor

BLOCK = 32
"""Inputs of a block; groups are whole blocks."""
_HALF_ERROR = 2.0**-11


def channel_integers(name: str, values: np.ndarray, scale: np.ndarray) -> EncodedTensor:
    """Encode int8 weights with one scale an output channel.

    Args:
        name: of the tensor.
        values: int8 [N, K].
        scale: float32 [N]; the weight is scale times value.

    Returns:
        The tensor, `I8_CHANNEL`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a scale that is not finite.
    """
    if values.dtype != np.int8 or values.ndim != 2 or scale.shape != values.shape[:1]:
        raise ValueError(
            f"{name}: {values.dtype} {values.shape} with scales {scale.shape}; needed: int8 [N, K] and [N]"
        )
    if not np.isfinite(scale).all():
        raise ValueError(f"{name}: the scale of channel {int(np.argmin(np.isfinite(scale)))} is not finite")
    rows = np.empty((values.shape[0], values.shape[1] + 4), dtype=np.uint8)
    rows[:, :4] = np.ascontiguousarray(scale, dtype="<f4").view(np.uint8).reshape(-1, 4)
    rows[:, 4:] = values.view(np.uint8)
    return EncodedTensor(name, values.shape, "I8_CHANNEL", rows.reshape(-1))


def group_integers(
    name: str, values: np.ndarray, scale: np.ndarray, *, num_bits: int, zero_point: np.ndarray | None = None
) -> EncodedTensor:
    """Encode weights of 8 or 4 bits with a scale, and for 4 bits perhaps a zero point, for every group of inputs.

    Args:
        name: of the tensor.
        values: int8 [N, K], from -128 to 127 (8 bits), from -8 to 7 (4 bits).
        scale: float32 [N, G], of groups of K / G inputs, a multiple of 32.
        num_bits: 8 or 4.
        zero_point: int8 [N, G] in the range of the values; the weight is scale * (value - zero point). None: zero.

    Returns:
        The tensor: Q8_0, Q4_0, or Q4_1 where there are zero points. Q4_1's minimum is scale * (-8 - zero point),
        rounded to a half.

    Raises:
        ValueError: shapes or dtypes that do not fit, values out of range, zero points with 8 bits, or a scale that a
            half does not hold to 2^-11 of it.
    """
    num_rows, num_inputs = values.shape
    num_groups = scale.shape[1] if scale.ndim == 2 else 0
    if values.dtype != np.int8 or scale.shape[0] != num_rows or num_groups == 0 or num_inputs % (BLOCK * num_groups):
        raise ValueError(
            f"{name}: {values.dtype} {values.shape} with scales {scale.shape}; needed: int8 [N, K] and [N, G], "
            f"groups of a multiple of {BLOCK} inputs"
        )
    least, most = (-8, 7) if num_bits == 4 else (-128, 127)
    if num_bits not in (4, 8) or (num_bits == 8 and zero_point is not None):
        raise ValueError(f"{name}: {num_bits} bits; needed: 4, or 8 without zero points")
    if values.min(initial=0) < least or values.max(initial=0) > most:
        raise ValueError(f"{name}: values from {values.min()} to {values.max()}; needed: {least} to {most}")
    repeats = num_inputs // BLOCK // num_groups
    halves = np.repeat(_halves(name, scale), repeats, axis=1)
    blocks = values.reshape(num_rows, -1, BLOCK)
    parts: list[np.ndarray] = [halves[:, :, None].view(np.uint8)]
    if zero_point is not None:
        if zero_point.shape != scale.shape or zero_point.min(initial=0) < least or zero_point.max(initial=0) > most:
            raise ValueError(f"{name}: zero points {zero_point.shape}; needed: {scale.shape}, {least} to {most}")
        minimum = _halves(name, scale * (least - zero_point.astype(np.float32)))
        parts.append(np.repeat(minimum, repeats, axis=1)[:, :, None].view(np.uint8))
    if num_bits == 8:
        parts.append(blocks.view(np.uint8))
    else:
        nibbles: np.ndarray = (blocks + np.int8(8)).view(np.uint8)
        parts.append(nibbles[:, :, : BLOCK // 2] | nibbles[:, :, BLOCK // 2 :] << 4)
    encoding = "Q8_0" if num_bits == 8 else "Q4_0" if zero_point is None else "Q4_1"
    return EncodedTensor(name, values.shape, encoding, np.concatenate(parts, axis=2).reshape(-1))


def _halves(name: str, values: np.ndarray) -> np.ndarray:
    """float16 of `values`, refused where the rounding loses more than a normal half's own."""
    with np.errstate(over="ignore", invalid="ignore"):
        halves = values.astype("<f2")
        good = np.abs(halves.astype(np.float32) - values) <= _HALF_ERROR * np.abs(values)
    if not good.all():
        found = float(values.reshape(-1)[int(np.argmin(good))])
        raise ValueError(f"{name}: a scale or minimum is {found:g}; needed: one that a half holds to 2^-11 of it")
    return halves
