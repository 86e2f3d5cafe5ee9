"""The decision what each layer attends to: everything, a window, or a window and the blocks that score best.

A pattern is offered where the typical request is so long that its end would see less than half of what is before it.
It is taken only where the user says `auto` or accepts more than the usual loss of quality, where it is faster by more
than a tie, and where what it is expected to lose, on top of weights and cache, is accepted. Where the loss in all
layers is too much, the layers that lose most may stay dense. A layer with a sliding window of the model's own stays as
the model has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dseek.core.attention_pattern import DENSE, AttentionPattern
from dseek.core.errors import ConfigError
from dseek.core.shape import ModelShape
from dseek.plan.attention_loss import layer_losses
from dseek.plan.attention_wish import AttentionWish, dense_heads_text, patterns_text
from dseek.plan.chooser import TIE, Candidate, Chooser
from dseek.plan.explain import loss_text
from dseek.plan.head_facts import HeadFacts
from dseek.plan.objective import DEFAULT_QUALITY_LOSS

UNASKED = "leaves keys out; weighed only with --attention auto or an accepted loss above the usual"
"""Why a pattern is not taken where nobody asked."""


def decide(search: Chooser, accepted: Candidate, wish: AttentionWish, heads: HeadFacts, batch: int) -> Candidate:
    """Choose what the layers attend to; write down the choice.

    Args:
        search: judges.
        accepted: the layout so far, with dense attention.
        wish: what the user decided.
        heads: what is known of the model's heads.
        batch: sequences at a time.

    Returns:
        The layout with patterns.

    Raises:
        ConfigError: a pattern was asked for that nothing here runs.
        MemoryLimitError: the pattern asked for does not fit.
    """
    kind, limit = wish.settled_kind, search.objective.max_quality_loss
    if accepted.layout.kernels == "torch":
        if kind not in (None, "dense"):
            raise ConfigError(
                f"{kind} attention was asked for, which the torch kernels do not compute",
                remedy="take attention dense, or the native kernels",
            )
        kind = "dense"

    def candidate(patterns: tuple[AttentionPattern, ...], *, keep: bool = False) -> Candidate:
        layout = dataclasses.replace(accepted.layout, attention_patterns=patterns)
        return search.candidate(patterns_text(patterns), layout, accepted.weights, batch=batch, keep=keep)

    dense = candidate(accepted.layout.attention_patterns, keep=True)
    choices = [] if kind == "dense" else wish.by_layer(search.shape.num_layers, heads)
    if kind is None:
        choices = [patterns for patterns in choices if _is_offered(patterns, search)]
    in_all = [candidate(in_layers(patterns, search.shape)) for patterns in choices]
    if kind is None and wish.kind != "auto" and limit <= DEFAULT_QUALITY_LOSS:
        # Nobody accepted a loss: what leaves keys out is shown beside, but its prior knows one model's perplexity only.
        in_all = [dataclasses.replace(entry, refused=entry.refused or UNASKED) for entry in in_all]
        return search.choose("attention", [dense, *in_all], _order, "exact, since no loss was accepted for more speed")
    if kind in (None, "dense"):
        mixed = [
            candidate(some)
            for patterns, entry in zip(choices, in_all, strict=True)
            if entry.loss > limit and (some := _least_harmful(patterns, search, limit - dense.loss)) is not None
        ]
        entries = [dense, *in_all]
        better = [entry for entry in mixed if not entry.refused]
        if better:
            best = min(better, key=lambda entry: entry.score)
            if all(entry.refused or entry.score > best.score * TIE for entry in entries):
                entries.append(best)
        why = f"faster than dense by more than a tie, with a quality loss within {loss_text(limit)}, or else dense"
    else:
        # The most accurate way of what was asked for is allowed whatever it loses.
        most = max(limit, min(entry.loss for entry in in_all)) + 1e-9
        entries = [candidate(entry.layout.attention_patterns, keep=entry.loss <= most) for entry in in_all]
        why = "the best of what was asked for"
    chosen = search.choose("attention", entries, _order, why)
    dense_heads = dense_heads_text(chosen.layout.attention_patterns, search.shape.num_kv_heads)
    if dense_heads:
        told = search.choices[-1]
        search.choices[-1] = dataclasses.replace(told, why=f"{told.why}; {dense_heads}")
    return chosen


def _order(entry: Candidate) -> tuple[float, ...]:
    """What breaks ties: the least loss, then the least memory."""
    return (entry.loss, entry.predicted.peak_bytes)


def _is_offered(patterns: Sequence[AttentionPattern], search: Chooser) -> bool:
    """Whether patterns would look at less than half of the typical request at its end, in the mean over layers."""
    tokens = search.prompt + search.answer
    seen = sum(pattern.visible_tokens(tokens, search.shape.num_kv_heads) for pattern in patterns)
    return 2 * seen < tokens * len(patterns)


def _may_change(shape: ModelShape, layer: int) -> bool:
    """Whether a layer attends to everything by the model's own account."""
    return shape.sliding_window is None or (shape.window_layers is not None and not shape.window_layers[layer])


def in_layers(
    patterns: Sequence[AttentionPattern], shape: ModelShape, layers: Sequence[int] | None = None
) -> tuple[AttentionPattern, ...]:
    """Give layers their patterns: all that may have one, or some of them.

    Args:
        patterns: one a layer.
        shape: the model, whose own windows stay.
        layers: indices of those that change; None for all.
    """
    wanted = range(shape.num_layers) if layers is None else layers
    return tuple(
        pattern if layer in wanted and _may_change(shape, layer) else DENSE for layer, pattern in enumerate(patterns)
    )


def _least_harmful(
    patterns: Sequence[AttentionPattern], search: Chooser, accepted_loss: float
) -> tuple[AttentionPattern, ...] | None:
    """Give as many layers their patterns as the loss allows, the least harmful first; None where that is none."""
    shape, layers, left = search.shape, [], accepted_loss
    losses = layer_losses(shape, patterns, search.context)
    for layer in sorted(range(shape.num_layers), key=lambda layer: (losses[layer], layer)):
        if _may_change(shape, layer) and losses[layer] <= left:
            layers.append(layer)
            left -= losses[layer]
    return in_layers(patterns, shape, layers) if layers else None
