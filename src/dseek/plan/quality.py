"""What a format costs in quality: the rise of perplexity over the file's own weights in fp32, as a fraction.

The figures are priors, measured once on SmolLM2-135M-Instruct, not on the user's model; they are reproduced with
`python -m benchmarks run quality-int8` and `quality-int4`, or for any model and text with `dseek eval MODEL --text FILE
--precision P` beside `--precision fp32`. Losses of weights and cache are taken to add up.

A format that holds a file's encoding exactly loses nothing: int8 groups hold Q8_0, int4 groups hold Q4_0 and Q4_1.
"""

from __future__ import annotations

from collections.abc import Mapping

from dseek.core.shape import ModelShape
from dseek.plan.formats import ENCODING_BITS, Variant

WEIGHT_LOSS: dict[str, float] = {"f32": 0.0, "f16": 0.0001, "bf16": 0.0005, "i8c": 0.004, "i8g": 0.002, "i4g": 0.08}
"""By weight format, where the file is wider."""

CACHE_LOSS: dict[str, float] = {"fp32": 0.0, "bf16": 0.0, "int8": 0.001}
"""By cache dtype."""

EXACT_ENCODINGS: dict[str, tuple[str, ...]] = {
    "f16": ("F16",),
    "bf16": ("BF16",),
    "i8g": ("Q8_0",),
    "i4g": ("Q4_0", "Q4_1"),
}
"""Encodings that a format holds without rounding a weight (f32 holds all)."""


def weight_loss(variant: Variant, shape: ModelShape, encodings: Mapping[str, int]) -> float:
    """Estimate the loss of storing a model's weights in one way.

    The loss of the format counts for the share of the projections' weights that it cannot hold exactly. Tables
    (embedding and head) are taken to be in the file's widest encodings, as quantised files have it.

    Args:
        variant: the way.
        shape: the model.
        encodings: elements in the file, by encoding.

    Returns:
        Rise of perplexity, as a fraction.
    """
    total = shape.num_layers * shape.num_block_parameters()
    elsewhere = shape.num_parameters() - total
    exact = 0
    for name, count in sorted(encodings.items(), key=lambda item: -ENCODING_BITS.get(item[0], 0)):
        in_tables = min(count, elsewhere)
        elsewhere -= in_tables
        if name in EXACT_ENCODINGS.get(variant.weight_format, ()):
            exact += count - in_tables
    return WEIGHT_LOSS[variant.weight_format] * max(0, total - exact) / total


def cache_loss(cache_dtype: str) -> float:
    """Return the loss of a cache dtype.

    Args:
        cache_dtype: fp32, bf16 or int8.
    """
    return CACHE_LOSS[cache_dtype]
