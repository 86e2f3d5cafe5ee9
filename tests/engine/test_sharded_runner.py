"""Long prompts over ranks: bit for bit what one rank computes, whatever the pattern, the cache and the cut."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dseek import plan as planning
from dseek.core.attention_pattern import DENSE, AttentionPattern
from dseek.models.files import open_model
from dseek.models.gate_file import FORMAT, fingerprint
from dseek.plan.plan import Plan
from tests.engine.sharded_scenario import Case, play, play_all
from tests.models import tiny
from tests.parallel.distributed import run_ranks
from tests.plan.machines import machine

pytestmark = pytest.mark.native

WINDOW = AttentionPattern(kind="window", window_tokens=(128,))
BLOCKS = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=2)
FAR = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=1, far=True)
ROWS = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=6, min_share=0.1)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Grouped heads everywhere but in one; of every kind of cache, weights and attention one at least."""
    folders = {}
    for name in ("llama-nine-heads", "llama-64-mha", "mistral-window", "gate"):
        path = tiny.save("llama-nine-heads" if name == "gate" else name, tmp_path_factory.mktemp(name))
        settings = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 4096}))
        folders[name] = path
    save_gate(folders["gate"])

    def case(model: str, pattern: AttentionPattern, precision: str, cache: str, **changes: Any) -> Case:
        plan = make_plan(folders[model], pattern, precision, cache)
        return Case(folder=str(folders[model]), plan=plan.to_json(), **changes)

    nine, heads = "llama-nine-heads", "llama-64-mha"
    return {
        "dense zigzag": case(nine, DENSE, "fp32", "fp32", strategy="zigzag"),
        "dense contiguous": case(nine, DENSE, "bf16", "bf16", strategy="contiguous", num_tokens=1281),
        "dense in chunks": case(nine, DENSE, "int8", "int8", strategy="zigzag", chunk=1090),
        "int4": case(nine, DENSE, "int4", "int8", strategy="zigzag", num_tokens=1345),
        "sliding": case("mistral-window", DENSE, "bf16", "bf16", strategy="contiguous"),
        "window": case(nine, WINDOW, "int8", "bf16", strategy="contiguous", chunk=1100),
        "blocks": case(heads, BLOCKS, "fp32", "fp32", strategy="contiguous"),
        "blocks folded": case(nine, BLOCKS, "int8", "int8", strategy="zigzag", num_tokens=1409),
        "far": case(nine, FAR, "bf16", "bf16", strategy="contiguous", chunk=1090),
        "rows": case(heads, ROWS, "bf16", "bf16", strategy="zigzag", chunk=1030),
        "gate": case("gate", ROWS, "int8", "int8", strategy="contiguous", answers=True),
        "short": case(nine, BLOCKS, "bf16", "bf16", strategy="zigzag", num_tokens=5),
        "auto": case(nine, ROWS, "bf16", "bf16", strategy="auto"),
    }


def make_plan(folder: Path, pattern: AttentionPattern, precision: str, cache: str) -> Plan:
    """A plan of one thread with room for two texts."""
    with open_model(str(folder)) as files:
        plan = planning.make(
            files.shape,
            machine(),
            planning.Objective(context_tokens=1536, batch=1),
            encodings=files.encodings(),
            precision=precision,
            cache_dtype=cache,
            num_threads=1,
        )
    patterns = (pattern,) * plan.shape.num_layers
    return dataclasses.replace(plan, attention_patterns=patterns, num_pages=64, prefill_chunk_tokens=1024)


def save_gate(folder: Path) -> None:
    """A random gate beside a model, one of whose heads sees everything."""
    rng = np.random.default_rng(0)
    with open_model(str(folder)) as files:
        shape, model = files.shape, fingerprint(files)
    heads, groups, width, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim, 32
    sizes = {
        "query": (heads, width, dim),
        "key": (3, groups, 3 * width, dim),
        "query_gain": (heads, dim),
        "key_gain": (3, groups, dim),
        "scale": (heads,),
        "own": (heads, width),
        "own_bias": (heads,),
    }
    arrays = {}
    for layer in range(shape.num_layers):
        for part, size in sizes.items():
            arrays[f"layers.{layer}.{part}"] = 0.3 * rng.standard_normal(size, dtype=np.float32)
        arrays[f"layers.{layer}.dense"] = np.eye(groups, dtype=np.float32)[layer % groups]
    metadata = {"format": FORMAT, "theta": "10000.0", "model": model}
    save_file(arrays, str(folder / "gate.safetensors"), metadata=metadata)


@pytest.fixture(scope="module")
def alone(cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    return {name: play(case, sharded=False) for name, case in cases.items()}


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_compute_what_one_computes(
    world_size: int, cases: dict[str, Case], alone: dict[str, dict[str, Any]]
) -> None:
    played = {1: ("gate", "short"), 8: ("dense in chunks", "int4", "blocks", "far", "rows", "gate", "short")}
    cases = {name: cases[name] for name in played.get(world_size, cases)}
    ranks = run_ranks(world_size, play_all, cases)
    for name in cases:
        expected = alone[name]
        for rank, results in enumerate(ranks):
            found = results[name]
            for key, value in expected.items():
                if isinstance(value, np.ndarray):
                    np.testing.assert_array_equal(found[key], value, err_msg=f"{name}, {key}, rank {rank}")
                elif key != "sharded_batches":
                    assert found[key] == value, f"{name}, {key}, rank {rank}"
            if world_size > 1 and name not in ("short", "auto"):
                assert found["sharded_batches"] >= 2, name
            if world_size == 1 or name == "short":
                assert found["sharded_batches"] == 0, name
