"""`Family`: what one model family adds to the plain decoder, and the limits every family shares.

The four families run the same block; they differ in defaults and in which switches of `ModelShape` they set. Each
family's file holds one `Family` value; `dseek.models.families` keeps the table of them. Nothing here touches weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dseek.core.errors import UnsupportedModelError
from dseek.core.logs import get_logger
from dseek.models.config_values import ConfigValues, shorten

logger = get_logger("dseek.models")

MAX_VOCAB_SIZE = 1 << 22
MAX_HIDDEN_SIZE = 1 << 16
MAX_INTERMEDIATE_SIZE = 1 << 19
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HEAD_DIM = 512
MAX_POSITIONS = 1 << 26
HEAD_DIM_STEP = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Switches:
    """The fields of `ModelShape` that are decided family by family."""

    qkv_bias: bool = False
    """q, k and v projections have a bias."""
    output_bias: bool = False
    """The attention output projection has a bias."""
    mlp_bias: bool = False
    """The three projections of the MLP have a bias."""
    qk_norm: bool = False
    """Heads of q and k are normalised before the rotation."""
    sliding_window: int | None = None
    """Newest positions that attention sees; None is all of them."""
    window_layers: tuple[bool, ...] | None = None
    """Layers with the window; None is all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One family: names, the defaults of its configuration, and how its switches are read."""

    name: str
    """Name in `ModelShape.family` and `model_type` in config.json."""
    architecture: str
    """Entry of `architectures` in config.json."""
    gguf_architecture: str
    """`general.architecture` of its GGUF files."""
    default_num_kv_heads: int | None
    """Value of a missing `num_key_value_heads`; None means as many as query heads."""
    default_head_dim: int | None
    """Value of a missing `head_dim`; None means hidden_size / num_attention_heads."""
    default_max_positions: int
    """Value of a missing `max_position_embeddings`."""
    read_switches: Callable[[ConfigValues, int], Switches]
    """Reads the switches from config.json, given the number of layers; raises on what the family cannot do."""


def refuse(values: ConfigValues, family: str, key: str, what: str) -> None:
    """Refuse a feature the family's block does not compute.

    Args:
        values: the configuration it was met in.
        family: name of the family.
        key: the key that switches it on.
        what: the feature in plain words.

    Raises:
        UnsupportedModelError: always.
    """
    raise UnsupportedModelError(
        f"{values.source} has {key} = {shorten(values.get(key))} ({what})",
        needed=f"a {family} model without it: dseek does not compute this feature, and the answers would be wrong",
        remedy="use a checkpoint without this feature",
    )


def refuse_flags(values: ConfigValues, family: str, flags: Mapping[str, str]) -> None:
    """Refuse switches that the family does not have, where they are on.

    Args:
        values: the configuration.
        family: name of the family.
        flags: key to plain words.

    Raises:
        UnsupportedModelError: one of them is true.
        ConfigError: one of them is no boolean.
    """
    for key, what in flags.items():
        if values.flag(key):
            refuse(values, family, key, what)


def uniform_window(values: ConfigValues, family: str, num_layers: int, window: int | None) -> Switches:
    """Read the window of a family whose layers are all alike.

    Args:
        values: the configuration.
        family: name of the family.
        num_layers: number of decoder blocks.
        window: the sliding window, or None.

    Returns:
        Switches with only the window set.

    Raises:
        UnsupportedModelError: `layer_types` mixes kinds or contradicts the window.
        ConfigError: `layer_types` is malformed.
    """
    layer_types = read_layer_types(values, num_layers)
    if layer_types is not None and layer_types != (window is not None,) * num_layers:
        refuse(values, family, "layer_types", "layers of different attention")
    return Switches(sliding_window=window)


def layered_window(values: ConfigValues, num_layers: int) -> Switches:
    """Read the sliding window of the Qwen families, where only the upper layers may have one.

    Args:
        values: the configuration.
        num_layers: number of decoder blocks.

    Returns:
        Switches with the window and, where the layers differ, its layers.

    Raises:
        ConfigError: a window, layer count or `layer_types` that is malformed or contradictory.
    """
    window: int | None = None
    # Missing means 4096, null means none.
    if values.flag("use_sliding_window") and (values.has("sliding_window") or "sliding_window" not in values.values):
        window = values.integer("sliding_window", maximum=MAX_POSITIONS, default=4096)
    layers = read_layer_types(values, num_layers)
    if layers is None:
        first = values.integer("max_window_layers", minimum=0, maximum=MAX_LAYERS, default=28)
        layers = tuple(window is not None and index >= first for index in range(num_layers))
    if window is None and any(layers):
        raise values.error(
            "layer_types",
            "full_attention only, because use_sliding_window is off",
            "set use_sliding_window and sliding_window, or make every layer full_attention",
        )
    if window is None or not any(layers):
        return Switches()
    return Switches(sliding_window=window, window_layers=None if all(layers) else layers)


def read_layer_types(values: ConfigValues, num_layers: int) -> tuple[bool, ...] | None:
    """Read which layers slide from `layer_types`.

    Args:
        values: the configuration.
        num_layers: number of decoder blocks.

    Returns:
        True for each sliding layer, or None where the key is missing.

    Raises:
        ConfigError: not a list of one known name a layer.
        UnsupportedModelError: a kind of attention that is not computed here.
    """
    names: Any = values.get("layer_types")
    if names is None:
        return None
    if not isinstance(names, list) or len(names) != num_layers or not all(isinstance(name, str) for name in names):
        raise values.error("layer_types", f"a list of {num_layers} names, one a layer")
    for name in names:
        if name not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(
                f"{values.source} has a layer of type {shorten(name)} in layer_types",
                needed="full_attention or sliding_attention",
                remedy="use a checkpoint without this kind of layer",
            )
    return tuple(name == "sliding_attention" for name in names)
