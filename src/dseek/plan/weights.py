"""`Weights`: one way to store all weights of a model, with what it loses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dseek.core.shape import ModelShape
from dseek.plan.formats import ROLES, LayerFormats, Precision, Variant, WeightFormat
from dseek.plan.quality import LossTable, total_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """One way to store all weights of a model."""

    name: str
    """Shown to people."""
    precision: Precision
    """The precision it belongs to, or mixed."""
    layer_formats: tuple[LayerFormats, ...]
    """Formats of the projections, layer by layer."""
    table_format: WeightFormat
    """Format of the embedding and of the head."""
    loss: float
    """Rise of perplexity, as a fraction."""

    def formats(self) -> set[WeightFormat]:
        """Return every format in it."""
        return {self.table_format}.union(*(layer.by_role().values() for layer in self.layer_formats))


def uniform(
    variant: Variant, shape: ModelShape, losses: LossTable, table_losses: Mapping[str, float] | None = None
) -> Weights:
    """Store every projection alike.

    Args:
        variant: how.
        shape: the model.
        losses: of its projections.
        table_losses: of its tables by format, where that was measured; they are taken to lose nothing otherwise.

    Returns:
        The weights.
    """
    layers = (LayerFormats.uniform(variant.weight_format),) * shape.num_layers
    return Weights(
        name=variant.name,
        precision=variant.precision,
        layer_formats=layers,
        table_format=variant.table_format,
        loss=total_loss(layers, losses) + (table_losses or {}).get(variant.table_format, 0.0),
    )


def formats_text(layer_formats: tuple[LayerFormats, ...]) -> str:
    """Say which format is where.

    Args:
        layer_formats: layer by layer.

    Returns:
        Such as `i4g`, or `i4g in output of 30 and down of 7 of 30 layers, i8c elsewhere`.
    """
    counts: dict[WeightFormat, dict[str, int]] = {}
    for role in ROLES:
        for layer in layer_formats:
            places = counts.setdefault(layer.by_role()[role], {})
            places[role] = places.get(role, 0) + 1
    # The format of most projections is the one elsewhere.
    *rest, last = sorted(counts, key=lambda name: sum(counts[name].values()))
    if not rest:
        return last
    parts = []
    for name in rest:
        places_text = " and ".join(f"{role} of {count}" for role, count in counts[name].items())
        parts.append(f"{name} in {places_text} of {len(layer_formats)} layers")
    return ", ".join([*parts, f"{last} elsewhere"])
