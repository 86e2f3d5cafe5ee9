"""`extend_positions`: lets a model run beyond the length it was trained for, by another rotary embedding.

What transformers does with `rope_scaling={"rope_type": "yarn", "factor": N / trained}` in a model's configuration: no
weight changes, only the angles by which queries and keys are turned. It costs quality; how much was measured for one
model only (docs/lab-log.md, "positions beyond the trained length").
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from dseek.core.errors import ConfigError
from dseek.core.shape import ModelShape, RopeShape
from dseek.models.rope import original_positions

Scaling = Literal["auto", "yarn", "dynamic", "linear", "none"]
"""How positions are extended: a Hugging Face `rope_type`; `none` leaves the rotation as it is; `auto` is `AUTO`."""

SCALINGS: tuple[Scaling, ...] = get_args(Scaling)

AUTO: Scaling = "yarn"
"""The best at 16,384 tokens of SmolLM2; see docs/lab-log.md, "positions beyond the trained length"."""

MAX_EXTENDED_POSITIONS = 2**24
"""Positions are turned in float32, which holds every whole number up to here."""

_KNOWN_LENGTH = ("default", "dynamic", "yarn")
"""Kinds whose `original_positions` is the length up to which the plain rotation was trained."""


def extend_positions(
    shape: ModelShape, max_position_embeddings: int | None, rope_scaling: str | None = None
) -> ModelShape:
    """Raise the number of positions of a model.

    Args:
        shape: the model.
        max_position_embeddings: the new limit N, at least the model's; None changes nothing.
        rope_scaling: one of `SCALINGS`; None is auto. yarn, dynamic and linear get the factor N / trained length and
            replace what the model has; auto replaces nothing.

    Returns:
        The model with N positions; the same model where N is its limit already.

    Raises:
        ConfigError: N is below the model's limit or too large, a value is unknown, a scaling was named without N, or
            the model has a scaling that cannot be replaced or that only a named one replaces.

    Source: see `dseek.models.rope`.
    """
    if rope_scaling is not None and rope_scaling not in SCALINGS:
        raise ConfigError(f"rope scaling {rope_scaling!r}", needed="one of " + ", ".join(SCALINGS))
    if max_position_embeddings is None:
        if rope_scaling is not None:
            raise ConfigError(
                f"rope scaling {rope_scaling} without a number of positions",
                needed="max position embeddings beside it",
                remedy="say how far with --max-position-embeddings N",
            )
        return shape
    limit = shape.max_position_embeddings
    if not limit <= max_position_embeddings <= MAX_EXTENDED_POSITIONS:
        raise ConfigError(
            f"max position embeddings {max_position_embeddings}",
            needed=f"{limit}, what the model was made for, to {MAX_EXTENDED_POSITIONS}",
            remedy="limit a run with --context" if max_position_embeddings < limit else None,
        )
    if max_position_embeddings == limit:
        return shape
    rope = _extended_rope(shape, max_position_embeddings, rope_scaling or "auto")
    return dataclasses.replace(shape, max_position_embeddings=max_position_embeddings, rope=rope)


def _extended_rope(shape: ModelShape, max_position_embeddings: int, scaling: str) -> RopeShape:
    rope, trained = shape.rope, original_positions(shape)
    if scaling == "none":
        # What depends on the length the model was made for must not follow the new limit.
        keeps_length = rope.kind in ("dynamic", "yarn", "llama3")
        return dataclasses.replace(rope, original_max_position_embeddings=trained) if keeps_length else rope
    if rope.kind not in _KNOWN_LENGTH or rope.frequency_divisors is not None:
        raise ConfigError(
            f"the model was trained with a rotary embedding of kind {rope.kind}",
            needed=f"one of kind {', '.join(_KNOWN_LENGTH)} to put {scaling} in its place",
            remedy="keep the model's own with --rope-scaling none",
        )
    if scaling == "auto":
        if rope.kind != "default":
            raise ConfigError(
                f"the model has a rotary embedding of kind {rope.kind} already",
                needed="a choice between it and another",
                remedy="keep it with --rope-scaling none, or replace it with --rope-scaling yarn, dynamic or linear",
            )
        scaling = AUTO
    return RopeShape(
        theta=rope.theta,
        kind=scaling,
        factor=max_position_embeddings / trained,
        original_max_position_embeddings=None if scaling == "linear" else trained,
    )
