"""Scores, limits and the forms models are prepared in."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import limits, models, scoring, text


def test_losses_are_those_of_a_softmax() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 11)).astype(np.float32) * 9
    targets = np.array([0, 3, 10, 2, 2])
    losses, best = scoring.score_rows(logits, targets)
    wide = logits.astype(np.float64)
    expected = np.log(np.exp(wide).sum(axis=1)) - wide[np.arange(5), targets]
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    assert best == list(logits.argmax(axis=1))
    assert scoring.score_rows(logits[:0], targets[:0]) == ([], [])


def test_regret_is_zero_for_the_reference_and_large_for_nonsense() -> None:
    logits = np.array([[0.0, 5.0, 1.0], [2.0, 2.0, 0.0]], dtype=np.float32)
    assert scoring.regrets(logits, np.array([1, 0])) == [0.0, 0.0]
    assert scoring.regrets(logits, np.array([0, 2])) == [5.0, 2.0]


def test_perplexity_and_agreement() -> None:
    assert scoring.perplexity([math.log(8.0)] * 3) == pytest.approx(8.0)
    assert math.isnan(scoring.perplexity([1.0, math.nan]))
    assert scoring.agreement([1, 2, 3, 4], [1, 2, 0, 4]) == 0.75


def test_sizes_of_the_models() -> None:
    assert models.SMOLLM2.num_block_weights == 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert models.SMOLLM2.kv_values_per_token == 30 * 2 * 3 * 64
    total = models.LLAMA_1B.num_block_weights + 2 * models.LLAMA_1B.num_head_weights
    assert 1.05e9 < total < 1.15e9


def test_limits_of_prefill_and_decode() -> None:
    model = models.LLAMA_TINY
    linear_only = limits.prefill_limit_s(model, 64, 1e9, math.inf)
    assert linear_only == pytest.approx(2 * (64 * model.num_block_weights + model.num_head_weights) / 1e9)
    # Causal attention: half of the square, scores and values, two operations each.
    assert model.prefill_attention_operations(1) == 4 * 256 * 2
    plan = {"streamed_bytes": 1000, "cache_bytes_per_token": 2.5}
    assert limits.decode_bytes(plan, 10) == 1025


def test_text_is_the_standard_library_and_always_the_same() -> None:
    assert text.standard_library_text(5000) == text.standard_library_text(5000)
    assert len(text.standard_library_text(300_000)) == 300_000
    assert "def " in text.standard_library_text(20_000)


def test_form_is_made_once_and_a_broken_try_leaves_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSEEK_CACHE_DIR", str(tmp_path))
    tries: list[Path] = []

    def make(target: Path) -> None:
        tries.append(target)
        (target / "part").write_text("x")
        if len(tries) == 1:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        models._made(models.LLAMA_TINY, "form", make)
    folder = models._made(models.LLAMA_TINY, "form", make)
    assert models._made(models.LLAMA_TINY, "form", make) == folder
    assert len(tries) == 2 and (folder / "part").exists()


def test_random_llama_and_its_w8a8_copy(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    from benchmarks.prepare import random_llama, write_w8a8

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    plain, again, rounded = (tmp_path / name for name in ("plain", "again", "rounded"))
    for folder in (plain, again, rounded):
        folder.mkdir()
    random_llama.write(plain, sizes, 3)
    random_llama.write(again, sizes, 3)
    write_w8a8.write(plain, rounded)
    wide, same, narrow = (load_file(folder / "model.safetensors") for folder in (plain, again, rounded))
    assert all(torch.equal(wide[name], same[name]) for name in wide)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert narrow[name].dtype == torch.int8 and wide[name].shape == (16, 32)
    scale = narrow["model.layers.0.self_attn.k_proj.weight_scale"].float()
    assert scale.shape == (16, 1)
    assert (narrow[name].float() * scale - wide[name].float()).abs().max() <= scale.max()
    assert torch.equal(narrow["lm_head.weight"], wide["lm_head.weight"])
    config = json.loads((rounded / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
