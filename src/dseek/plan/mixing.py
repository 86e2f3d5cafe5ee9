"""Precision by layer: for every projection the format that is worth its loss, as far as the accepted loss goes.

A multiple-choice knapsack (Kellerer, Pferschy and Pisinger 2004, Knapsack Problems, chapter 11): every (layer, role)
takes one of several formats, which differ in what they cost and what they lose. All begin in the format that loses
least. Of each place only the formats on the lower convex hull of loss and cost are steps; the steps that save most for
the quality they lose are taken first, until the accepted loss is used up (section 11.2), and what is left of it goes to
whatever single change still fits and saves most. The hull's first step that does not fit bounds how far that may be
from the best mixture. What a format costs is taken from the cost model, role by role, as a layer's share of putting
that role of all layers into it; the mixture as a whole is then costed like any other layout.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

from dseek.plan.formats import ROLES, LayerFormats, WeightFormat
from dseek.plan.quality import LossTable, total_loss
from dseek.plan.weights import Weights

ROUNDING = 1e-12
"""Losses that are the same but for their rounding may differ by so much."""

Price = Callable[[Weights], float]
"""What the objective counts, in seconds or bytes; less is better."""

Option = tuple[float, float, WeightFormat]
"""What a format loses and costs in one place, and its name."""


def mix(
    home: Weights, others: Sequence[Weights], losses: LossTable, accepted_loss: float, price: Price
) -> Weights | None:
    """Choose a format for every projection, of those of several uniform weights.

    Args:
        home: uniform weights that lose no more than accepted; the mixture has their tables.
        others: uniform weights whose formats may be taken.
        losses: of every projection in all these formats.
        accepted_loss: of all weights together, a fraction.
        price: prices complete weights.

    Returns:
        The mixture; None where no mixture of formats is cheaper than `home`, or one format serves best everywhere.
    """
    num_layers = len(home.layer_formats)
    names = list(dict.fromkeys([_format(home), *map(_format, others)]))
    base = price(home)
    elsewhere = home.loss - total_loss(home.layer_formats, losses)  # what the tables lose

    # 1. What each format costs in a role of one layer, beside the format of `home`.
    costs: dict[tuple[str, WeightFormat], float] = {}
    for role in ROLES:
        for name in names:
            everywhere = tuple(LayerFormats(**{**layer.by_role(), role: name}) for layer in home.layer_formats)
            changed = dataclasses.replace(home, layer_formats=everywhere)
            costs[role, name] = 0.0 if name == _format(home) else (price(changed) - base) / num_layers

    # 2. The best choice for every place.
    options = {
        (layer, role): [(losses[layer, role, name], costs[role, name], name) for name in names]
        for layer in range(num_layers)
        for role in ROLES
    }
    chosen = choose(options, accepted_loss - elsewhere)
    if chosen is None:
        return None
    layers = tuple(LayerFormats(**{role: chosen[layer, role] for role in ROLES}) for layer in range(num_layers))
    used = {name for layer in layers for name in layer.by_role().values()}
    saved = sum(costs[role, name] for layer in layers for role, name in layer.by_role().items())
    if len(used) == 1 or saved >= 0:
        return None
    return _named(home, others, layers, total_loss(layers, losses) + elsewhere)


def choose(
    options: Mapping[tuple[int, str], Sequence[Option]], accepted_loss: float
) -> dict[tuple[int, str], WeightFormat] | None:
    """Solve the knapsack.

    Args:
        options: by place; at least one each.
        accepted_loss: of all places together.

    Returns:
        A format for every place, or None where even the least loss is more than accepted.
    """
    # 1. The least loss everywhere, and from there the steps down each place's hull.
    taken = {place: min(entries) for place, entries in options.items()}
    left = accepted_loss - sum(loss for loss, _, _ in taken.values())
    if left < -ROUNDING:
        return None
    steps = []
    for place, entries in options.items():
        hull = _hull(entries)
        for index, (before, after) in enumerate(itertools.pairwise(hull)):
            added, saved = after[0] - before[0], before[1] - after[1]
            steps.append((saved / added if added > 0 else float("inf"), place, index, after))

    # 2. The best first; a place goes on from step to step, so that one that does not fit ends it.
    stopped = set()
    for _, place, _, after in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        added = after[0] - taken[place][0]
        if place in stopped or added > left + ROUNDING:
            stopped.add(place)
            continue
        taken[place] = after
        left -= added

    # 3. What is left, for single changes: as long as one fits and saves.
    while True:
        changes = [
            (taken[place][1] - cost, place, (loss, cost, name))
            for place, entries in options.items()
            for loss, cost, name in entries
            if loss - taken[place][0] <= left + ROUNDING and cost < taken[place][1]
        ]
        if not changes:
            break
        _, place, after = max(changes, key=lambda change: (change[0], -change[2][0]))
        left -= after[0] - taken[place][0]
        taken[place] = after
    return {place: name for place, (_, _, name) in taken.items()}


def _hull(entries: Sequence[Option]) -> list[Option]:
    """The lower convex hull of loss and cost, from the least loss to the least cost."""
    hull: list[Option] = []
    for entry in sorted(entries):
        if hull and entry[1] >= hull[-1][1]:
            continue  # loses more and saves nothing
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], entry):
            hull.pop()
        hull.append(entry)
    return hull


def _slope(before: Option, after: Option) -> float:
    """What a step saves for the loss it adds."""
    added = after[0] - before[0]
    return (before[1] - after[1]) / added if added > 0 else float("inf")


def _format(weights: Weights) -> WeightFormat:
    """The format of uniform weights."""
    return weights.layer_formats[0].qkv


def _named(home: Weights, others: Sequence[Weights], layers: tuple[LayerFormats, ...], loss: float) -> Weights:
    """The mixture, named after its formats, the narrowest precision first."""
    used = {name for layer in layers for name in layer.by_role().values()}
    order = ("i4g", "i8p", "i8c", "i8g", "f16", "bf16", "f32")
    parts = {_format(weights): weights.precision for weights in (home, *others)}
    names = [name for name in order if name in used]
    precisions = dict.fromkeys(parts[name] for name in names)
    return Weights(
        name=f"{'+'.join(precisions)} ({'+'.join(names)})",
        precision="mixed",
        layer_formats=layers,
        table_format=home.table_format,
        loss=loss,
    )
