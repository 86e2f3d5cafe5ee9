"""The rotary table against transformers'."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from dseek.core.shape import ModelShape, RopeShape
from dseek.models.families import shape_from_config
from dseek.models.rope import inverse_frequencies, rope_table, yarn_attention_factor
from tests.models import tiny

KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    "yarn-explicit": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 2048,
        "attention_factor": 1.25,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 1024,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
}


def shape(head_dim: int, scaling: dict[str, Any], max_positions: int = 8192) -> ModelShape:
    return shape_from_config(_config(head_dim, scaling, max_positions))


def _config(head_dim: int, scaling: dict[str, Any], max_positions: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 10,
        "hidden_size": head_dim,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": max_positions,
        "rope_parameters": scaling,
    }


def reference(
    head_dim: int, scaling: dict[str, Any], num_positions: int, max_positions: int = 8192
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frequencies, cosines and sines of transformers."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    tiny.settle_trigonometry()
    config = LlamaConfig(**_config(head_dim, dict(scaling), max_positions))
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(num_positions)[None])
    half = head_dim // 2
    return rotary.inv_freq.numpy(), cos[0, :, :half].numpy(), sin[0, :, :half].numpy()


@pytest.mark.parametrize("theta", [10_000.0, 100_000.0, 500_000.0, 1_000_000.0])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_equal_transformers(kind: str, theta: float) -> None:
    for head_dim in (16, 48, 64, 80, 96, 128):
        scaling = {**KINDS[kind], "rope_theta": theta}
        frequencies, cos, sin = reference(head_dim, scaling, 600)
        ours, _ = inverse_frequencies(shape(head_dim, scaling))
        np.testing.assert_array_max_ulp(ours, frequencies, maxulp=4)
        our_cos, our_sin = rope_table(shape(head_dim, scaling), 600)
        assert our_cos.dtype == np.float32 and our_cos.shape == (600, head_dim // 2)
        # The last bit of a frequency near one moves position 599 by 600 * 2 ** -24 = 4e-5.
        np.testing.assert_allclose(our_cos, cos, rtol=0, atol=1e-4)
        np.testing.assert_allclose(our_sin, sin, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("theta", "head_dim"), [(100_000.0, 64), (500_000.0, 64), (1_000_000.0, 64), (10_000.0, 128)])
def test_long_tables_of_well_known_models(theta: float, head_dim: int) -> None:
    scaling = {"rope_type": "default", "rope_theta": theta}
    _, cos, sin = reference(head_dim, scaling, 8192)
    our_cos, our_sin = rope_table(shape(head_dim, scaling), 8192)
    np.testing.assert_allclose(our_cos, cos, rtol=0, atol=1e-6)
    np.testing.assert_allclose(our_sin, sin, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tokens", [10, 64, 65, 100, 5000])
def test_dynamic_follows_the_length_of_the_text(tokens: int) -> None:
    scaling = {**KINDS["dynamic"], "rope_theta": 10_000.0}
    _, cos, _ = reference(64, scaling, tokens, max_positions=64)
    ours, _ = rope_table(shape(64, scaling, max_positions=64), tokens, tokens)
    np.testing.assert_allclose(ours, cos, rtol=0, atol=1e-3 if tokens > 1000 else 1e-5)


def test_other_kinds_ignore_the_length() -> None:
    plain = shape(64, {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0})
    assert np.array_equal(rope_table(plain, 20)[0], rope_table(plain, 20, 100_000)[0])


def test_a_table_is_the_beginning_of_a_longer_one() -> None:
    plain = shape(32, {"rope_type": "default", "rope_theta": 10_000.0})
    long_cos, long_sin = rope_table(plain, 5000)
    for rows in (0, 1, 4095, 4096, 4097):
        cos, sin = rope_table(plain, rows)
        assert np.array_equal(cos, long_cos[:rows]) and np.array_equal(sin, long_sin[:rows])
    assert np.all(long_cos[0] == 1.0) and np.all(long_sin[0] == 0.0)


def test_yarn_attention_factor() -> None:
    assert yarn_attention_factor(RopeShape(kind="yarn", factor=1.0)) == 1.0
    assert yarn_attention_factor(RopeShape(kind="yarn", factor=4.0)) == pytest.approx(1.138629436)
    assert yarn_attention_factor(RopeShape(kind="yarn", factor=4.0, attention_factor=1.5)) == 1.5
    equal = RopeShape(kind="yarn", factor=40.0, mscale=0.7, mscale_all_dim=0.7)
    assert yarn_attention_factor(equal) == 1.0


def test_divisors_of_ones_change_nothing() -> None:
    plain = shape(32, {"rope_type": "default", "rope_theta": 10_000.0})
    ones = dataclasses.replace(plain, rope=dataclasses.replace(plain.rope, frequency_divisors=(1.0,) * 16))
    assert np.array_equal(rope_table(plain, 50)[0], rope_table(ones, 50)[0])
