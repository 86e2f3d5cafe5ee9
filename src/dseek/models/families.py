"""From a configuration to a `ModelShape`: the table of families and the checks they share.

`shape_from_config` takes a Hugging Face config.json, `shape_from_gguf` the metadata of a GGUF file. Both treat every
value as hostile and look families up in a fixed table; no name in a file is ever imported. They see no weights: that
the tensors fit the shape is checked where files are opened. To add a family, write its file and enter it in
`FAMILIES`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dseek.core.errors import ConfigError, FileFormatError, UnsupportedModelError
from dseek.core.shape import ModelShape, RopeShape
from dseek.models import llama, mistral, qwen2, qwen3
from dseek.models.config_values import ConfigValues, shorten
from dseek.models.family import (
    HEAD_DIM_STEP,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_HIDDEN_SIZE,
    MAX_INTERMEDIATE_SIZE,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB_SIZE,
    Family,
    logger,
    refuse,
)
from dseek.models.features import CONFIG_FEATURES, GGUF_FEATURES, refuse_features, refuse_quantized
from dseek.models.rope_config import MAX_FACTOR, MAX_THETA, rope_from_config

FAMILIES: dict[str, Family] = {
    family.name: family for family in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY)
}
"""Every supported family by its `model_type`."""

_GGUF_FAMILIES = {"llama": llama.FAMILY, "qwen2": qwen2.FAMILY, "qwen3": qwen3.FAMILY}


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Read the shape of a model from a Hugging Face config.json.

    Args:
        config: the parsed file.

    Returns:
        The shape, with every value checked.

    Raises:
        ConfigError: a value that is missing, of the wrong type or absurd.
        UnsupportedModelError: an unknown family (the message lists the known ones), or a feature dseek lacks.
    """
    values = ConfigValues(config, "config.json")
    family = _family_of(values)
    refuse_quantized(values, family.name)
    refuse_features(values, CONFIG_FEATURES, family.name)
    if values.get("attention_dropout") not in (None, 0):
        logger.warning("config.json: attention_dropout has no effect in dseek")

    # 1. Sizes.
    vocab_size = values.integer("vocab_size", maximum=MAX_VOCAB_SIZE)
    hidden_size = values.integer("hidden_size", maximum=MAX_HIDDEN_SIZE)
    intermediate_size = values.integer("intermediate_size", maximum=MAX_INTERMEDIATE_SIZE)
    num_layers = values.integer("num_hidden_layers", maximum=MAX_LAYERS)
    max_positions = values.integer(
        "max_position_embeddings", maximum=MAX_POSITIONS, default=family.default_max_positions
    )

    # 2. Heads.
    num_heads = values.integer("num_attention_heads", maximum=MAX_HEADS)
    default_kv_heads = num_heads
    if "num_key_value_heads" not in values.values and family.default_num_kv_heads is not None:
        default_kv_heads = family.default_num_kv_heads
    num_kv_heads = values.integer("num_key_value_heads", maximum=MAX_HEADS, default=default_kv_heads)
    _check_head_groups(values, "num_key_value_heads", num_heads, num_kv_heads)
    head_dim = _read_head_dim(
        values, "head_dim", "num_attention_heads", hidden_size, num_heads, family.default_head_dim
    )

    # 3. What differs from family to family.
    switches = family.read_switches(values, num_layers)
    return ModelShape(
        family=family.name,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=values.number("rms_norm_eps", minimum=1e-30, maximum=1.0, default=1e-6),
        rope=rope_from_config(values, max_positions, family.name),
        tie_word_embeddings=values.flag("tie_word_embeddings"),
        qkv_bias=switches.qkv_bias,
        output_bias=switches.output_bias,
        mlp_bias=switches.mlp_bias,
        qk_norm=switches.qk_norm,
        sliding_window=switches.sliding_window,
        window_layers=switches.window_layers,
        bos_token_id=next(iter(_token_ids(values, ("bos_token_id",), vocab_size)), None),
        eos_token_ids=_token_ids(values, ("eos_token_id",), vocab_size),
    )


