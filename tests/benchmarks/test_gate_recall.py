"""What the experiment on recall counts is what rows of the operator attend to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.experiments import gate_recall
from benchmarks.rows.attention_quality import Budget
from dseek.core.attention_pattern import BLOCK_TOKENS
from dseek.models.block_mass import block_mass
from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from dseek.models.gate_file import Gates, LayerGate
from dseek.models.gate_scorer import GateRowScorer
from dseek.models.projections import layer_projections
from dseek.ops.attention.row_selection import select_rows
from dseek.train.gate_samples import key_statistics
from dseek.train.gate_training import gates_of
from tests.models import tiny

TOKENS = 2 * gate_recall.ROWS


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    with open_model(str(tiny.save("llama", tmp_path_factory.mktemp("models") / "tiny"))) as files:
        return Decoder.from_files(files, torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def gates(decoder: Decoder) -> Gates:
    draw, shape = np.random.default_rng(0), decoder.shape
    heads, groups, width, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim, 16

    def normal(*sizes: int) -> np.ndarray:
        return draw.normal(size=sizes).astype(np.float32)

    layers = tuple(
        LayerGate(
            query=normal(heads, width, dim),
            key=normal(1, groups, 3 * width, dim),
            query_gain=normal(heads, dim),
            key_gain=normal(1, groups, dim),
            scale=normal(heads),
            own=normal(heads, width),
            own_bias=normal(heads),
            dense=np.float32([0, layer]),
            share_factor=np.float32([0.5, 2.0]),
        )
        for layer in range(shape.num_layers)
    )
    return Gates(layers, 1e4, "tiny")


@pytest.fixture(scope="module")
def token_ids() -> torch.Tensor:
    return torch.randint(3, 380, (TOKENS,), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def test_rows_choose_as_the_operator_does(decoder: Decoder, gates: Gates, token_ids: torch.Tensor) -> None:
    budget, rows_R = Budget(min_share=0.08), torch.arange(TOKENS)
    num_opened = []
    for layer, (found, gate) in enumerate(zip(layer_projections(decoder, token_ids), gates_of(gates), strict=True)):
        scorer = GateRowScorer(gates, layer, found.queries, found.rotated_queries, found.keys, found.rotated_keys)
        keep_GRB = gate_recall.Selection(gates, layer, gate, budget).of(
            "gate",
            rows_R,
            block_mass(found.rotated_queries, found.rotated_keys, rows_R),
            (found.queries, found.rotated_queries),
            (key_statistics(found.keys), found.rotated_keys.unflatten(0, (-1, BLOCK_TOKENS)).mean(1)),
        )
        stored = gates.layers[layer]
        for group, factor in enumerate(stored.share_factor):
            chosen_GTB = select_rows(
                found.rotated_queries,
                found.rotated_keys,
                near_blocks=(1, 1),
                min_share=budget.min_share * float(factor),
                top_blocks=64,
                scorer=scorer,
            )
            everything_TB = torch.arange(TOKENS // BLOCK_TOKENS)[None] <= (rows_R // BLOCK_TOKENS)[:, None]
            assert torch.equal(keep_GRB[group], everything_TB if stored.dense[group] else chosen_GTB[group])
            num_opened.append(int(keep_GRB[group].sum()))
    assert len(set(num_opened)) > 1


def test_what_is_applied_is_what_is_counted(decoder: Decoder, gates: Gates, token_ids: torch.Tensor) -> None:
    dense_T, layers = gate_recall.run(decoder, gates, token_ids, None, Budget(min_share=0.08), 128)
    for index, layer in enumerate(layers):
        for way in gate_recall.WAYS:
            assert layer.near - 1e-6 <= layer.kept[way] <= 1 + 1e-6 and 0 < layer.density[way] <= 1
            changed_T, nothing = gate_recall.run(decoder, gates, token_ids, way, Budget(min_share=0.08), 128)
            assert not nothing and not torch.allclose(changed_T, dense_T)
        assert index == 0 or layer.density["gate"] > 0.5  # one of its two heads sees everything
    for way in gate_recall.WAYS:
        same_T, _ = gate_recall.run(decoder, gates, token_ids, way, Budget(min_share=1e-30), 128)
        assert torch.allclose(same_T, dense_T, atol=1e-4)


def test_a_user_is_told_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text = tiny.save("llama", tmp_path / "m"), tmp_path / "t.txt"
    text.write_text("words")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["gate_recall", str(text), "--model", str(folder)])
        assert gate_recall.main() == 2
    assert "train one with `dseek train-gate`" in capsys.readouterr().err
