"""Limits on the inputs of integer projections in the native runner: what is found, and what is computed instead."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dseek import plan as planning
from dseek.cli.main import main
from dseek.core import events
from dseek.engine.activation_guard import EVENT
from dseek.engine.llm import LLM, load
from dseek.engine.request import SamplingParams
from dseek.models.files import open_model
from dseek.ops import native
from dseek.plan.activation_limits import LayerLimits
from dseek.plan.formats import LayerFormats
from dseek.plan.plan import Plan
from tests.models import tiny
from tests.plan.machines import machine

pytestmark = pytest.mark.native

IDS = tiny.token_ids(100, seed=9)


@pytest.fixture(scope="module", params=("llama-odd-sizes", "qwen2"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save(request.param, tmp_path_factory.mktemp(request.param)))


def make_plan(folder: str, weight_format: str, **changes: Any) -> Plan:
    """A plan with one format everywhere."""
    with open_model(folder) as files:
        made = planning.make(
            files.shape,
            machine(),
            planning.Objective(context_tokens=128, batch=1),
            encodings=files.encodings(),
            precision="int8",
            num_threads=2,
        )
    layers = (LayerFormats.uniform(weight_format),) * made.shape.num_layers  # type: ignore[arg-type]
    return dataclasses.replace(made, **{"layer_formats": layers, **changes})


def limits(plan: Plan, **narrow: float) -> tuple[LayerLimits, ...]:
    """Limits far away, but for some of layer 1."""
    far = LayerLimits(qkv=1e9, output=1e9, gate_up=1e9, down=1e9)
    return tuple(dataclasses.replace(far, **narrow) if layer == 1 else far for layer in range(plan.shape.num_layers))


def widened(plan: Plan) -> Plan:
    """The plan with layer 1 in bf16."""
    layers = list(plan.layer_formats)
    layers[1] = LayerFormats.uniform("bf16")
    return dataclasses.replace(plan, layer_formats=tuple(layers))


def counts(llm: LLM) -> dict[int, int]:
    guard = llm.engine.runner.guard
    assert guard is not None
    return guard.counts


def logits_of(folder: str, plan: Plan) -> np.ndarray:
    with load(folder, plan=plan) as llm:
        return llm.logits(IDS)


def test_limits_that_are_kept_change_nothing(folder: str) -> None:
    plan = make_plan(folder, "i8c")
    with load(folder, plan=dataclasses.replace(plan, activation_limits=limits(plan))) as llm:
        found = llm.logits(IDS)
        assert counts(llm) == {}
    assert np.array_equal(found, logits_of(folder, plan))


@pytest.mark.parametrize("role", ["qkv", "output", "gate_up", "down"])
def test_a_layer_beyond_a_limit_is_computed_in_bf16(folder: str, role: str) -> None:
    plan = make_plan(folder, "i8c")
    heard: list[dict[str, Any]] = []
    unsubscribe = events.subscribe(EVENT, lambda **fields: heard.append(fields))
    try:
        with load(folder, plan=dataclasses.replace(plan, activation_limits=limits(plan, **{role: 1e-3}))) as llm:
            found = llm.logits(IDS)
            assert counts(llm) == {1: 1}
            again = llm.logits(IDS)
            assert counts(llm) == {1: 2}
    finally:
        unsubscribe()
    assert [(entry["layer"], entry["role"], entry["num_rows"]) for entry in heard] == [(1, role, 100)] * 2
    expected = logits_of(folder, widened(plan))
    assert np.array_equal(found, expected)
    assert np.array_equal(again, expected)


@pytest.mark.parametrize("weight_format", ["i8c", "i8g", "i4g"])
def test_decoding_is_watched_in_every_integer_format(folder: str, weight_format: str) -> None:
    plan = make_plan(folder, weight_format)
    params = SamplingParams(max_new_tokens=5, ignore_eos=True)
    with load(folder, plan=dataclasses.replace(plan, activation_limits=limits(plan, down=1e-3))) as llm:
        found = llm.generate([IDS[:1]], params)[0].token_ids
        assert counts(llm) == {1: 5}
    with load(folder, plan=widened(plan)) as llm:
        assert list(found) == list(llm.generate([IDS[:1]], params)[0].token_ids)


def test_inputs_that_are_no_integers_are_not_watched(folder: str) -> None:
    plan = make_plan(folder, "bf16")
    with load(folder, plan=dataclasses.replace(plan, activation_limits=limits(plan, down=1e-3))) as llm:
        llm.logits(IDS)
        assert counts(llm) == {}


def test_it_is_reported(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(folder, "i8c")
    dataclasses.replace(plan, activation_limits=limits(plan, qkv=1e-3)).save(tmp_path / "plan.json")
    arguments = ["generate", folder, "the quick", "--plan", str(tmp_path / "plan.json"), "--max-tokens", "3"]
    assert main([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["fallbacks"] == {"calls": 3, "by_layer": {"1": 3}}
    assert main(arguments) == 0
    assert "3 times a layer was computed in a wider format" in capsys.readouterr().err


def test_what_the_decoder_refuses(folder: str) -> None:
    plan = make_plan(folder, "i8c")
    with load(folder, plan=plan) as llm:
        decoder = llm.engine.runner._decoder  # type: ignore[attr-defined]
        for layer, values in ((-1, [1.0] * 4), (99, [1.0] * 4), (0, [1.0] * 3), (0, [-1.0] * 4), (0, [np.nan] * 4)):
            with pytest.raises(ValueError):
                decoder.set_limits(layer, values)
        with pytest.raises(ValueError, match="no wide weights"):
            decoder.swap_wide(1)
        with pytest.raises(ValueError, match="out of range"):
            decoder.swap_wide(99)
        blob = native.require().pack_encoded("bf16", [("F32", 16, np.zeros(16 * 16 * 4, np.uint8))], 16, False)
        with pytest.raises(ValueError, match="needed"):
            decoder.set_wide(1, qkv=blob, output=blob, gate_up=blob, down=blob)
        assert decoder.take_exceeded() == []
