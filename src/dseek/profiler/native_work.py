"""Operations and bytes of the native decoder's operators, from the plan and the rows of each batch.

The names are those of `ops/csrc/operator_clock.h`. Bytes are the least that has to move: a weight once a call, however
many tasks read it again out of a cache; inputs and outputs once; of the key/value cache what the rows see.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from dseek.core.attention_pattern import AttentionPattern
from dseek.core.shape import ModelShape
from dseek.plan.formats import LayerFormats, cache_bytes_per_token, packed_bytes
from dseek.plan.layout import PAGE_TOKENS
from dseek.plan.plan import Plan
from dseek.plan.rates import visible_pairs
from dseek.plan.selection import seen_tokens
from dseek.profiler.records import Kind

LINEAR_NAMES = {"qkv": "qkv_proj", "output": "o_proj", "gate_up": "gate_up_proj", "down": "down_proj"}
"""Roles of `ModelShape.linear_sizes` by the names that users of transformers and vLLM know."""

SHOWN_NAMES = {
    **LINEAR_NAMES,
    "embed": "embedding",
    "qkv_input": "input_norm",
    "cache": "rotary, cache",
    "output_input": "o_proj input",
    "gate_up_input": "post_attention_norm",
    "down_input": "down_proj input",
    "head_input": "final_norm",
    "head": "lm_head",
    "select": "block means",
}

NORM_FLOPS, ROTARY_FLOPS = 4, 3
"""Operations an element of a norm and of a rotation."""

_ROW_BYTES = {"f32": 4, "f16": 4, "bf16": 2}
"""Bytes of an input as the kernel takes it; 1 in the integer formats."""


@dataclass(frozen=True, slots=True)
class Work:
    """Operations and bytes."""

    flops: float = 0.0
    num_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.num_bytes + other.num_bytes)


@dataclass(frozen=True, slots=True)
class Rows:
    """What a batch asks for: its sequences as (first new position, position behind the last), and rows with logits."""

    spans: tuple[tuple[int, int], ...]
    num_logit_rows: int

    @property
    def num_rows(self) -> int:
        """New positions of all sequences."""
        return sum(end - begin for begin, end in self.spans)

    @property
    def phase(self) -> str:
        """decode where every sequence brings one row, prefill where all bring more, else mixed."""
        lone = sum(end - begin == 1 for begin, end in self.spans)
        if lone == len(self.spans):
            return "decode"
        return "mixed" if lone else "prefill"


def kind_of(operator: str) -> Kind:
    """Say what sort of work an operator is.

    Args:
        operator: a name of the native clock.
    """
    if operator in ("qkv", "output", "gate_up", "down", "head"):
        return "linear"
    if operator == "attention":
        return "attention"
    return "idle" if operator in ("wait", "exchange") else "memory"


class DecoderWork:
    """Work of every operator for one plan.

    Args:
        plan: what runs.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.shape: ModelShape = plan.shape

    def dtype(self, operator: str, layer: int) -> str:
        """Name the format that an operator works in.

        Args:
            operator: a name of the native clock.
            layer: index of the layer; the number of layers for what belongs to none.
        """
        if operator == "head":
            return self.plan.head_format
        if operator == "embed":
            return self.plan.embedding_format
        if operator in LINEAR_NAMES:
            return self.plan.layer_formats[layer].by_role()[operator]
        return "f32"

    def rows_of(self, operator: str, layer: int, rows: Rows) -> int:
        """Say how many rows an operator computes.

        Args:
            operator: a name of the native clock.
            layer: index of the layer.
            rows: the batch.
        """
        if operator.startswith("head"):
            return rows.num_logit_rows
        after_attention = operator.removesuffix("_input") in ("output", "gate_up", "down")
        return rows.num_logit_rows if after_attention and self._only_needed(layer, rows) else rows.num_rows

    def work(self, operator: str, layer: int, rows: Rows) -> Work:
        """Work out one operator's operations and bytes in one batch.

        Args:
            operator: a name of the native clock.
            layer: index of the layer; the number of layers for what belongs to none.
            rows: the batch.
        """
        shape, num_rows = self.shape, self.rows_of(operator, layer, rows)
        if operator == "attention":
            spans = self._attending(layer, rows)
            return _attention(
                shape, self._window(layer), self.plan.attention_patterns[layer], self.plan.cache_dtype, spans
            )
        if operator == "cache":
            elements = num_rows * (shape.query_size + shape.kv_size)
            stored = num_rows * cache_bytes_per_token(self.plan.cache_dtype, shape.num_kv_heads, shape.head_dim)
            return Work(ROTARY_FLOPS * elements, 8.0 * elements + 4.0 * num_rows * shape.kv_size + stored)
        if operator == "embed":
            row_bytes = packed_bytes(self.plan.embedding_format, 16, shape.hidden_size) / 16
            return Work(0.0, num_rows * (row_bytes + 4 * shape.hidden_size))
        if operator == "select":
            seals = sum(end // PAGE_TOKENS - begin // PAGE_TOKENS for begin, end in rows.spans)
            per_token = cache_bytes_per_token(self.plan.cache_dtype, shape.num_kv_heads, shape.head_dim)
            return Work(2.0 * seals * PAGE_TOKENS * shape.kv_size, float(seals * PAGE_TOKENS * per_token))
        if operator in ("wait", "exchange") or not num_rows:
            return Work()
        return self._linear(operator, layer, num_rows)

    def sizes(self, operator: str, layer: int) -> tuple[int, int] | None:
        """Return outputs and inputs of a linear operator, None for others.

        Args:
            operator: a name of the native clock.
            layer: index of the layer.
        """
        if operator == "head":
            return self.shape.vocab_size, self.shape.hidden_size
        return self.shape.linear_sizes().get(operator)

    def _linear(self, operator: str, layer: int, num_rows: int) -> Work:
        """A projection, or the preparation of its rows."""
        role = operator.removesuffix("_input")
        outputs, inputs = self.sizes(role, layer) or (0, 0)
        weight_format = self.dtype(role, layer)
        row_bytes = _ROW_BYTES.get(weight_format, 1)
        if operator != role:
            norm = NORM_FLOPS if role in ("qkv", "gate_up", "head") else 1
            return Work(float(norm * num_rows * inputs), float(num_rows * inputs * (4 + row_bytes)))
        written = outputs // 2 if role == "gate_up" else outputs
        moved = num_rows * (inputs * row_bytes + 4 * written)
        return Work(2.0 * num_rows * outputs * inputs, float(packed_bytes(weight_format, outputs, inputs) + moved))

    def _only_needed(self, layer: int, rows: Rows) -> bool:
        """In the last layer only rows whose logits are asked for go on behind attention, if those are few."""
        return layer + 1 == self.shape.num_layers and 2 * rows.num_logit_rows <= rows.num_rows

    def _attending(self, layer: int, rows: Rows) -> tuple[tuple[int, int], ...]:
        """Spans of the rows that attend; in the last layer those of the blocks that hold a row with logits."""
        if not self._only_needed(layer, rows) or rows.phase == "decode":
            return rows.spans
        if not rows.num_logit_rows:
            return ()
        return tuple((max(begin, (end - 1) // PAGE_TOKENS * PAGE_TOKENS), end) for begin, end in rows.spans)

    def _window(self, layer: int) -> int | None:
        windowed = self.shape.window_layers is None or self.shape.window_layers[layer]
        return self.shape.sliding_window if windowed else None


@functools.lru_cache(maxsize=65536)
def _attention(
    shape: ModelShape,
    window: int | None,
    pattern: AttentionPattern,
    cache_dtype: str,
    spans: Sequence[tuple[int, int]],
) -> Work:
    """Attention of one layer: two products over the pairs that are seen."""
    per_token = cache_bytes_per_token(cache_dtype, shape.num_kv_heads, shape.head_dim)
    flops = num_bytes = 0.0
    for begin, end in spans:
        rows = end - begin
        context = end if window is None else min(end, window + rows - 1)
        pairs = float(visible_pairs(rows, max(rows, context)))
        read = float(context)
        if pattern.kind != "dense":
            pairs = min(pairs, rows * seen_tokens(pattern, begin, end, shape.num_kv_heads))
            read = min(read, pairs / rows + rows)
        flops += 4.0 * pairs * shape.query_size
        num_bytes += read * per_token + 8.0 * rows * shape.query_size
    return Work(flops, num_bytes)


def streamed_bytes(shape: ModelShape, layer_formats: Sequence[LayerFormats], head_format: str) -> float:
    """Add up the weights that a step reads.

    Args:
        shape: the model.
        layer_formats: layer by layer.
        head_format: format of the head.
    """
    sizes = shape.linear_sizes()
    total = packed_bytes(head_format, shape.vocab_size, shape.hidden_size)
    for formats in layer_formats:
        total += sum(packed_bytes(name, *sizes[role]) for role, name in formats.by_role().items())
    return float(total)
