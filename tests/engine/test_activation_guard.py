"""Falling back to a wider dtype where inputs leave their calibrated range, on PyTorch: what is counted and computed."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dseek.core import events
from dseek.core.errors import NotFiniteError
from dseek.engine.activation_guard import EVENT, ActivationGuard
from dseek.engine.engine import Engine
from dseek.engine.request import SamplingParams
from dseek.engine.torch_runner import TorchRunner
from dseek.models.decoder import Decoder
from dseek.models.files import ModelFiles, open_model
from dseek.plan.activation_limits import CalibratedInputs, LayerLimits, limits_of
from dseek.plan.formats import ROLES, LayerFormats
from tests.engine.test_torch_runner import make_plan
from tests.models import tiny


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with open_model(str(tiny.save("llama-odd-sizes", tmp_path_factory.mktemp("guarded")))) as opened:
        yield opened


def runner(files: ModelFiles, limits: tuple[LayerLimits, ...], *, scaled: float = 1.0, precision: str = "fp16") -> Any:
    """A runner whose second layer's `up` is `scaled` and its `down` the inverse: the same function, other ranges."""
    dtype = {"fp16": torch.float16, "fp32": torch.float32}[precision]
    decoder = Decoder.from_files(files, torch.float32).requires_grad_(False)
    block = decoder.model.layers[1]
    block.get_submodule("mlp.up_proj").weight.mul_(scaled)
    block.get_submodule("mlp.down_proj").weight.div_(scaled)
    guard = ActivationGuard(limits) if limits else None
    return TorchRunner(decoder.to(dtype), num_pages=40, page_tokens=16, context_tokens=128, guard=guard)


def logits(files: ModelFiles, tried: TorchRunner) -> np.ndarray:
    engine = Engine(files, make_plan(), tried)
    ids = tiny.token_ids(60, seed=3, vocab_size=files.shape.vocab_size)
    return np.concatenate([piece.copy() for _, piece in engine.logits(ids)])


def wide(files: ModelFiles) -> tuple[LayerLimits, ...]:
    """Limits far away."""
    return (LayerLimits(qkv=1e4, output=1e4, gate_up=1e4, down=1e4),) * files.shape.num_layers


def test_within_the_limits_nothing_is_counted(files: ModelFiles) -> None:
    tried = runner(files, wide(files))
    found = logits(files, tried)
    assert tried.guard.num_fallbacks == 0
    expected = logits(files, runner(files, (), precision="fp32"))
    assert np.abs(found - expected).max() < 0.02 * expected.std()


def test_beyond_a_limit_the_layer_is_computed_wider_and_counted(
    files: ModelFiles, caplog: pytest.LogCaptureFixture
) -> None:
    limits = list(wide(files))
    limits[1] = dataclasses.replace(limits[1], gate_up=0.5)
    heard: list[dict[str, Any]] = []
    unsubscribe = events.subscribe(EVENT, lambda **fields: heard.append(fields))
    tried = runner(files, tuple(limits))
    try:
        with caplog.at_level(logging.WARNING, logger="dseek.engine"):
            logits(files, tried)
            logits(files, tried)
    finally:
        unsubscribe()
    assert tried.guard.counts == {1: 2}
    assert [(entry["layer"], entry["role"], entry["num_rows"]) for entry in heard] == [(1, "gate_up", 60)] * 2
    assert heard[0]["largest"] > heard[0]["limit"] == 0.5
    assert len(caplog.records) == 1
    assert "layer 1" in caplog.text
    assert tried.guard.as_plain() == {"calls": 2, "by_layer": {"1": 2}}


def test_what_overflows_fp16_comes_out_as_in_fp32(files: ModelFiles) -> None:
    """With `up` a million times as large its outputs are infinite in fp16; nothing but the guard knows."""
    expected = logits(files, runner(files, (), precision="fp32"))
    with pytest.raises(NotFiniteError, match="not finite"):
        logits(files, runner(files, (), scaled=1e5))
    tried = runner(files, wide(files), scaled=1e5)
    # The weights themselves still fit into fp16.
    assert all(torch.isfinite(weight).all() for weight in tried._decoder.parameters())
    found = logits(files, tried)
    assert tried.guard.counts == {1: 1}
    assert np.abs(found - expected).max() < 0.1 * expected.std()


def test_answers_go_on_after_a_fallback(files: ModelFiles) -> None:
    tried = runner(files, wide(files), scaled=1e5)
    engine = Engine(files, make_plan(), tried)
    request = engine.add(tiny.token_ids(20, seed=1), SamplingParams(max_new_tokens=4, ignore_eos=True))
    while engine.has_work:
        engine.step()
    assert len(request.output().token_ids) == 4
    assert tried.guard.counts == {1: 4}


def test_a_guard_judges() -> None:
    guard = ActivationGuard((LayerLimits(qkv=2.0),))
    assert guard.judge(0, "qkv", 2.0) is None
    assert guard.judge(0, "down", 1e30) is None
    assert guard.judge(0, "block", 1e30) is None
    for role, largest in (("qkv", 2.1), ("qkv", math.nan), ("down", math.inf), ("block", math.nan)):
        trespass = guard.judge(0, role, largest)
        assert trespass is not None
        assert trespass.role == role


def test_limits_follow_the_formats() -> None:
    plain = dict.fromkeys(ROLES, (1.0, 2.0))
    rotated = dict.fromkeys(ROLES, (10.0, 20.0))
    inputs = CalibratedInputs(plain=plain, rotated=rotated)
    mixed = LayerFormats(qkv="i8c", output="bf16", gate_up="i4g", down="f16")
    assert limits_of([mixed, mixed], "native", inputs) == (
        LayerLimits(qkv=20.0, gate_up=2.0),
        LayerLimits(qkv=40.0, gate_up=4.0),
    )
    assert limits_of([LayerFormats.uniform("f16")] * 2, "torch", inputs)[1] == LayerLimits(
        qkv=4.0, output=4.0, gate_up=4.0, down=4.0
    )
    assert limits_of([LayerFormats.uniform("bf16")] * 2, "torch", inputs) == ()
    assert limits_of([mixed], "native", None) == ()


def test_a_plan_without_limits_has_no_guard(files: ModelFiles, tmp_path: Path) -> None:
    plan = make_plan(precision="fp16", attention_patterns=())
    assert TorchRunner.from_files(files, plan).guard is None
    plan.activation_limits = wide(files)
    assert TorchRunner.from_files(files, plan).guard is not None
