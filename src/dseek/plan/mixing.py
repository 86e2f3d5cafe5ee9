"""Precision by layer: the narrower of two formats where it saves most for what it loses, the wider one elsewhere.

A greedy knapsack over (layer, role): every projection begins in the wider format; the one that saves most for the
quality it loses is narrowed first, until the accepted loss is used up. What narrowing saves is taken from the cost
model, role by role, as a layer's share of narrowing that role in all layers; the mixture as a whole is then costed like
any other layout. Never more than two formats are mixed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from dseek.plan.formats import ROLES, LayerFormats
from dseek.plan.quality import LossTable, total_loss
from dseek.plan.weights import Weights

Price = Callable[[Weights], float]
"""What the objective counts, in seconds or bytes; less is better."""


def mix(wide: Weights, narrow: Weights, losses: LossTable, accepted_loss: float, price: Price) -> Weights | None:
    """Narrow as many projections of `wide` as the accepted loss allows, those that are worth most first.

    Args:
        wide: uniform weights that lose less than accepted.
        narrow: uniform weights that lose more.
        losses: of every projection in both formats.
        accepted_loss: of all weights together, a fraction.
        price: prices complete weights.

    Returns:
        The mixture; None where narrowing saves nothing, nothing may be narrowed, or everything may.
    """
    wide_format, narrow_format = wide.layer_formats[0].qkv, narrow.layer_formats[0].qkv
    num_layers = len(wide.layer_formats)
    base = price(wide)

    # 1. What each projection would save, and what it would lose.
    worth: list[tuple[float, float, int, str]] = []
    for role in ROLES:
        everywhere = tuple(_with(layer, role, narrow) for layer in wide.layer_formats)
        saved = (base - price(dataclasses.replace(wide, layer_formats=everywhere))) / num_layers
        if saved <= 0:
            continue
        for layer in range(num_layers):
            added = losses[layer, role, narrow_format] - losses[layer, role, wide_format]
            worth.append((saved / added if added > 0 else float("inf"), added, layer, role))

    # 2. The best first, as long as they fit.
    layers = list(wide.layer_formats)
    left, num_narrowed = accepted_loss - wide.loss, 0
    for _, added, layer, role in sorted(worth, key=lambda item: (-item[0], item[2], item[3])):
        if added <= left:
            layers[layer] = _with(layers[layer], role, narrow)
            left -= added
            num_narrowed += 1
    if num_narrowed in (0, num_layers * len(ROLES)):
        return None
    return Weights(
        name=f"{narrow.precision}+{wide.precision} ({narrow_format}, {wide_format})",
        precision="mixed",
        layer_formats=tuple(layers),
        table_format=wide.table_format,
        loss=total_loss(layers, losses),
    )


def _with(layer: LayerFormats, role: str, narrow: Weights) -> LayerFormats:
    """The layer with one role as in `narrow`."""
    return LayerFormats(**{**layer.by_role(), role: narrow.layer_formats[0].by_role()[role]})
