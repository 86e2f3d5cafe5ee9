"""Profiles of native runs: clocks that add up, work that is that of the shapes, and results that stay the same."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from dseek import plan as planning
from dseek.cli import measuring
from dseek.cli.main import main
from dseek.core import events
from dseek.engine.llm import LLM, load
from dseek.models.files import open_model
from dseek.plan.rates import Rates, visible_pairs
from dseek.profiler import Profile, profile
from dseek.profiler.advice import advise
from dseek.profiler.native_work import LINEAR_NAMES
from dseek.profiler.trace import trace_events
from tests.models import tiny
from tests.plan.machines import machine

pytestmark = pytest.mark.native

NUM_PROMPT, NUM_NEW = 200, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save("llama-64-mha", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def llm(folder: str) -> LLM:
    with open_model(folder) as files:
        plan = planning.make(
            files.shape,
            machine(),
            planning.Objective(context_tokens=256, batch=2),
            encodings=files.encodings(),
            precision="bf16",
            num_threads=2,
            prefill_chunk_tokens=512,
        )
    return load(folder, plan=plan)


@pytest.fixture(scope="module")
def report(llm: LLM) -> Profile:
    with profile(title="tiny", machine=machine(), use_torch=False) as session:
        llm.generate([tiny.token_ids(NUM_PROMPT)], max_new_tokens=NUM_NEW, ignore_eos=True)
    return session.result


def test_the_operators_add_up_to_the_run(report: Profile) -> None:
    assert sum(record.seconds for record in report.operators) == pytest.approx(report.wall_s, rel=0.02)
    assert {record.phase for record in report.operators} == {"prefill", "decode", ""}
    for phase, calls in (("prefill", 1), ("decode", NUM_NEW - 1)):
        for layer in range(2):
            names = {
                record.name: record for record in report.operators if (record.phase, record.layer) == (phase, layer)
            }
            assert {*LINEAR_NAMES.values(), "attention", "input_norm", "post_attention_norm"} <= set(names)
            assert all(record.calls == calls for record in names.values())


def test_operations_are_those_of_the_shapes(llm: LLM, report: Profile) -> None:
    shape = llm.shape
    sizes = {LINEAR_NAMES[role]: size for role, size in shape.linear_sizes().items()}
    decode = {(record.layer, record.name): record for record in report.operators if record.phase == "decode"}
    prefill = {(record.layer, record.name): record for record in report.operators if record.phase == "prefill"}
    for name, (outputs, inputs) in sizes.items():
        assert decode[0, name].flops == 2 * outputs * inputs * (NUM_NEW - 1)
        assert prefill[0, name].flops == 2 * outputs * inputs * NUM_PROMPT
    # Behind the last layer's attention only the row with logits goes on.
    assert prefill[1, "qkv_proj"].flops == prefill[0, "qkv_proj"].flops
    assert prefill[1, "down_proj"].flops == 2 * math.prod(sizes["down_proj"])
    assert prefill[0, "attention"].flops == 4 * shape.query_size * visible_pairs(NUM_PROMPT, NUM_PROMPT)
    contexts = range(NUM_PROMPT + 1, NUM_PROMPT + NUM_NEW)
    assert decode[0, "attention"].flops == 4 * shape.query_size * sum(contexts)
    assert decode[0, "gate_up_proj"].num_bytes >= 2 * math.prod(sizes["gate_up_proj"]) * (NUM_NEW - 1)
    assert decode[0, "down_proj"].roof == "memory"
    assert prefill[None, "lm_head"].flops == 2 * shape.vocab_size * shape.hidden_size


def test_the_timeline_agrees_with_the_counters(report: Profile) -> None:
    assert report.num_lost_stretches == 0
    by_name: dict[str, float] = {}
    for stretch in report.stretches:
        assert stretch.begin_s >= 0
        by_name[stretch.name] = by_name.get(stretch.name, 0.0) + stretch.seconds
    threads = {stretch.track for stretch in report.stretches}
    for name in ("down_proj", "attention", "lm_head"):
        counted = sum(record.seconds for record in report.operators if record.name == name)
        assert by_name[name] / len(threads) == pytest.approx(counted, rel=0.01, abs=1e-6)
    for track in threads:
        ends = 0.0
        for stretch in (entry for entry in report.stretches if entry.track == track):
            assert stretch.begin_s >= ends - 1e-9
            ends = stretch.begin_s + stretch.seconds
    trace = json.loads(json.dumps(trace_events(report)))
    bars = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(bars) == len(report.stretches)
    assert all(event["dur"] >= 0 and event["pid"] == 1 for event in bars)


def test_nothing_changes_and_the_clocks_stop(llm: LLM) -> None:
    ids = tiny.token_ids(100, seed=3)
    before = llm.logits(ids)
    seen: list[np.ndarray] = []
    unsubscribe = events.subscribe("engine.native_forward", lambda nanoseconds, **_: seen.append(nanoseconds))
    during = llm.logits(ids)
    unsubscribe()
    count = len(seen)
    after = llm.logits(ids)
    np.testing.assert_array_equal(before, during)
    np.testing.assert_array_equal(before, after)
    assert count == len(seen) > 0
    assert seen[0].shape == (2, llm.shape.num_layers + 1, 16)
    assert (seen[0] >= 0).all()
    decoder = llm.engine.runner._decoder  # type: ignore[attr-defined]
    assert decoder.timings()[0].shape[0] == 0
    with pytest.raises(ValueError, match="stretches"):
        decoder.set_timing(True, 2**40)


def test_a_cure_is_priced_by_the_rates(report: Profile) -> None:
    (down, *_rest) = (record for record in report.operators if (record.phase, record.name) == ("decode", "down_proj"))
    slow = [
        dataclasses.replace(down, layer=layer, place=f"layer {layer}", seconds=1.0, dimensions=(1, 2048, 5632))
        for layer in (7, 8)
    ]
    rates = Rates(machine(), "native", 2)
    best = min(rates.linear_s(name, 1, 2048, 5632, machine().cold_bytes) for name in ("i8c", "i8g"))
    ratio = best / rates.linear_s("bf16", 1, 2048, 5632, machine().cold_bytes)
    together, first, second = advise(slow, machine(), None, 2, wall_s=4.0)
    assert together.saves_s == pytest.approx(2 * first.saves_s)
    assert first.saves_s == pytest.approx(1 - ratio)
    assert first.text.startswith("layer 7 down_proj (decode): 25 % of time, memory bound, int")
    assert "down_proj of 2 layers (decode): 50 % of time" in together.text
    assert second.place == "layer 8"
    narrow = [dataclasses.replace(record, dtype="i8c") for record in slow]
    assert "int4 would save" in advise(narrow, machine(), None, 2, wall_s=4.0)[0].text
    assert advise([dataclasses.replace(slow[0], dtype="i4g")], machine(), None, 2, wall_s=4.0) == ()


def test_the_verb_writes_every_report(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "load_or_measure", lambda **_: machine())
    monkeypatch.setattr("dseek.cli.report.planned_machine", lambda _: machine())
    options = ["--precision", "fp32", "--prompt-tokens", "40", "--max-tokens", "3", "--batch", "2"]
    files = {name: str(tmp_path / name) for name in ("report.html", "trace.json", "board")}
    outputs = ["--html", files["report.html"], "--trace", files["trace.json"], "--tensorboard", files["board"]]
    assert main(["profile", folder, *options, *outputs, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["wall_s"] > 0
    assert {record["phase"] for record in shown["by_layer"]} >= {"prefill", "decode"}
    assert "down_proj" in Path(files["report.html"]).read_text()
    assert json.loads(Path(files["trace.json"]).read_text())["traceEvents"]
    assert len(list((tmp_path / "board").glob("events.out.tfevents.*"))) == 1
    assert main(["profile", folder, *options, "--html", str(tmp_path / "board")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["profile", folder, *options, "--top", "3"]) == 0
    assert "of roof" in capsys.readouterr().out
