"""The plan file: there and back, and hostile ones."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from dseek.core.errors import ConfigError
from dseek.plan import Objective, Plan, load, make
from tests.plan.machines import SMALL, machine, shape_of


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make(SMALL, machine(), Objective(batch=2), encodings={"Q8_0": 10**9}, model="m", precision="int8")


def test_there_and_back(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    plan.save(path)
    assert load(path) == plan
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(ConfigError, match="cannot be written"):
        plan.save(path / "below-a-file.json")


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    with pytest.raises(ConfigError, match="dseek plan MODEL --save"):
        load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    for text in (b"", b"[]", b"{}", b"\xff", b"[" * 10**6, b"null", b"3"):
        path.write_bytes(text)
        with pytest.raises(ConfigError):
            load(path)
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(ConfigError, match="bytes long"):
        load(path)


def changed(plan: Plan, path: tuple[str | int, ...], value: Any) -> str:
    data = json.loads(plan.to_json())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 1, "version 3"),
        (("precision",), "int7", "one of fp32"),
        (("kernels",), "cuda", "native, torch"),
        (("layer_formats", 3, "down"), "i2", r"layer_formats\[3\].down"),
        (("layer_formats",), [], "one a layer, 30"),
        (("attention_patterns",), [], "one a layer, 30"),
        (("attention_patterns", 1, "window_tokens"), [64], "dense attention pattern with a window"),
        (
            ("attention_patterns", 2),
            {"kind": "window", "window_tokens": [64, 128], "top_blocks": 0, "far": False},
            "1, or one for each of 3 key-value heads",
        ),
        (("page_tokens",), 32, "64"),
        (("num_pages",), 2**40, "num_pages"),
        (("num_pages",), 0, "num_pages"),
        (("context_tokens",), 10**9, "context_tokens"),
        (("max_batch",), 10**6, "max_batch"),
        (("num_threads",), 0, "num_threads"),
        (("prefill_chunk_tokens",), -1, "prefill_chunk_tokens"),
        (("shape", "num_layers"), 10**12, "num_layers"),
        (("shape", "num_kv_heads"), 2, "multiple of num_kv_heads"),
        (("shape", "head_dim"), 63, "multiple of 16"),
        (("shape", "window_layers"), [True], "window_layers"),
        (("shape", "rope", "theta"), "x", "theta"),
        (("objective", "kind"), "speed", "objective"),
        (("objective", "max_quality_loss"), -1, "quality"),
        (("predicted", "prefill_tokens_s"), None, "prefill_tokens_s"),
        (("num_thread",), 1, "did you mean 'num_threads'"),
        (("cache_dtype",), ["bf16"], "cache_dtype"),
    ],
)
def test_values_that_no_planner_writes(plan: Plan, path: tuple[str | int, ...], value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan.from_json(changed(plan, path, value))


def test_mutated_plans_are_read_or_refused(plan: Plan) -> None:
    text = plan.to_json()
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        characters = list(text)
        for _ in range(generator.randint(1, 4)):
            characters[generator.randrange(len(characters))] = generator.choice('{}[]",:0123456789.-eaz\\\0é')
        mutated = "".join(characters)
        try:
            Plan.from_json(mutated)
        except ConfigError:
            refused += 1
    assert refused > 100


def test_a_plan_knows_its_model_and_predicts_other_jobs(plan: Plan) -> None:
    plan.check_model(SMALL)
    with pytest.raises(ConfigError, match="vocab_size is 49152; this model's is 5"):
        plan.check_model(shape_of(vocab_size=5))
    short = plan.predict(machine(), prompt_tokens=128, context_tokens=128, batch=1)
    long = plan.predict(machine(), prompt_tokens=128, context_tokens=8192, batch=1)
    assert short.decode_tokens_s > long.decode_tokens_s


def test_layers_may_have_formats_of_their_own(plan: Plan) -> None:
    mixed = tuple(
        dataclasses.replace(layer, down="bf16") if index < 3 else layer
        for index, layer in enumerate(plan.layer_formats)
    )
    other = dataclasses.replace(plan, layer_formats=mixed)
    assert Plan.from_json(other.to_json()) == other
    job = {"prompt_tokens": 128, "context_tokens": 128, "batch": 1}
    before, after = plan.predict(machine(), **job), other.predict(machine(), **job)
    assert after.weights_bytes > before.weights_bytes
    assert after.decode_tokens_s < before.decode_tokens_s
