"""How large the inputs of projections may be while a plan runs, from how large they were in a calibration.

A format that rounds inputs to integers takes its step from the largest of a row, so that a row with a larger one than
any that was calibrated is rounded more coarsely than the plan's loss allows for; fp16 overflows. Beyond the limit a run
falls back to a wider dtype (`dseek.engine.activation_guard`). Formats with inputs in fp32, or in bf16, whose range is
the same, have no limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dseek.plan.formats import ROLES, Kernels, LayerFormats

FACTOR = 2.0
"""A limit is so many times the largest calibrated magnitude: the rounding error is then at most twice, 6 dB above, that
of the worst row that was calibrated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerLimits:
    """Largest magnitudes of the inputs of a layer's projections; 0 is no limit.

    Those of the format i8c are of rotated inputs, which are what is rounded.
    """

    qkv: float = 0.0
    """Into queries, keys and values."""
    output: float = 0.0
    """Out of attention."""
    gate_up: float = 0.0
    """Into the gated MLP."""
    down: float = 0.0
    """Out of it."""

    def by_role(self) -> dict[str, float]:
        """The limits under the names of `ModelShape.linear_sizes`."""
        return {"qkv": self.qkv, "output": self.output, "gate_up": self.gate_up, "down": self.down}


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibratedInputs:
    """How large the inputs of projections were, by role and layer; 0 where that is not known."""

    plain: Mapping[str, Sequence[float]]
    """As they come."""
    rotated: Mapping[str, Sequence[float]]
    """After the rotation of the format i8c."""


def limits_of(
    layer_formats: Sequence[LayerFormats], kernels: Kernels, inputs: CalibratedInputs | None
) -> tuple[LayerLimits, ...]:
    """Find the limits of a plan.

    Args:
        layer_formats: weight formats, layer by layer.
        kernels: native or torch.
        inputs: how large they were; None does not know.

    Returns:
        Limits layer by layer; none at all where nothing has to be watched.
    """
    if inputs is None:
        return ()
    plain, rotated = inputs.plain, inputs.rotated
    tables: dict[str, Mapping[str, Sequence[float]]] = {"i8c": rotated, "i8p": plain, "i8g": plain, "i4g": plain}
    if kernels == "torch":
        # The native kernels take inputs of f16 weights in fp32.
        tables["f16"] = plain
    found = []
    for layer, formats in enumerate(layer_formats):
        largest = {}
        for role in ROLES:
            table = tables.get(formats.by_role()[role], {}).get(role, ())
            largest[role] = FACTOR * table[layer] if layer < len(table) else 0.0
        found.append(LayerLimits(**largest))
    return tuple(found) if any(any(entry.by_role().values()) for entry in found) else ()
