"""GGUF metadata to `ModelShape`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dseek.core.errors import ConfigError, DseekError, FileFormatError, UnsupportedModelError
from dseek.models.families import shape_from_gguf, with_frequency_divisors
from dseek.models.rope import inverse_frequencies, yarn_attention_factor

NAMES = ("token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight")


def metadata(architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    """The metadata of a small model; keys are given without the architecture, `__` for a dot; `...` removes one."""
    values: dict[str, Any] = {
        "vocab_size": 500,
        "block_count": 2,
        "context_length": 256,
        "embedding_length": 128,
        "feed_forward_length": 192,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    result = {f"{architecture}.{key}": value for key, value in values.items() if value is not ...}
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.tokens": ["a"] * 500,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **result,
    }


def test_the_plain_case() -> None:
    shape = shape_from_gguf(metadata(rope__freq_base=100_000.0, rope__dimension_count=32), NAMES)
    assert (shape.family, shape.vocab_size, shape.num_layers, shape.hidden_size) == ("llama", 500, 2, 128)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.intermediate_size) == (4, 2, 32, 192)
    assert shape.rope.theta == 100_000.0 and shape.rope.kind == "default"
    assert shape.tie_word_embeddings and not shape.qkv_bias
    assert shape.bos_token_id == 1 and shape.eos_token_ids == (2,)


def test_tensors_tell_ties_and_biases() -> None:
    shape = shape_from_gguf(metadata("qwen2"), (*NAMES, "output.weight", "blk.0.attn_q.bias"))
    assert not shape.tie_word_embeddings and shape.qkv_bias and not shape.output_bias
    canonical = ("lm_head.weight", "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.o_proj.bias")
    shape = shape_from_gguf(metadata(), canonical)
    assert not shape.tie_word_embeddings and shape.qkv_bias and shape.output_bias


def test_missing_sizes_that_follow_from_others() -> None:
    shape = shape_from_gguf(metadata(vocab_size=..., attention__head_count_kv=...), NAMES)
    assert shape.vocab_size == 500 and shape.num_kv_heads == 4


def test_numpy_values_and_sizes_by_layer() -> None:
    values = metadata(block_count=np.uint32(2), feed_forward_length=[192, 192], attention__head_count_kv=[2, 2])
    shape = shape_from_gguf(values, NAMES)
    assert shape.num_layers == 2 and type(shape.num_layers) is int
    assert shape.intermediate_size == 192 and shape.num_kv_heads == 2
    with pytest.raises(UnsupportedModelError, match="different sizes"):
        shape_from_gguf(metadata(attention__head_count_kv=[2, 4]), NAMES)


def test_qwen3_has_norms_and_its_own_head_width() -> None:
    shape = shape_from_gguf(metadata("qwen3", attention__key_length=64, attention__value_length=64), NAMES)
    assert shape.qk_norm and shape.head_dim == 64


def test_a_window_makes_it_mistral() -> None:
    shape = shape_from_gguf(metadata(attention__sliding_window=64), NAMES)
    assert shape.family == "mistral" and shape.sliding_window == 64


def test_scalings() -> None:
    linear = shape_from_gguf(metadata(rope__scaling__type="linear", rope__scaling__factor=4.0), NAMES)
    assert linear.rope.kind == "linear" and linear.rope.factor == 4.0
    old = shape_from_gguf(metadata(rope__scale_linear=4.0), NAMES)
    assert old.rope == linear.rope
    settings = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    yarn = shape_from_gguf(metadata(**settings, rope__scaling__original_context_length=64), NAMES)
    assert yarn.rope.kind == "yarn" and yarn.rope.original_max_position_embeddings == 64
    scaled = shape_from_gguf(metadata(**settings, rope__scaling__attn_factor=2.0), NAMES)
    assert yarn_attention_factor(scaled.rope) == pytest.approx(2 * (1 + 0.1 * math.log(4)))


def test_frequency_divisors_replace_the_formula() -> None:
    shape = shape_from_gguf(metadata(), NAMES)
    divisors = np.linspace(1, 8, 16).astype(np.float32)
    divided = with_frequency_divisors(shape, divisors)
    plain, _ = inverse_frequencies(shape)
    assert np.array_equal(inverse_frequencies(divided)[0], plain / divisors)
    for bad in (divisors[:-1], np.append(divisors[:-1], np.nan), np.append(divisors[:-1], 0.0)):
        with pytest.raises(FileFormatError, match=r"rope_freqs\.weight"):
            with_frequency_divisors(shape, bad)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_count": ...},
        {"block_count": 0},
        {"block_count": 2**64},
        {"embedding_length": -128},
        {"embedding_length": 128.0},
        {"feed_forward_length": "192"},
        {"feed_forward_length": 10**12},
        {"attention__head_count": 3},
        {"attention__head_count_kv": 3},
        {"attention__layer_norm_rms_epsilon": ...},
        {"attention__layer_norm_rms_epsilon": float("nan")},
        {"attention__key_length": 40},
        {"context_length": ...},
        {"rope__freq_base": -1.0},
        {"rope__scaling__type": "yarn"},
        {"rope__scaling__type": "linear", "rope__scaling__factor": 0.0},
        {"vocab_size": 0},
    ],
    ids=str,
)
def test_hostile_values(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        shape_from_gguf(metadata(**changes), NAMES)
    assert caught.value.needed and "GGUF" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"expert_count": 8}, "mixture of experts"),
        ({"attn_logit_softcapping": 50.0}, "softcapping"),
        ({"rope__dimension_count": 16}, "rotation of a part"),
        ({"attention__value_length": 64}, "values of another width"),
        ({"rope__scaling__type": "longrope"}, "longrope"),
        ({"attention__causal": False}, "later tokens"),
        ({"attention__scale": 0.5}, "a scale of its own"),
    ],
)
def test_features_are_refused_by_name(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UnsupportedModelError, match=word):
        shape_from_gguf(metadata(**changes), NAMES)


def test_other_files() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'gemma2'.*llama, qwen2, qwen3"):
        shape_from_gguf(metadata("gemma2"), NAMES)
    with pytest.raises(UnsupportedModelError, match=r"general\.type"):
        shape_from_gguf({**metadata(), "general.type": "adapter"}, NAMES)
    with pytest.raises(DseekError):
        shape_from_gguf({}, NAMES)
