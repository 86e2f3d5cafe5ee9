"""`AttentionMap` against whole tables of weights, and the projections it is made from against the model's own pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dseek.core.attention_pattern import BLOCK_TOKENS, DENSE, AttentionPattern
from dseek.engine import attention_map
from dseek.engine.attention_map import FAR, HIDDEN, LEFT_OUT, NEAR, SELECTED, block_mass, map_head
from dseek.models import projections as projecting
from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from dseek.models.gate_file import Gates, LayerGate
from dseek.models.projections import LayerProjections, layer_projections
from dseek.ops.attention.selection import select
from tests.models import tiny

NUM_TOKENS = 1333
"""20 blocks and a part."""


def whole_weights(q_Td: torch.Tensor, k_Td: torch.Tensor, window: int | None) -> torch.Tensor:
    """The whole table of weights."""
    scores = q_Td @ k_Td.T / q_Td.shape[1] ** 0.5
    hidden = torch.ones(len(q_Td), len(q_Td)).triu(1).bool()
    if window is not None:
        hidden |= torch.ones(len(q_Td), len(q_Td)).tril(-window).bool()
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)


def draw(window: int | None = None) -> LayerProjections:
    """Random projections with 4 query heads in 2 groups."""
    torch.manual_seed(0)
    q, k = 2 * torch.randn(NUM_TOKENS, 4, 16), torch.randn(NUM_TOKENS, 2, 16)
    return LayerProjections(torch.randn_like(q), torch.randn_like(k), q, k, torch.randn_like(k), window)


@pytest.mark.parametrize("window", [None, 1, 64, 200])
@pytest.mark.parametrize("chunk_elements", [1, 200_000, 2**24])
def test_mass_is_that_of_the_whole_table(
    monkeypatch: pytest.MonkeyPatch, chunk_elements: int, window: int | None
) -> None:
    monkeypatch.setattr(attention_map, "CHUNK_ELEMENTS", chunk_elements)
    drawn = draw()
    q_Td, k_Td = drawn.rotated_queries[:, 1], drawn.rotated_keys[:, 0]
    weights = whole_weights(q_Td, k_Td, window)
    expected = torch.stack(
        [
            torch.stack([part.sum(1).mean() for part in rows.split(BLOCK_TOKENS, dim=1)])
            for rows in weights.split(BLOCK_TOKENS)
        ]
    )
    torch.testing.assert_close(block_mass(q_Td, k_Td, window), expected)


@pytest.mark.parametrize(
    "pattern",
    [
        AttentionPattern(kind="window", window_tokens=(128,)),
        AttentionPattern(kind="dynamic", window_tokens=(64, 256), top_blocks=2),
        AttentionPattern(kind="dynamic", window_tokens=(128,), top_blocks=1, far=True),
    ],
)
@pytest.mark.parametrize("head", [0, 3])
def test_kept_mass_and_pairs_are_those_of_the_choices(pattern: AttentionPattern, head: int) -> None:
    drawn, group = draw(), head // 2
    found = map_head(drawn, pattern, layer=5, head=head)
    weights = whole_weights(drawn.rotated_queries[:, head], drawn.rotated_keys[:, group], None)
    selection = select(drawn.rotated_queries, drawn.rotated_keys, pattern)
    kept = torch.zeros(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool)
    pairs = 0
    for token in range(NUM_TOKENS):
        choice = selection[token // BLOCK_TOKENS][group]
        for block in (*choice.exact_blocks, token // BLOCK_TOKENS):
            kept[token, block * BLOCK_TOKENS : min(token + 1, (block + 1) * BLOCK_TOKENS)] = True
        pairs += len(choice.far_cells)
    pairs += int(kept.sum())
    assert (found.layer, found.head, found.num_tokens) == (5, head, NUM_TOKENS)
    assert (found.pairs, found.dense_pairs) == (pairs, NUM_TOKENS * (NUM_TOKENS + 1) // 2)
    assert found.kept == pytest.approx(float((weights * kept).sum(1).mean()), abs=1e-5)
    assert found.kept + found.in_means == pytest.approx(1.0, abs=1e-5) if pattern.far else found.in_means == 0.0
    assert 0.05 < found.kept < 0.95 and 0.3 < found.skipped < 0.95
    shares = found.shares()
    np.testing.assert_allclose(shares.sum(1), 1.0, atol=1e-5)
    assert not shares[:, HIDDEN].any()


def test_a_head_that_stays_dense_keeps_everything() -> None:
    pattern = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=4, min_share=0.2, dense_heads=(1,))
    drawn = draw()
    first, second = (map_head(drawn, pattern, layer=0, head=head) for head in (0, 3))
    assert first.skipped > 0.3 and first.kept < 0.95
    assert (second.pairs, second.kept) == (second.dense_pairs, pytest.approx(1.0, abs=1e-5))
    assert set(np.unique(second.place)) == {HIDDEN, NEAR}


def test_places_of_one_query_block() -> None:
    pattern = AttentionPattern(kind="dynamic", window_tokens=(128,), top_blocks=1, far=True)
    drawn = draw()
    found = map_head(drawn, pattern, layer=0, head=0)
    (choice, _) = select(drawn.rotated_queries, drawn.rotated_keys, pattern)[20]
    row = found.place[20].tolist()
    assert [row[block] for block in (0, 18, 19, 20)] == [NEAR] * 4
    assert [block for block in range(21) if row[block] == SELECTED] == sorted(set(choice.exact_blocks) - {0, 18, 19})
    assert [block for block in range(21) if row[block] == FAR] == sorted(
        index for level, index in choice.far_cells if level == 0
    )
    # One cell of eight competes, blocks 8 to 15, for it is neither near nor the first: opened as the only one.
    assert LEFT_OUT not in row
    alone = map_head(drawn, AttentionPattern(kind="window", window_tokens=(128,)), layer=0, head=0)
    assert alone.place[20].tolist() == [NEAR, *[LEFT_OUT] * 17, NEAR, NEAR, NEAR]
    assert alone.place[3].tolist() == [NEAR] * 4 + [HIDDEN] * 17
    assert alone.chosen_by is None and found.chosen_by == "mean keys"


def test_biases_of_far_cells_are_those_of_the_gate() -> None:
    nothing = np.zeros(0, dtype=np.float32)
    bias = np.array([[1, 2], [3, 4], [5, -6], [7, 8]], dtype=np.float32)
    layers = [LayerGate(*[nothing] * 8, level_bias=stored) for stored in (None, bias)]
    gates = Gates(tuple(layers), 1e4, "any")
    far = AttentionPattern(kind="dynamic", window_tokens=(128,), top_blocks=1, far=True)
    assert map_head(draw(), far, layer=1, head=2, gates=gates).level_bias == (5.0, -6.0, -6.0)
    assert map_head(draw(), far, layer=0, head=2, gates=gates).level_bias is None
    without = AttentionPattern(kind="dynamic", window_tokens=(128,), top_blocks=1)
    assert map_head(draw(), without, layer=1, head=2, gates=gates).level_bias is None


@pytest.mark.parametrize("window", [None, 1, 65, 100, 5000])
def test_dense_keeps_all_that_the_model_sees(window: int | None) -> None:
    found = map_head(draw(window), DENSE, layer=0, head=0)
    seen = whole_weights(torch.zeros(NUM_TOKENS, 1), torch.zeros(NUM_TOKENS, 1), window) > 0
    assert found.pairs == found.dense_pairs == int(seen.sum())
    assert found.kept == pytest.approx(1.0, abs=1e-5) and found.skipped == 0.0
    blocks = [[bool(part.any()) for part in rows.split(BLOCK_TOKENS, dim=1)] for rows in seen.split(BLOCK_TOKENS)]
    assert np.array_equal(found.place, np.where(blocks, NEAR, HIDDEN))


@pytest.mark.parametrize("case", ["llama-bias", "qwen2-window", "qwen3-window", "llama-dynamic"])
def test_projections_are_those_of_the_models_own_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    monkeypatch.setattr(projecting, "CHUNK_ROWS", 7)
    monkeypatch.setattr(projecting, "WINDOW_CHUNK_ROWS", 6)
    with open_model(str(tiny.save(case, tmp_path / case))) as files:
        decoder = Decoder.from_files(files).requires_grad_(False)
    ids = torch.tensor(tiny.token_ids(45, seed=1))
    seen: list[torch.Tensor] = []
    seen_values: list[torch.Tensor] = []
    for block in decoder.model.layers:
        block.self_attn.k_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
        block.self_attn.v_proj.register_forward_hook(lambda module, inputs, output: seen_values.append(output))
    with torch.inference_mode():
        decoder(ids[None])
    expected, seen = seen, []
    values = list(seen_values)
    for layer, found in enumerate(layer_projections(decoder, ids)):
        attention = decoder.model.layers[layer].self_attn
        keys = attention.k_norm(expected[layer][0].view(len(ids), -1, attention.head_dim))
        torch.testing.assert_close(found.keys, keys, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(found.values.flatten(1), values[layer][0], atol=2e-4, rtol=1e-4)
        windowed = decoder.model._is_windowed(layer)
        assert found.window == (decoder.shape.sliding_window if windowed else None)
    assert layer == decoder.shape.num_layers - 1