def shape_from_gguf(metadata: Mapping[str, Any], tensor_names: Collection[str]) -> ModelShape:
    """Read the shape of a model from the metadata of a GGUF file.

    Args:
        metadata: keys to values as GGUF spells them, such as `llama.block_count`; arrays need only have a length.
        tensor_names: names of the tensors in the file, GGUF's or canonical; they tell tied heads and biases.

    Returns:
        The shape. Frequency divisors in a `rope_freqs.weight` tensor are not in the metadata; add them with
        `with_frequency_divisors`.

    Raises:
        ConfigError: a value that is missing, of the wrong type or absurd.
        UnsupportedModelError: an unknown architecture (the message lists the known ones), or a feature that is not
            computed here.
    """
    values = ConfigValues(metadata, "the GGUF metadata")
    architecture = values.text("general.architecture")
    if architecture not in _GGUF_FAMILIES:
        raise _unknown_family(values, "general.architecture", _GGUF_FAMILIES)
    family = _GGUF_FAMILIES[architecture]
    if values.text("general.type", default="model") != "model":
        refuse(values, family.name, "general.type", "a file that is not a whole model")
    prefix = architecture + "."
    refuse_features(values, GGUF_FEATURES, family.name, prefix)

    # 1. Sizes. A missing vocabulary size is the length of the token list.
    vocab_key = prefix + "vocab_size"
    tokens = values.get("tokenizer.ggml.tokens")
    if not values.has(vocab_key) and tokens is not None and hasattr(tokens, "__len__"):
        values = ConfigValues({**metadata, vocab_key: len(tokens)}, values.source)
    vocab_size = values.integer(vocab_key, maximum=MAX_VOCAB_SIZE)
    hidden_size = values.integer(prefix + "embedding_length", maximum=MAX_HIDDEN_SIZE)
    num_layers = values.integer(prefix + "block_count", maximum=MAX_LAYERS)
    max_positions = values.integer(prefix + "context_length", maximum=MAX_POSITIONS)
    intermediate_size = _same_in_every_layer(values, prefix + "feed_forward_length", family).integer(
        prefix + "feed_forward_length", maximum=MAX_INTERMEDIATE_SIZE
    )

    # 2. Heads.
    heads_key, kv_heads_key = prefix + "attention.head_count", prefix + "attention.head_count_kv"
    num_heads = _same_in_every_layer(values, heads_key, family).integer(heads_key, maximum=MAX_HEADS)
    num_kv_heads = _same_in_every_layer(values, kv_heads_key, family).integer(
        kv_heads_key, maximum=MAX_HEADS, default=num_heads
    )
    _check_head_groups(values, kv_heads_key, num_heads, num_kv_heads)
    key_length = prefix + "attention.key_length"
    head_dim = _read_head_dim(values, key_length, heads_key, hidden_size, num_heads, None)
    for key, what in (
        (prefix + "attention.value_length", "values of another width than keys"),
        (prefix + "rope.dimension_count", "rotation of a part of each head"),
    ):
        if values.integer(key, maximum=1 << 20, default=head_dim) != head_dim:
            refuse(values, family.name, key, what)

    # 3. Switches: GGUF shows biases and tied heads only by which tensors there are.
    window_key = prefix + "attention.sliding_window"
    window = values.integer(window_key, minimum=0, maximum=MAX_POSITIONS, default=0) or None
    if window is not None and architecture != "llama":
        refuse(values, family.name, window_key, "a sliding window whose layers GGUF does not name")
    names = set(tensor_names)
    return ModelShape(
        family=family.name if window is None else mistral.FAMILY.name,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=values.number(prefix + "attention.layer_norm_rms_epsilon", minimum=1e-30, maximum=1.0),
        rope=_rope_from_gguf(values, prefix, family),
        tie_word_embeddings=not names & {"output.weight", "lm_head.weight"},
        qkv_bias=bool(names & {"blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias"}),
        output_bias=bool(names & {"blk.0.attn_output.bias", "model.layers.0.self_attn.o_proj.bias"}),
        mlp_bias=bool(names & {"blk.0.ffn_up.bias", "model.layers.0.mlp.up_proj.bias"}),
        qk_norm=architecture == "qwen3",
        sliding_window=window,
        bos_token_id=next(iter(_token_ids(values, ("tokenizer.ggml.bos_token_id",), vocab_size)), None),
        eos_token_ids=_token_ids(
            values,
            tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")),
            vocab_size,
        ),
    )


def with_frequency_divisors(shape: ModelShape, divisors: Sequence[float]) -> ModelShape:
    """Add the rotary divisors that a GGUF file keeps in its `rope_freqs.weight` tensor (Llama 3.1 and later).

    Args:
        shape: the shape read from the metadata.
        divisors: float [head_dim / 2], one a rotated pair.

    Returns:
        The shape with `rope.frequency_divisors` set.

    Raises:
        FileFormatError: a wrong count, or a value that is not finite and positive.
    """
    given = tuple(float(value) for value in divisors)
    if len(given) != shape.head_dim // 2 or not all(math.isfinite(value) and value > 0 for value in given):
        raise FileFormatError(
            f"rope_freqs.weight holds {len(given)} values, {shorten(given[:4])} first",
            needed=f"{shape.head_dim // 2} finite values above zero, one for each rotated pair",
            remedy="download the GGUF file again",
        )
    return dataclasses.replace(shape, rope=dataclasses.replace(shape.rope, frequency_divisors=given))


def _family_of(values: ConfigValues) -> Family:
    name = values.text("model_type")
    if name not in FAMILIES:
        raise _unknown_family(values, "model_type", FAMILIES)
    family = FAMILIES[name]
    architectures = values.get("architectures")
    if architectures is None or architectures == []:
        return family
    if not isinstance(architectures, list) or not all(isinstance(entry, str) for entry in architectures):
        raise values.error("architectures", "a list of names")
    if family.architecture not in architectures:
        raise UnsupportedModelError(
            f"config.json has architectures = {shorten(architectures)}",
            needed=f"{family.architecture}: dseek runs {name} models that predict the next token",
            remedy="use the checkpoint for text generation",
        )
    return family


