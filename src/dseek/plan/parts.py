"""The parts of a step: linear layers, attention and small operations of all layers, each from measured rates."""

from __future__ import annotations

from collections.abc import Sequence

from dseek.core.shape import ModelShape
from dseek.plan.formats import LayerFormats
from dseek.plan.layout import Layout
from dseek.plan.rates import Rates

TORCH_OPERATORS_PER_LAYER = 30
"""Operators of a decoder block in plain PyTorch besides its linear layers and attention."""


def linears_s(shape: ModelShape, rates: Rates, formats: LayerFormats, num_rows: int, working_set: float) -> float:
    """Time of the four projections of one layer.

    Args:
        shape: the model.
        rates: the machine's times.
        formats: of this layer.
        num_rows: rows of the step.
        working_set: bytes that a whole step reads.

    Returns:
        Seconds.
    """
    sizes = shape.linear_sizes()
    return sum(
        rates.linear_s(weight_format, num_rows, *sizes[role], working_set)
        for role, weight_format in formats.by_role().items()
    )


def attention_s(
    shape: ModelShape,
    rates: Rates,
    layout: Layout,
    pieces: Sequence[tuple[int, int]],
    working_set: float,
    *,
    repeat: int,
) -> float:
    """Time of attention of all layers. Sequences of one call share the hand-over to the threads.

    Args:
        shape: the model.
        rates: the machine's times.
        layout: says what the cache is made of.
        pieces: rows and context (the rows included) of each call.
        working_set: bytes that a whole step reads.
        repeat: sequences in each call.

    Returns:
        Seconds.
    """
    seconds = 0.0
    for window, num_layers in _windows(shape):
        for num_rows, context in pieces:
            seen = context if window is None else min(context, window + num_rows - 1)
            one = rates.attention_s(
                layout.cache_dtype, num_rows, seen, shape.num_heads, shape.num_kv_heads, shape.head_dim, working_set
            )
            dispatch = min(one, rates.overheads.dispatch_s)
            seconds += num_layers * (dispatch + repeat * (one - dispatch))
    return seconds


def _windows(shape: ModelShape) -> list[tuple[int | None, int]]:
    """Attention windows and how many layers have them."""
    if shape.sliding_window is None:
        return [(None, shape.num_layers)]
    windowed = shape.num_layers if shape.window_layers is None else sum(shape.window_layers)
    return [(shape.sliding_window, windowed), (None, shape.num_layers - windowed)]


def small_operations_s(shape: ModelShape, rates: Rates, kernels: str, num_rows: int) -> float:
    """Time of norms, rotation, activation and sums of one layer: elements touched, and PyTorch's many operators.

    Args:
        shape: the model.
        rates: the machine's times.
        kernels: native or torch.
        num_rows: rows of the step.

    Returns:
        Seconds.
    """
    elements = 4 * shape.hidden_size + shape.query_size + shape.kv_size + 2 * shape.intermediate_size
    seconds = num_rows * elements * rates.overheads.element_s
    if kernels == "torch":
        seconds += TORCH_OPERATORS_PER_LAYER * rates.overheads.dispatch_s
    return seconds
