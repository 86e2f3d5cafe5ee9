"""Reads the rotary embedding out of a config.json.

Both layouts are read: that of transformers 4 (`rope_scaling` beside `rope_theta`) and of 5 (`rope_parameters`). An
option that belongs to another kind of scaling has no effect in transformers and is warned about; one that no supported
kind knows is refused.
"""

from __future__ import annotations

import dataclasses

from dseek.core.errors import ConfigError, UnsupportedModelError
from dseek.core.shape import RopeShape
from dseek.models.config_values import ConfigValues, shorten
from dseek.models.family import MAX_POSITIONS, logger, refuse

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
MAX_THETA = 1e15
MAX_FACTOR = 65_536.0

_OPTIONS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
_KNOWN = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"} | {
    option for options in _OPTIONS.values() for option in options
}


def rope_from_config(values: ConfigValues, max_positions: int, family: str) -> RopeShape:
    """Read the rotary embedding of a model.

    Args:
        values: config.json.
        max_positions: `max_position_embeddings`, the default of the pretraining length.
        family: name of the family, for messages.

    Returns:
        The rotary embedding.

    Raises:
        ConfigError: a value that is missing, of the wrong type or out of range.
        UnsupportedModelError: a kind of scaling, or an option, that is not computed here.
    """
    # 1. The scaling may lie in either layout; transformers prefers the old key when both are there.
    scaling = values.section("rope_scaling") or values.section("rope_parameters")
    theta_values = scaling if scaling is not None and scaling.has("rope_theta") else values
    theta = theta_values.number("rope_theta", minimum=1.0001, maximum=MAX_THETA, default=10_000.0)
    if scaling is None:
        return RopeShape(theta=theta)
    if any(scaling.has(key) for key in ("full_attention", "sliding_attention")):
        refuse(values, family, "rope_parameters", "a rotary embedding for each kind of layer")

    # 2. Its kind, and every option accounted for.
    kind = _read_kind(scaling)
    _check_options(scaling, kind, family)
    partial = scaling.number("partial_rotary_factor", minimum=0.0, maximum=1.0, default=1.0)
    if partial != 1.0:
        refuse(scaling, family, "partial_rotary_factor", "rotation of a part of each head")
    if kind == "default":
        return RopeShape(theta=theta)

    # 3. The options of the kind.
    original: int | None = None
    if kind in ("yarn", "llama3"):
        # A few checkpoints keep the pretraining length beside the scaling; there it has priority.
        holder = values if values.has("original_max_position_embeddings") else scaling
        original = holder.integer("original_max_position_embeddings", maximum=MAX_POSITIONS, default=max_positions)
    default_factor = max(1.0, max_positions / original) if kind == "yarn" and original is not None else None
    factor = scaling.number("factor", minimum=1.0, maximum=MAX_FACTOR, default=default_factor)
    rope = RopeShape(theta=theta, kind=kind, factor=factor, original_max_position_embeddings=original)
    if kind == "llama3":
        return _with_llama3_options(rope, scaling)
    return _with_yarn_options(rope, scaling) if kind == "yarn" else rope


def _read_kind(scaling: ConfigValues) -> str:
    kind = scaling.text("rope_type", default=scaling.text("type", default="default"))
    if scaling.has("type") and scaling.text("type") != kind:
        raise ConfigError(
            f"{scaling.source} has rope_type = {shorten(kind)} and type = {shorten(scaling.get('type'))}",
            needed="one kind of scaling",
            remedy="remove the wrong one of the two keys",
        )
    if kind not in KINDS:
        raise UnsupportedModelError(
            f"{scaling.source} has rope_type = {shorten(kind)}",
            needed="one of " + ", ".join(KINDS),
            remedy="use a checkpoint with a supported rotary embedding",
        )
    return kind


def _check_options(scaling: ConfigValues, kind: str, family: str) -> None:
    for key in scaling.values:
        if not scaling.has(key):
            continue
        if key not in _KNOWN:
            refuse(scaling, family, key, "an option of the rotary embedding that dseek does not know")
        elif key not in _OPTIONS[kind] and any(key in options for options in _OPTIONS.values()):
            logger.warning("%s: %s has no effect with rope_type %s", scaling.source, key, kind)


def _with_llama3_options(rope: RopeShape, scaling: ConfigValues) -> RopeShape:
    low = scaling.number("low_freq_factor", minimum=1e-6, maximum=MAX_FACTOR)
    high = scaling.number("high_freq_factor", minimum=1e-6, maximum=MAX_FACTOR)
    if high <= low:
        raise scaling.error("high_freq_factor", f"more than low_freq_factor, which is {low:g}")
    return dataclasses.replace(rope, low_freq_factor=low, high_freq_factor=high)


def _with_yarn_options(rope: RopeShape, scaling: ConfigValues) -> RopeShape:
    def optional(key: str) -> float | None:
        return scaling.number(key, minimum=0.0, maximum=MAX_FACTOR) if scaling.has(key) else None

    # Zero counts as missing for all of these but attention_factor, as in transformers.
    fast = optional("beta_fast") or 32.0
    slow = optional("beta_slow") or 1.0
    if fast < slow:
        raise scaling.error("beta_fast", f"at least beta_slow, which is {slow:g}")
    return dataclasses.replace(
        rope,
        attention_factor=optional("attention_factor"),
        beta_fast=fast,
        beta_slow=slow,
        mscale=optional("mscale") or None,
        mscale_all_dim=optional("mscale_all_dim") or None,
        truncate=scaling.flag("truncate", default=True),
    )
