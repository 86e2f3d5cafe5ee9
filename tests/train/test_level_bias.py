"""Level biases of far cells: summed parts against the operator, biases that are known, learning that goes on."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dseek.core.attention_pattern import AttentionPattern
from dseek.core.errors import ConfigError
from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from dseek.models.gate_file import MAX_LEVEL_BIAS
from dseek.ops.attention.dynamic_reference import dynamic_attention_blocked
from dseek.ops.attention.selection import select
from dseek.train import level_bias
from dseek.train.level_bias import LevelBiasTraining, RowParts, fit_level_bias, learn_level_biases, row_parts
from tests.models import tiny

HEADS, GROUPS, WIDTH = 4, 2, 16
NUM_TOKENS = 2633
"""41 blocks and a part: with one block selected, cells of 64 and of 512 tokens are far."""
PATTERN = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=1, far=True)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, blocks: int) -> torch.Tensor:
    """The operator's output, float32."""
    pattern = dataclasses.replace(PATTERN, top_blocks=blocks)
    return dynamic_attention_blocked(q, k, v, select(q, k, pattern), level_bias_HL=bias)


def test_errors_are_those_of_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(NUM_TOKENS, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS))
    bias = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 5.0], [-30.0, 0.5, 0.0], [-0.7, 3.0, -1.0]])
    rows = torch.tensor([70, 1300, 1301, 2047, 2048, 2200, 2632])
    dense = attended(q, k, v, None, 64)[rows]
    found = row_parts(q, k, v, rows, PATTERN)
    assert found.log_mass.isfinite().any(1).any(0).tolist() == [True, True, True, False]
    for tried in (torch.zeros_like(bias), bias):
        out = attended(q, k, v, tried, 1)[rows]
        expected = ((out - dense).square().sum(-1) / dense.square().sum(-1)).mean(0)
        torch.testing.assert_close(found.errors(tried), expected, rtol=1e-4, atol=1e-7)
    monkeypatch.setattr(level_bias, "CHUNK_ELEMENTS", 3 * NUM_TOKENS * HEADS // GROUPS)
    torch.testing.assert_close(row_parts(q, k, v, rows, PATTERN).errors(bias), found.errors(bias), rtol=1e-5, atol=1e-7)
    in_halves = row_parts(q.bfloat16(), k.bfloat16(), v.bfloat16(), rows, PATTERN).errors(bias)
    torch.testing.assert_close(in_halves, found.errors(bias), rtol=0.1, atol=1e-3)


def made_up(is_helpful: bool) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Keys that differ from their mean in one direction only, by the same amount up and down.

    Queries of a head all look the same way along it, so every cell has exp(b) times the mass that its mean key tells,
    b = log cosh. Where values do not differ inside 512 tokens, that makes far cells exact. Where values follow the
    deviation, and the near tokens are valued like what gets the mass, mean values (nothing) can only do harm.
    """
    torch.manual_seed(1)
    spans = -(-NUM_TOKENS // 512)
    q, k, v = (
        torch.randn(count, heads, WIDTH) for count, heads in ((NUM_TOKENS, HEADS), (spans, GROUPS), (spans, GROUPS))
    )
    k, v = (x.repeat_interleave(512, dim=0)[:NUM_TOKENS].clone() for x in (k, v))
    sign = torch.ones(NUM_TOKENS).view(-1, 1)
    sign[1::2] = -1
    along = torch.tensor([1.0, 2.0, 3.0, 4.0])
    q[..., 0], k[..., 0] = along, 2.0 * sign
    if not is_helpful:
        v = (torch.ones(WIDTH) * sign)[:, None].repeat(1, GROUPS, 1)
        q[..., 0] = 16.0
    return (q, k, v), torch.cosh(along * 2.0 / math.sqrt(WIDTH)).log()


def test_a_known_bias_is_recovered() -> None:
    (q, k, v), expected_H = made_up(is_helpful=True)
    rows = torch.arange(1400, NUM_TOKENS, 9)
    parts = row_parts(q, k, v, rows, PATTERN)
    bias, (after, before, without) = fit_level_bias([parts], LevelBiasTraining(num_steps=400))
    assert bias.shape == (HEADS, 2), "no cell of 4096 tokens is far"
    torch.testing.assert_close(bias, expected_H[:, None].expand_as(bias), rtol=0, atol=0.005)
    assert after < 1e-4 * before and after < 1e-4 * without
    # The operator agrees that nothing is lost.
    full = torch.cat((bias, bias[:, -1:]), dim=1)
    torch.testing.assert_close(attended(q, k, v, full, 1)[rows], attended(q, k, v, None, 64)[rows], rtol=0, atol=0.01)


def test_levels_of_no_use_are_switched_off() -> None:
    (q, k, v), _ = made_up(is_helpful=False)
    parts = row_parts(q, k, v, torch.arange(1400, NUM_TOKENS, 9), PATTERN)
    bias, (after, before, without) = fit_level_bias([parts], LevelBiasTraining())
    assert (bias < -4).all() and (bias >= -MAX_LEVEL_BIAS).all()
    assert after <= without < before


def test_texts_may_differ_in_their_levels() -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(NUM_TOKENS, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS))
    long = row_parts(q, k, v, torch.arange(2000, 2100), PATTERN)
    short = row_parts(q[:700], k[:700], v[:700], torch.arange(600, 700), PATTERN)
    alone, _ = fit_level_bias([short], LevelBiasTraining())
    assert alone.shape == (HEADS, 1)
    both, errors = fit_level_bias([short, long], LevelBiasTraining())
    again, _ = fit_level_bias([short, long], LevelBiasTraining())
    assert both.shape == (HEADS, 2) and torch.equal(both, again)
    assert errors[0] < errors[1] and errors[0] < errors[2]
    nothing = RowParts(torch.tensor([[[0.0, -math.inf, -math.inf, -math.inf]]]), torch.zeros(1, 1, 4, 4))
    assert fit_level_bias([nothing], LevelBiasTraining())[0].abs().max() <= MAX_LEVEL_BIAS


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    path = tiny.save("llama", tmp_path_factory.mktemp("models") / "tiny")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 4096}))
    with open_model(str(path)) as files:
        yield Decoder.from_files(files, torch.float32).requires_grad_(False)


def test_learning_goes_on_after_the_last_finished_layer(decoder: Decoder, tmp_path: Path) -> None:
    config = LevelBiasTraining(num_texts=2, num_rows=100, num_steps=20, seed=3)
    texts = [torch.tensor(tiny.token_ids(count, seed=count)) for count in (1024, 1300, 1280)]
    layers: list[int] = []
    whole = learn_level_biases(decoder, texts, tmp_path / "whole", config, lambda *args: layers.append(args[1]))
    assert layers == [1, 2] and all(bias.shape == (decoder.shape.num_heads, 1) for bias in whole)
    assert not torch.equal(whole[0], whole[1])

    def stop(what: str, done: int, total: int, figures: dict[str, float]) -> None:
        assert figures["output_error"] <= min(figures["output_error_unbiased"], figures["output_error_without_far"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_level_biases(decoder, texts, tmp_path / "parts", config, stop)
    layers.clear()
    resumed = learn_level_biases(decoder, texts, tmp_path / "parts", config, lambda *args: layers.append(args[1]))
    assert layers == [2] and all(map(torch.equal, resumed, whole))
    learn_level_biases(decoder, texts, tmp_path / "parts", config, stop)  # nothing is left to be told
    with pytest.raises(ConfigError, match="learned with seed 3"):
        learn_level_biases(decoder, texts, tmp_path / "parts", dataclasses.replace(config, seed=4), stop)
    with pytest.raises(ConfigError, match="learned with texts"):
        learn_level_biases(decoder, texts[::-1][:1], tmp_path / "parts", config, stop)


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"num_rows": 0}, {"num_steps": 0}, {"learning_rate": 0.0}, {"window_tokens": 65}):
        with pytest.raises(ConfigError):
            LevelBiasTraining(**wrong)  # type: ignore[arg-type]
