"""config.json and tokenizer files for a model that comes from a GGUF file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from dseek.core.errors import UnsupportedModelError
from dseek.core.files import atomic_write_text
from dseek.core.shape import ModelShape, RopeShape
from dseek.models.families import FAMILIES
from dseek.models.rope import inverse_frequencies
from dseek.models.tokenizer import Tokenizer

_LLAMA3_LENGTH = 8192
_LLAMA3_FACTORS = (8.0, 32.0)


def config_from_shape(shape: ModelShape) -> dict[str, Any]:
    """Describe a shape as transformers does.

    Args:
        shape: the model.

    Returns:
        config.json, which `shape_from_config` reads as the same shape.

    Raises:
        UnsupportedModelError: frequency divisors that no kind of `rope_scaling` gives.
    """
    config: dict[str, Any] = {
        "architectures": [FAMILIES[shape.family].architecture],
        "model_type": shape.family,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": float(f"{shape.rms_norm_eps:.7g}"),
        "rope_theta": shape.rope.theta,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "bos_token_id": shape.bos_token_id,
        "eos_token_id": _ids(shape.eos_token_ids),
        "initializer_range": 0.02,
        "use_cache": True,
    }
    scaling = _rope_scaling(shape)
    if scaling is not None:
        config["rope_scaling"] = scaling
    if shape.family in ("llama", "qwen3"):
        config["attention_bias"] = shape.qkv_bias
    if shape.family == "llama":
        config["mlp_bias"] = shape.mlp_bias
    if shape.family == "mistral":
        config["sliding_window"] = shape.sliding_window
    if shape.family.startswith("qwen"):
        config["use_sliding_window"] = False
    return config


def _ids(token_ids: tuple[int, ...]) -> int | list[int] | None:
    if not token_ids:
        return None
    return token_ids[0] if len(token_ids) == 1 else list(token_ids)


def _rope_scaling(shape: ModelShape) -> dict[str, Any] | None:
    rope = shape.rope
    if rope.frequency_divisors is not None:
        return _llama3_scaling(shape)
    if rope.kind == "default":
        return None
    options: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "yarn":
        options["original_max_position_embeddings"] = rope.original_max_position_embeddings
        options |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_factor is not None:
            options["attention_factor"] = rope.attention_factor
    return {key: value for key, value in options.items() if value is not None}


def _llama3_scaling(shape: ModelShape) -> dict[str, Any]:
    """GGUF keeps what Llama 3.1 and later do to frequencies as divisors; find the options that give them."""
    wanted, _ = inverse_frequencies(shape)
    for factor in _LLAMA3_FACTORS:
        rope = RopeShape(
            theta=shape.rope.theta, kind="llama3", factor=factor, original_max_position_embeddings=_LLAMA3_LENGTH
        )
        found, _ = inverse_frequencies(dataclasses.replace(shape, rope=rope))
        if np.allclose(found, wanted, rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": _LLAMA3_LENGTH,
            }
    raise UnsupportedModelError(
        "the file's rotary frequencies have divisors of their own",
        needed="those of Llama 3.1 or 3.2",
        remedy="take the Hugging Face folder of the model as the source, or write --format gguf",
    )


def write_tokenizer(tokenizer: Tokenizer, shape: ModelShape, folder: Path) -> None:
    """Write the tokenizer of a GGUF file as transformers reads it.

    Args:
        tokenizer: the file's.
        shape: the model.
        folder: where to.

    Raises:
        UnsupportedModelError: a kind of tokenizer that cannot be written.
    """
    atomic_write_text(folder / "tokenizer.json", tokenizer.to_json())
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_position_embeddings,
        **tokenizer.special_tokens,
    }
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
        atomic_write_text(folder / "chat_template.jinja", tokenizer.chat_template)
    atomic_write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": _ids(tokenizer.eos_token_ids)}
    written = {key: value for key, value in generation.items() if value is not None}
    atomic_write_text(folder / "generation_config.json", json.dumps(written, indent=2) + "\n")
