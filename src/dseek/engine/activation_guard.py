"""Counts where a run left the range that its model was calibrated for, and says so.

A runner asks whether a layer's inputs are within the plan's limits, and computes what is not in a wider dtype. Each
such fallback is counted, told to the listeners of `engine.fallback`, and the first one is logged as a warning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dseek.core import events
from dseek.core.logs import get_logger
from dseek.plan.activation_limits import LayerLimits

logger = get_logger("dseek.engine")

EVENT = "engine.fallback"
"""Emitted with `layer`, `role`, `largest` (may be NaN, infinite or None), `limit` (0: what is finite), `num_rows`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trespass:
    """Inputs that are beyond what was calibrated."""

    role: str
    """Of the projection, or `block` for what a whole block puts out."""
    largest: float | None
    """Their largest magnitude; None where it was not kept."""
    limit: float
    """What it may be; 0 for any finite number."""


class ActivationGuard:
    """Judges and counts.

    Args:
        limits: of the plan, layer by layer.
    """

    def __init__(self, limits: Sequence[LayerLimits]) -> None:
        self._limits = [entry.by_role() for entry in limits]
        self.counts: dict[int, int] = {}
        """Calls that fell back, by layer."""

    @property
    def num_fallbacks(self) -> int:
        """Calls of a layer that fell back."""
        return sum(self.counts.values())

    def judge(self, layer: int, role: str, largest: float) -> Trespass | None:
        """Say whether a magnitude is beyond what a layer was calibrated for.

        Args:
            layer: index of the layer.
            role: of the projection it goes into; `block` has no limit but has to be finite.
            largest: the magnitude.
        """
        limit = self._limits[layer].get(role, 0.0)
        if math.isfinite(largest) and (limit == 0.0 or largest <= limit):
            return None
        return Trespass(role=role, largest=largest, limit=limit)

    def beyond(self, layer: int, role: str) -> Trespass:
        """Describe inputs that a runner found beyond their limit without keeping how large they are.

        Args:
            layer: index of the layer.
            role: of the projection.
        """
        return Trespass(role=role, largest=None, limit=self._limits[layer].get(role, 0.0))

    def count(self, layer: int, trespass: Trespass, num_rows: int, wider: str) -> None:
        """Count a fallback and tell of it.

        Args:
            layer: index of the layer.
            trespass: what was found.
            num_rows: rows that were computed anew.
            wider: dtype or format that they were computed in, for the warning.
        """
        if not self.counts:
            bound = f"{trespass.limit:.4g}, twice what was calibrated" if trespass.limit else "what is finite"
            found = "" if trespass.largest is None else f" with {trespass.largest:.4g}"
            logger.warning(
                "layer %d: what goes into %s is beyond %s%s; computed in %s (said once, later ones are counted)",
                layer,
                trespass.role if trespass.role != "block" else "the next block",
                bound,
                found,
                wider,
            )
        self.counts[layer] = self.counts.get(layer, 0) + 1
        events.emit(
            EVENT, layer=layer, role=trespass.role, largest=trespass.largest, limit=trespass.limit, num_rows=num_rows
        )

    def as_plain(self) -> dict[str, object]:
        """Give the counts as `--json` has them."""
        return {"calls": self.num_fallbacks, "by_layer": {str(layer): n for layer, n in sorted(self.counts.items())}}
