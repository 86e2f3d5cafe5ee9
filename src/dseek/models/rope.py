"""Rotary position embedding: from a `RopeShape` to inverse frequencies and to the table of cosines and sines.

numpy only, so that the native path needs no torch. The steps round to float32 where transformers' do: an inverse
frequency that differs in its last bit turns position 8192 by 5e-4 rad, which is more than the logits may differ.

Sources: Su et al. 2021, RoFormer, section 3.4 (default); Chen et al. 2023, Position Interpolation, section 2.3
(linear); bloc97 2023, NTK-aware scaled RoPE (dynamic); Peng et al. 2023, YaRN, sections 3.2 to 3.4 (yarn); Grattafiori
et al. 2024, The Llama 3 Herd of Models, section 3.4.2, and its reference code (llama3).
"""

from __future__ import annotations

import math

import numpy as np

from dseek.core.shape import ModelShape, RopeShape

_CHUNK_POSITIONS = 4096


def rope_table(
    shape: ModelShape, num_positions: int, context_tokens: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Tabulate the rotation of every position.

    Args:
        shape: the model.
        num_positions: rows of the table, positions 0 to num_positions - 1.
        context_tokens: length of the text, which only the dynamic kind looks at: beyond `original_positions` it lowers
            the frequencies. None means no longer than that.

    Returns:
        Cosine and sine, each float32 [num_positions, head_dim / 2], with the attention factor multiplied in. Column i
        turns elements i and i + head_dim / 2 of a head.
    """
    assert num_positions >= 0, "a table cannot have fewer than no rows"
    frequencies, attention_factor = inverse_frequencies(shape, context_tokens)
    cos = np.empty((num_positions, frequencies.size), dtype=np.float32)
    sin = np.empty_like(cos)
    for first in range(0, num_positions, _CHUNK_POSITIONS):
        rows = slice(first, min(first + _CHUNK_POSITIONS, num_positions))
        positions = np.arange(rows.start, rows.stop, dtype=np.float32)
        # The angle rounds to float32; its cosine and sine are then as exact as float32 allows.
        angles = np.multiply.outer(positions, frequencies).astype(np.float64)
        cos[rows] = np.cos(angles)
        sin[rows] = np.sin(angles)
    if attention_factor != 1.0:
        cos *= np.float32(attention_factor)
        sin *= np.float32(attention_factor)
    return cos, sin


def inverse_frequencies(shape: ModelShape, context_tokens: int | None = None) -> tuple[np.ndarray, float]:
    """Give the angle by which each pair of a head turns from one position to the next.

    Args:
        shape: the model.
        context_tokens: see `rope_table`.

    Returns:
        float32 [head_dim / 2] in radians a position, and the factor that multiplies cosines and sines.
    """
    rope = shape.rope
    if rope.frequency_divisors is not None:
        divisors = np.asarray(rope.frequency_divisors, dtype=np.float32)
        return _plain(rope.theta, shape.head_dim) / divisors, 1.0
    if rope.kind == "linear":
        return _plain(rope.theta, shape.head_dim) / np.float32(rope.factor), 1.0
    if rope.kind == "dynamic":
        return _plain(_dynamic_theta(shape, context_tokens), shape.head_dim), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, shape.head_dim, original_positions(shape)), yarn_attention_factor(rope)
    if rope.kind == "llama3":
        return _llama3(rope, shape.head_dim, original_positions(shape)), 1.0
    assert rope.kind == "default", f"unknown rotary kind {rope.kind}"
    return _plain(rope.theta, shape.head_dim), 1.0


def original_positions(shape: ModelShape) -> int:
    """Length the model was pretrained at, before its context was extended.

    Args:
        shape: the model.

    Returns:
        A number of positions.
    """
    return shape.rope.original_max_position_embeddings or shape.max_position_embeddings


def yarn_attention_factor(rope: RopeShape) -> float:
    """Give yarn's correction of the attention temperature, to be multiplied into cosines and sines.

    Args:
        rope: a rotary embedding of kind yarn.

    Returns:
        The stored factor, or the one that follows from `factor` and, where both are set, the two mscale values.
        Source: Peng et al. 2023, YaRN, section 3.4.
    """
    if rope.attention_factor is not None:
        return rope.attention_factor

    def temperature(mscale: float) -> float:
        return 1.0 if rope.factor <= 1.0 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


def _periods(theta: float | np.float32, head_dim: int) -> np.ndarray:
    """theta ** (2 i / head_dim), float32: the power itself in double, its operands and result in single."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.power(np.float64(np.float32(theta)), exponents.astype(np.float64)).astype(np.float32)


def _plain(theta: float | np.float32, head_dim: int) -> np.ndarray:
    return np.float32(1.0) / _periods(theta, head_dim)


def _dynamic_theta(shape: ModelShape, context_tokens: int | None) -> np.float32:
    limit = original_positions(shape)
    tokens = limit if context_tokens is None else max(context_tokens, limit)
    factor = shape.rope.factor
    stretch = np.float32(factor) * np.float32(tokens) / np.float32(limit) - np.float32(factor - 1.0)
    exponent = shape.head_dim / (shape.head_dim - 2)
    return np.float32(np.float32(shape.rope.theta) * np.float32(float(stretch) ** exponent))


def _yarn(rope: RopeShape, head_dim: int, original: int) -> np.ndarray:
    def dimension_of(num_rotations: float) -> float:
        """The (fractional) dimension that turns so many times within the pretraining length."""
        return head_dim * math.log(original / (num_rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    # 1. The ramp from dimensions left alone (fast) to dimensions interpolated (slow).
    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = np.float32(1.0) - np.clip(ramp, np.float32(0.0), np.float32(1.0))
    # 2. Mix the two series along it.
    periods = _periods(rope.theta, head_dim)
    extrapolated = np.float32(1.0) / periods
    interpolated = np.float32(1.0) / (np.float32(rope.factor) * periods)
    mixed: np.ndarray = interpolated * (np.float32(1.0) - kept) + extrapolated * kept
    return mixed


def _llama3(rope: RopeShape, head_dim: int, original: int) -> np.ndarray:
    frequencies = _plain(rope.theta, head_dim)
    wavelengths = (np.float32(1.0) / frequencies) * np.float32(2 * math.pi)
    divided = frequencies / np.float32(rope.factor)
    # Between the two wavelengths the scaling sets in smoothly.
    turns = (np.float32(1.0) / wavelengths) * np.float32(original)
    smooth = (turns - np.float32(rope.low_freq_factor)) / np.float32(rope.high_freq_factor - rope.low_freq_factor)
    mixed = (np.float32(1.0) - smooth) * frequencies / np.float32(rope.factor) + smooth * frequencies
    is_long = wavelengths > np.float32(original / rope.low_freq_factor)
    is_short = wavelengths < np.float32(original / rope.high_freq_factor)
    return np.where(is_long, divided, np.where(is_short, frequencies, mixed)).astype(np.float32)
