"""What a whole fused block takes, beside the sum of its parts: a factor from blocks that were timed.

The factor of a timed block is its time without attention over the modelled time of its linear layers and small
operations, under the same conditions. Between the timed numbers of rows and shapes it is interpolated as in `rates`.
Where no block was timed in a format, the factors of the other formats stand in; where none was timed at all, it is 1.
"""

from __future__ import annotations

import math

from dseek.core.attention_pattern import DENSE
from dseek.core.shape import ModelShape
from dseek.hardware.machine import BlockCurve, Machine
from dseek.plan.formats import LayerFormats, packed_bytes
from dseek.plan.layout import Layout
from dseek.plan.parts import attention_s, linears_s, small_operations_s
from dseek.plan.rates import Rates, blend, interpolate_level

LIMITS = (0.3, 3.0)
"""A factor beyond these says that something else disturbed the timing."""


class Fusion:
    """Factors of one machine's kernels.

    Args:
        machine: the measurements.
        kernels: native or torch.
        rates: times of the parts with all threads.
    """

    def __init__(self, machine: Machine, kernels: str, rates: Rates) -> None:
        self._rates = rates
        self._curves: dict[str, list[BlockCurve]] = {}
        for curve in machine.blocks:
            if curve.kernels == kernels and rates.has_format(curve.weight_format) and rates.has_cache("bf16"):
                self._curves.setdefault(curve.weight_format, []).append(curve)
        self._known: dict[str, list[tuple[tuple[int, int], tuple[int, ...], list[float]]]] = {}

    def factor(self, weight_format: str, num_rows: int, hidden_size: int, intermediate_size: int) -> float:
        """Return what to multiply the sum of the parts with.

        Args:
            weight_format: of most of the block's weights.
            num_rows: rows of the step.
            hidden_size: width of the residual stream.
            intermediate_size: width of the gated MLP.
        """
        if not self._curves:
            return 1.0
        place = (hidden_size, intermediate_size)
        if weight_format not in self._curves:
            others = [self.factor(name, num_rows, *place) for name in self._curves]
            return math.exp(sum(map(math.log, others)) / len(others))
        return blend(
            [
                (where, interpolate_level(rows, factors, num_rows))
                for where, rows, factors in self._factors(weight_format)
            ],
            place,
        )

    def _factors(self, weight_format: str) -> list[tuple[tuple[int, int], tuple[int, ...], list[float]]]:
        """Place, rows and factors of each curve of a format; worked out when the format is first asked for."""
        if weight_format not in self._known:
            self._known[weight_format] = [
                (
                    (curve.hidden_size, curve.intermediate_size),
                    curve.num_rows,
                    [
                        _factor(curve, self._rates, num_rows, seconds)
                        for num_rows, seconds in zip(curve.num_rows, curve.seconds, strict=True)
                    ],
                )
                for curve in self._curves[weight_format]
            ]
        return self._known[weight_format]

    def block_s(
        self, shape: ModelShape, rates: Rates, formats: LayerFormats, kernels: str, num_rows: int, working_set: float
    ) -> float:
        """Time of one layer without attention.

        Args:
            shape: the model.
            rates: times of the parts, with the threads of the run.
            formats: of this layer.
            kernels: native or torch.
            num_rows: rows of the step.
            working_set: bytes that a whole step reads.

        Returns:
            Seconds.
        """
        parts = linears_s(shape, rates, formats, num_rows, working_set)
        parts += small_operations_s(shape, rates, kernels, num_rows)
        return parts * self.factor(formats.gate_up, num_rows, shape.hidden_size, shape.intermediate_size)


def _factor(curve: BlockCurve, rates: Rates, num_rows: int, seconds: float) -> float:
    shape = ModelShape(
        family="llama",
        vocab_size=1,
        hidden_size=curve.hidden_size,
        intermediate_size=curve.intermediate_size,
        num_layers=1,
        num_heads=curve.num_heads,
        num_kv_heads=curve.num_kv_heads,
        head_dim=curve.head_dim,
        max_position_embeddings=1,
    )
    weight_format = curve.weight_format
    working_set = curve.num_layers * sum(packed_bytes(weight_format, *size) for size in shape.linear_sizes().values())
    formats = LayerFormats.uniform(weight_format)  # type: ignore[arg-type]
    layout = Layout(
        kernels="native",
        layer_formats=(formats,),
        embedding_format="f32",
        head_format="f32",
        cache_dtype="bf16",
        attention_patterns=(DENSE,),
        num_pages=1,
        max_batch=1,
        prefill_chunk_tokens=num_rows,
        num_threads=1,
    )
    is_decode = num_rows <= curve.max_decode_rows
    piece = (1, curve.decode_context) if is_decode else (num_rows, num_rows)
    attention = attention_s(shape, rates, layout, [piece], working_set, repeat=num_rows if is_decode else 1)
    parts = linears_s(shape, rates, formats, num_rows, working_set)
    parts += small_operations_s(shape, rates, curve.kernels, num_rows)
    low, high = LIMITS
    return min(high, max(low, (seconds - attention) / parts))
