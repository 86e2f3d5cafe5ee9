"""Weight formats and cache dtypes: names, sizes in memory, and which precision uses which.

Sizes are those of the packed blobs (`ops/csrc/common/formats.h` has the layout): 16 output channels a panel, inputs
padded to a step, groups of 32 inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

WeightFormat = Literal["f32", "f16", "bf16", "i8c", "i8p", "i8g", "i4g"]
CacheDtype = Literal["fp32", "bf16", "int8"]
Precision = Literal["fp32", "bf16", "fp16", "int8", "int4", "mixed"]
Kernels = Literal["native", "torch"]

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "int8", "int4")
"""What a user may ask for; mixed is what the search may make of two of them."""

ROLES = ("qkv", "output", "gate_up", "down")
"""The projections of a block, as `ModelShape.linear_sizes` names them."""

CACHE_DTYPES: tuple[CacheDtype, ...] = ("fp32", "bf16", "int8")

_INPUT_STEPS: dict[str, int] = {"f32": 1, "f16": 1, "bf16": 32, "i8c": 64, "i8p": 64, "i8g": 32, "i4g": 32}
_VALUE_BITS: dict[str, int] = {"f32": 32, "f16": 16, "bf16": 16, "i8c": 8, "i8p": 8, "i8g": 8, "i4g": 4}
_GROUP_BYTES: dict[str, int] = {"i8g": 2, "i4g": 4}

ENCODING_BITS: dict[str, float] = {
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "Q8_0": 8.5,
    "Q4_0": 4.5,
    "Q4_1": 5,
    "Q5_0": 5.5,
    "Q5_1": 6,
    "Q4_K": 4.5,
    "Q5_K": 5.5,
    "Q6_K": 6.5625,
    "I8_CHANNEL": 8,
}
"""Bits an element in a file, block scales included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFormats:
    """Weight formats of the four projections of one decoder block."""

    qkv: WeightFormat
    """Queries, keys and values."""
    output: WeightFormat
    """After attention."""
    gate_up: WeightFormat
    """Into the gated MLP."""
    down: WeightFormat
    """Out of it."""

    @staticmethod
    def uniform(weight_format: WeightFormat) -> LayerFormats:
        """Put one `weight_format` in all four places."""
        return LayerFormats(qkv=weight_format, output=weight_format, gate_up=weight_format, down=weight_format)

    def by_role(self) -> dict[str, WeightFormat]:
        """The formats under the names of `ModelShape.linear_sizes`."""
        return {"qkv": self.qkv, "output": self.output, "gate_up": self.gate_up, "down": self.down}


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to store all weights of a model."""

    name: str
    """Shown to people; unique."""
    precision: Precision
    """The precision it belongs to."""
    weight_format: WeightFormat
    """Format of the projections."""
    table_format: WeightFormat
    """Format of the embedding and of the head."""


VARIANTS: tuple[Variant, ...] = (
    Variant(name="fp32", precision="fp32", weight_format="f32", table_format="f32"),
    Variant(name="bf16", precision="bf16", weight_format="bf16", table_format="bf16"),
    Variant(name="fp16", precision="fp16", weight_format="f16", table_format="f16"),
    Variant(name="int8, scale a channel", precision="int8", weight_format="i8c", table_format="i8g"),
    Variant(name="int8, groups of 32", precision="int8", weight_format="i8g", table_format="i8g"),
    Variant(name="int4, groups of 32", precision="int4", weight_format="i4g", table_format="i8g"),
)
"""What the search considers, widest first."""

AS_GIVEN = Variant(name="int8, scales of channels as given", precision="int8", weight_format="i8p", table_format="i8g")
"""Considered beside them where a file has such weights: without the rotation only weights made for it are any good."""

MEASURED_AS: dict[str, WeightFormat] = {"i8p": "i8c"}
"""Formats that are not measured, and whose times are taken for theirs: the kernel is the same, less a rotation."""


def variants_for(encodings: Mapping[str, int]) -> tuple[Variant, ...]:
    """List the ways to store a file's weights that are worth considering.

    Args:
        encodings: elements in the file, by encoding.

    Returns:
        The variants, widest first.
    """
    return (*VARIANTS, AS_GIVEN) if "I8_CHANNEL" in encodings else VARIANTS


def packed_bytes(weight_format: str, num_outputs: int, num_inputs: int) -> int:
    """Size of a packed weight, without its header.

    Args:
        weight_format: a `WeightFormat`.
        num_outputs: output channels, N.
        num_inputs: inputs, K.

    Returns:
        Bytes.
    """
    step = _INPUT_STEPS[weight_format]
    outputs = -(-num_outputs // 16) * 16
    inputs = -(-num_inputs // step) * step
    total = outputs * inputs * _VALUE_BITS[weight_format] // 8
    if weight_format in ("i8c", "i8p"):
        total += outputs * 8
    return total + outputs * (inputs // 32) * _GROUP_BYTES.get(weight_format, 0)


def cache_bytes_per_token(cache_dtype: str, num_kv_heads: int, head_dim: int) -> int:
    """Size of one position's keys and values in one layer's cache.

    Args:
        cache_dtype: a `CacheDtype`.
        num_kv_heads: key/value heads, G.
        head_dim: width of a head.

    Returns:
        Bytes; int8 counts a float32 scale for each head's key and value.
    """
    width = {"fp32": 4, "bf16": 2, "int8": 1}[cache_dtype]
    scale = 4 if cache_dtype == "int8" else 0
    return 2 * num_kv_heads * (head_dim * width + scale)
