"""The parts of a step: linear layers, attention and small operations of all layers, each from measured rates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dseek.core.attention_pattern import BLOCK_TOKENS, AttentionPattern, top_level
from dseek.core.shape import ModelShape
from dseek.plan.formats import LayerFormats
from dseek.plan.layout import PAGE_TOKENS, Layout
from dseek.plan.rates import Rates
from dseek.plan.selection import scored_cells, seen_tokens

TORCH_OPERATORS_PER_LAYER = 30
"""Operators of a decoder block in plain PyTorch besides its linear layers and attention."""

SCORE_ELEMENTS, WALK_ELEMENTS, MEAN_ELEMENTS, SEAL_ELEMENTS = 0.42, 60.0, 1.45, 0.65
ROW_SCORE_ELEMENTS = 8.0
"""What choosing blocks takes, in elements of an activation (`Overheads.element_s`): a product of a score; meeting a
cell on the way down; an element of a mean that is laid out as a key or value; an element of the cache that is averaged.

ROW_SCORE_ELEMENTS is the score of a cell for one row and head, its share of the mass included. From the parts that
`dynamic_attention(..., trace=True)` reports: one thread, three shapes of heads, 8,192 tokens.
"""


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
    """Time of attention of all layers, what selects blocks included.

    Sequences of one call share the hand-over to the threads.

    Args:
        shape: the model.
        rates: the machine's times.
        layout: says what the cache is made of and what each layer attends to.
        pieces: rows and context (the rows included) of each call.
        working_set: bytes that a whole step reads.
        repeat: sequences in each call.

    Returns:
        Seconds.
    """
    seconds = 0.0
    level = top_level(layout.num_pages * PAGE_TOKENS)
    for (window, pattern), num_layers in _kinds(shape, layout).items():
        for num_rows, context in pieces:
            within = context if window is None else min(context, window + num_rows - 1)
            one, seen = 0.0, None
            if pattern.kind != "dense":
                cells = scored_cells(pattern, context, level)
                one = selection_s(shape, rates, pattern, num_rows, cells)
                seen = seen_tokens(pattern, context - num_rows, context, shape.num_kv_heads)
                seen = min(float(within), seen + (cells if pattern.far else 0))
            one += rates.attention_s(
                layout.cache_dtype,
                num_rows,
                within,
                shape.num_heads,
                shape.num_kv_heads,
                shape.head_dim,
                working_set,
                seen_tokens=seen,
            )
            dispatch = min(one, rates.overheads.dispatch_s)
            seconds += num_layers * (dispatch + repeat * (one - dispatch))
    return seconds


def selection_s(shape: ModelShape, rates: Rates, pattern: AttentionPattern, num_rows: int, num_cells: int) -> float:
    """Time to choose the blocks of one sequence's rows in one layer, the pyramid and the layout of far cells included.

    A query block is scored once, when its first position comes; a decode step does so every 64th time, but walks down
    the cells and lays them out each time.

    Args:
        shape: the model.
        rates: the machine's times.
        pattern: how the layer attends.
        num_rows: query rows.
        num_cells: cells that are met on the way down.

    Returns:
        Seconds.
    """
    if pattern.min_share:
        # Every row scores for itself, sixteen at a time; heads that see everything have nothing to score.
        rows = max(16.0, num_rows)
        scoring = shape.num_heads * (1 - len(pattern.dense_heads) / shape.num_kv_heads)
        elements = ROW_SCORE_ELEMENTS * rows * num_cells * scoring
        elements += SEAL_ELEMENTS * num_rows * 2 * shape.kv_size
        return elements * rates.overheads.element_s
    blocks = num_rows / BLOCK_TOKENS
    walks = max(1.0, blocks)
    elements = SCORE_ELEMENTS * blocks * num_cells * shape.num_heads * shape.head_dim
    elements += WALK_ELEMENTS * walks * num_cells * shape.num_kv_heads
    elements += SEAL_ELEMENTS * num_rows * 2 * shape.kv_size
    if pattern.far:
        elements += MEAN_ELEMENTS * walks * num_cells * 2 * shape.kv_size
    return elements * rates.overheads.element_s


def _kinds(shape: ModelShape, layout: Layout) -> Counter[tuple[int | None, AttentionPattern]]:
    """The model's own windows with the patterns, and how many layers have them."""
    kinds: Counter[tuple[int | None, AttentionPattern]] = Counter()
    for layer, pattern in enumerate(layout.attention_patterns):
        windowed = shape.window_layers is None or shape.window_layers[layer]
        kinds[shape.sliding_window if windowed else None, pattern] += 1
    return kinds


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
