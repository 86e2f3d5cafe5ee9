"""Patterns of attention on the native kernels: the same result however a text is cut, and dense with enough blocks."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dseek import plan as planning
from dseek.core.attention_pattern import DENSE, AttentionPattern
from dseek.core.errors import ConfigError
from dseek.engine.batch import Batch
from dseek.engine.llm import load
from dseek.engine.runner import Runner
from dseek.engine.torch_runner import TorchRunner
from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from dseek.models.gate_file import FILE_NAME, fingerprint
from dseek.models.projections import project
from dseek.ops.attention.dynamic_reference import dynamic_attention_blocked
from dseek.ops.attention.rotary import rotate
from dseek.plan.plan import Plan
from dseek.train.gate_training import GateTraining, new_gates, save_gates
from tests.models import tiny
from tests.plan.machines import machine

CASES = ("llama-64-mha", "llama-nine-heads")
NUM_TOKENS = 1300
"""20 blocks and a part: two cells of 512, four of 64 besides, and the newest."""
WINDOW = AttentionPattern(kind="window", window_tokens=(128,))
TOLERANCE = 2e-4
"""Of logits of some 3 to 10 in fp32."""
PATTERNS = {
    "window": WINDOW,
    "dynamic": AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=2),
    "rows": AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=6, min_share=0.1),
    "far": AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=1, far=True),
}
BIASES = ([[-2.0, 1.0]], [[0.5, 3.0, -4.0]])
"""By level; fewer levels than the cache has, and as many."""


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny.save(request.param, tmp_path_factory.mktemp(request.param))
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 4096}))
    return path


def make_plan(folder: Path, pattern: AttentionPattern, precision: str = "fp32") -> Plan:
    with open_model(str(folder)) as files:
        plan = planning.make(
            files.shape,
            machine(),
            planning.Objective(context_tokens=1408, batch=1),
            encodings=files.encodings(),
            precision=precision,
            num_threads=2,
        )
    return dataclasses.replace(plan, attention_patterns=(pattern,) * plan.shape.num_layers)


def logits_of(folder: Path, plan: Plan, chunk: int, ids: list[int]) -> np.ndarray:
    with load(str(folder), plan=dataclasses.replace(plan, prefill_chunk_tokens=chunk)) as llm:
        return llm.logits(ids)


pytestmark = pytest.mark.native


@pytest.mark.parametrize("name", PATTERNS)
def test_decode_and_any_chunks_equal_prefill(folder: Path, name: str) -> None:
    plan = make_plan(folder, PATTERNS[name])
    ids = tiny.token_ids(NUM_TOKENS, seed=3)
    whole = logits_of(folder, plan, 256, ids)
    dense = logits_of(folder, make_plan(folder, DENSE), 256, ids)
    # Up to the window there is nothing to leave out; later the pattern must show.
    np.testing.assert_allclose(whole[:128], dense[:128], atol=TOLERANCE)
    assert np.abs(whole - dense)[640:].max() > 0.05
    for chunk in (1, 19, 64, 100):
        np.testing.assert_allclose(logits_of(folder, plan, chunk, ids), whole, atol=TOLERANCE, err_msg=f"chunk {chunk}")


@pytest.mark.parametrize("num_tokens", [5, 100])
@pytest.mark.parametrize(("cache_dtype", "share"), [("bf16", 0.01), ("int8", 0.04)])
def test_narrow_caches_hold_what_wide_ones_do(folder: Path, cache_dtype: str, share: float, num_tokens: int) -> None:
    # The last page is partly filled: what no token was written to, scales of 0 among it, must count for nothing.
    plan = make_plan(folder, DENSE)
    ids = tiny.token_ids(num_tokens, seed=11)
    wide = logits_of(folder, plan, 256, ids)
    for chunk in (1, 19, 256):
        narrow = logits_of(folder, dataclasses.replace(plan, cache_dtype=cache_dtype), chunk, ids)
        assert np.linalg.norm(narrow - wide) < share * np.linalg.norm(wide), f"chunk {chunk}"
    assert np.abs(narrow - wide).max() > TOLERANCE, "the cache is narrower"


def biased(folder: Path, levels: list[list[float]], target: Path) -> tuple[Path, list[torch.Tensor]]:
    """A copy of the model, beside it a gate that has biases of far cells: other ones in every layer and head."""
    shutil.copytree(folder, target)
    with open_model(str(folder)) as files:
        shape = files.shape
        gates = new_gates(shape, GateTraining(gate_dim=16))
        drawn = [torch.randn(shape.num_heads, 1) + torch.tensor(levels) for _ in range(shape.num_layers)]
        biases = [bias.bfloat16().float() for bias in drawn]
        dense = torch.zeros(shape.num_layers, shape.num_kv_heads)
        save_gates(gates, dense, 1e4, fingerprint(files), target / FILE_NAME, level_biases=biases)
    return target, biases


@torch.inference_mode()
def reference_logits(folder: Path, pattern: AttentionPattern, biases: list[torch.Tensor], ids: list[int]) -> np.ndarray:
    """The model in PyTorch with the definition of dynamic attention in every layer."""
    with open_model(str(folder)) as files:
        decoder = Decoder.from_files(files)
    model = decoder.model
    x_TD = model.embed_tokens(torch.tensor(ids))
    rotation = model.rotary_emb(torch.arange(len(ids)), x_TD.dtype, None)
    for block, bias in zip(model.layers, biases, strict=True):
        attention = block.self_attn
        q, k, v = project(attention, block.input_layernorm(x_TD))
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        out_THd = dynamic_attention_blocked(q, k, v, pattern, level_bias_HL=bias)
        x_TD = x_TD + attention.o_proj(out_THd.flatten(1))
        x_TD = x_TD + block.mlp(block.post_attention_layernorm(x_TD))
    logits: np.ndarray = decoder.lm_head(model.norm(x_TD)).numpy()
    return logits


@pytest.mark.parametrize("levels", BIASES)
def test_biases_of_far_cells_are_those_of_the_definition(
    folder: Path, tmp_path: Path, levels: list[list[float]]
) -> None:
    torch.manual_seed(7)
    gated, biases = biased(folder, levels, tmp_path / "gated")
    plan = make_plan(folder, PATTERNS["far"])
    ids = tiny.token_ids(NUM_TOKENS, seed=3)
    whole = logits_of(gated, plan, 256, ids)
    assert np.abs(whole - logits_of(folder, plan, 256, ids))[640:].max() > 0.05, "the biases do something"
    for chunk in (1, 100):
        np.testing.assert_allclose(logits_of(gated, plan, chunk, ids), whole, atol=TOLERANCE, err_msg=f"chunk {chunk}")
    # The last level that is stored stands for those above.
    last = biases[0].shape[1] - 1
    expected = reference_logits(folder, PATTERNS["far"], [bias[:, [0, min(1, last), last]] for bias in biases], ids)
    np.testing.assert_allclose(whole, expected, atol=TOLERANCE)


def test_biases_mean_nothing_without_far_cells(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(8)
    gated, _ = biased(folder, BIASES[0], tmp_path / "gated")
    ids = tiny.token_ids(700, seed=3)
    for name in ("window", "dynamic"):
        plan = make_plan(folder, PATTERNS[name])
        np.testing.assert_array_equal(logits_of(gated, plan, 256, ids), logits_of(folder, plan, 256, ids))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("way", [{}, {"far": True}, {"min_share": 1e-12}])
def test_enough_blocks_are_dense_attention_bit_for_bit(folder: Path, precision: str, way: dict[str, float]) -> None:
    enough = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=22, **way)  # type: ignore[arg-type]
    ids = tiny.token_ids(NUM_TOKENS, seed=4)
    for chunk in (100, 256):
        dense = logits_of(folder, make_plan(folder, DENSE, precision), chunk, ids)
        np.testing.assert_array_equal(logits_of(folder, make_plan(folder, enough, precision), chunk, ids), dense)


def test_decode_with_enough_blocks_is_dense_attention(folder: Path) -> None:
    """Not bit for bit: where a block begins, a step with a pattern does not cut the context in parts."""
    enough = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=22)
    ids = tiny.token_ids(NUM_TOKENS, seed=4)
    dense = logits_of(folder, make_plan(folder, DENSE), 1, ids)
    np.testing.assert_allclose(logits_of(folder, make_plan(folder, enough), 1, ids), dense, atol=TOLERANCE)


def run(runner: Runner, ids: list[int], first: int, pages: np.ndarray, chunk: int) -> np.ndarray:
    """Compute the positions from `first` on in chunks; gives the logits of the last."""
    logits = np.empty((0, 0), dtype=np.float32)
    for start in range(first, len(ids), chunk):
        piece = np.array(ids[start : start + chunk], dtype=np.int32)
        positions = np.arange(start, start + len(piece), dtype=np.int32)
        row_starts = np.array([0, len(piece)], dtype=np.int32)
        last_row = np.array([len(piece) - 1], dtype=np.int32)
        logits = runner.forward(Batch(piece, positions, row_starts, pages[None], last_row))
    return logits.copy()


@pytest.mark.parametrize("name", ["dynamic", "rows", "far"])
@pytest.mark.parametrize("kept", [333, 512, 575, 1024])
def test_going_back_and_sharing_a_prefix_leave_no_trace(folder: Path, name: str, kept: int) -> None:
    plan = dataclasses.replace(make_plan(folder, PATTERNS[name]), num_pages=66)
    first = tiny.token_ids(NUM_TOKENS, seed=5)
    other = first[:kept] + tiny.token_ids(NUM_TOKENS - kept, seed=6)
    pages = np.arange(22, dtype=np.int32)
    shared = np.concatenate([pages[: kept // 64], np.arange(22 + kept // 64, 44, dtype=np.int32)])
    with load(str(folder), plan=plan) as llm:
        runner = llm.engine.runner
        fresh = run(runner, other, 0, np.arange(44, 66, dtype=np.int32), 100)
        before = run(runner, first, 0, pages, 100)
        # A second sequence takes over the whole pages that both have in common, and goes on in pages of its own.
        np.testing.assert_allclose(run(runner, other, kept // 64 * 64, shared, 70), fresh, atol=TOLERANCE)
        # The first one goes back to the middle of a block and on with other tokens.
        np.testing.assert_allclose(run(runner, other, kept, pages, 90), fresh, atol=TOLERANCE)
        assert np.abs(before - fresh).max() > 0.05


def test_layers_and_heads_may_differ(folder: Path) -> None:
    plan = make_plan(folder, DENSE)
    heads = plan.shape.num_kv_heads
    narrow = AttentionPattern(kind="dynamic", window_tokens=(64, 256, 128)[:heads], top_blocks=1)
    mixed = dataclasses.replace(plan, attention_patterns=(DENSE, narrow))
    ids = tiny.token_ids(NUM_TOKENS, seed=8)
    whole = logits_of(folder, mixed, 256, ids)
    np.testing.assert_allclose(logits_of(folder, mixed, 1, ids), whole, atol=TOLERANCE)
    assert np.abs(whole - logits_of(folder, plan, 256, ids)).max() > 0.05


def test_attention_asked_for_is_had(folder: Path) -> None:
    ids = tiny.token_ids(700, seed=9)
    wishes = {"attention": "dynamic", "attention_window": 128, "attention_top_blocks": 3, "attention_far": False}
    with load(str(folder), machine=machine(), precision="fp32", context=1024, **wishes) as llm:  # type: ignore[arg-type]
        expected = AttentionPattern(kind="dynamic", window_tokens=(128,), top_blocks=3)
        assert set(llm.plan.attention_patterns) == {expected}
        output = llm.generate([ids], max_new_tokens=80, ignore_eos=True)[0]
        logits = llm.logits([*ids, *output.token_ids])
        assert tuple(logits[len(ids) - 1 : -1].argmax(axis=1)) == output.token_ids
        with pytest.raises(ConfigError, match="contradicts the plan, which says window 128 and 3 blocks"):
            load(str(folder), plan=llm.plan, attention="dense")
        load(str(folder), plan=llm.plan, attention="dynamic", attention_window=128).close()


def test_pytorch_refuses_patterns(folder: Path) -> None:
    plan = make_plan(folder, WINDOW)
    with open_model(str(folder)) as files, pytest.raises(ConfigError, match="window attention in layer 0 on PyTorch"):
        TorchRunner.from_files(files, plan)