def _unknown_family(values: ConfigValues, key: str, known: Collection[str]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the model family {shorten(values.get(key))} ({key} in {values.source}) is not supported",
        needed="one of " + ", ".join(sorted(known)),
        remedy="use a model of one of these families",
    )


def _check_head_groups(values: ConfigValues, key: str, num_heads: int, num_kv_heads: int) -> None:
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"{values.source} has {num_heads} query heads and {num_kv_heads} key and value heads ({key})",
            needed="a number of query heads that is a multiple of the key and value heads",
            remedy=f"correct {key} in {values.source}, or download the model again",
        )


def _read_head_dim(
    values: ConfigValues, key: str, heads_key: str, hidden_size: int, num_heads: int, default: int | None
) -> int:
    if default is None and not values.has(key):
        if hidden_size % num_heads or (hidden_size // num_heads) % HEAD_DIM_STEP:
            raise ConfigError(
                f"{values.source} has no {key}, and hidden size {hidden_size} / {num_heads} heads ({heads_key})"
                f" = {hidden_size / num_heads:g}",
                needed=f"a head width that is a multiple of {HEAD_DIM_STEP}",
                remedy=f"correct {heads_key}, or set {key}",
            )
        default = hidden_size // num_heads
    head_dim = values.integer(key, minimum=HEAD_DIM_STEP, maximum=MAX_HEAD_DIM, default=default, step=HEAD_DIM_STEP)
    if head_dim > MAX_HEAD_DIM:
        raise ConfigError(
            f"hidden size {hidden_size} / {num_heads} heads gives heads {head_dim} wide",
            needed=f"heads at most {MAX_HEAD_DIM} wide",
            remedy=f"correct {heads_key} in {values.source}",
        )
    return head_dim


def _token_ids(values: ConfigValues, keys: tuple[str, ...], vocab_size: int) -> tuple[int, ...]:
    """Read special token ids; one beyond the vocabulary can never be produced, so it is dropped with a warning."""
    found: list[int] = []
    for key in keys:
        value = values.get(key)
        if value is None:
            continue
        for entry in value if isinstance(value, list | tuple) else (value,):
            if isinstance(entry, bool) or not isinstance(entry, numbers.Integral) or int(entry) < 0:
                raise values.error(key, f"token ids from 0 to {vocab_size - 1}")
            token_id = int(entry)
            if token_id >= vocab_size:
                logger.warning(
                    "%s: %s %s is outside the vocabulary of %d", values.source, key, shorten(token_id), vocab_size
                )
            elif token_id not in found:
                found.append(token_id)
    return tuple(found)


def _same_in_every_layer(values: ConfigValues, key: str, family: Family) -> ConfigValues:
    """GGUF may give a size for each layer; accept the list where all its entries agree."""
    value = values.get(key)
    if not isinstance(value, list | tuple):
        return values
    if len(value) == 0 or any(entry != value[0] for entry in value):
        refuse(values, family.name, key, "layers of different sizes")
    return ConfigValues({**values.values, key: value[0]}, values.source)


def _rope_from_gguf(values: ConfigValues, prefix: str, family: Family) -> RopeShape:
    theta = values.number(prefix + "rope.freq_base", minimum=1.0001, maximum=MAX_THETA, default=10_000.0)
    kind_key, factor_key = prefix + "rope.scaling.type", prefix + "rope.scaling.factor"
    old_factor_key = prefix + "rope.scale_linear"
    kind = values.text(kind_key, default="linear" if values.has(old_factor_key) else "none")
    if kind == "none":
        return RopeShape(theta=theta)
    if kind not in ("linear", "yarn"):
        refuse(values, family.name, kind_key, "a rotary embedding other than none, linear and yarn")
    used_key = old_factor_key if values.has(old_factor_key) and not values.has(factor_key) else factor_key
    factor = values.number(used_key, minimum=1.0, maximum=MAX_FACTOR)
    if kind == "linear":
        return RopeShape(theta=theta, kind="linear", factor=factor)
    original_key = prefix + "rope.scaling.original_context_length"
    # llama.cpp multiplies the paper's attention factor by these two.
    scale = 1.0
    for name in ("attn_factor", "yarn_attn_factor"):
        scale *= values.number(f"{prefix}rope.scaling.{name}", minimum=1e-6, maximum=MAX_FACTOR, default=1.0)
    return RopeShape(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=values.integer(original_key, maximum=MAX_POSITIONS)
        if values.has(original_key)
        else None,
        attention_factor=None if scale == 1.0 else scale * (0.1 * math.log(factor) + 1.0),
        beta_fast=values.number(prefix + "rope.scaling.yarn_beta_fast", minimum=1e-6, maximum=MAX_FACTOR, default=32.0),
        beta_slow=values.number(prefix + "rope.scaling.yarn_beta_slow", minimum=1e-6, maximum=MAX_FACTOR, default=1.0),
    )
