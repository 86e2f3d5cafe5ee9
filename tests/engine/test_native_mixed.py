"""Plans with a format of its own for every layer and role, on the native kernels."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dseek import plan as planning
from dseek.cli.main import main
from dseek.engine.llm import load
from dseek.engine.request import SamplingParams
from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from dseek.ops.linear.reference import round_weight
from dseek.plan import cost, mixing, quality
from dseek.plan.formats import VARIANTS, LayerFormats
from dseek.plan.plan import Plan
from dseek.plan.weights import Weights, uniform
from tests.models import tiny
from tests.plan.machines import machine

pytestmark = pytest.mark.native

ROUNDING = 0.05
"""Largest root mean square error, as a share of the logits' spread, that the arithmetic of rounded weights adds."""

PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@pytest.fixture(scope="module", params=("llama-odd-sizes", "qwen2-window"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save(request.param, tmp_path_factory.mktemp(request.param)))


def make_plan(folder: str, precision: str) -> Plan:
    with open_model(folder) as files:
        return planning.make(
            files.shape,
            machine(),
            planning.Objective(context_tokens=128, batch=1),
            encodings=files.encodings(),
            precision=precision,
            num_threads=2,
        )


def with_formats(plan: Plan, *layers: LayerFormats) -> Plan:
    """The plan with these formats in turn."""
    formats = tuple(layers[layer % len(layers)] for layer in range(plan.shape.num_layers))
    return dataclasses.replace(plan, layer_formats=formats)


def reference(folder: str, plan: Plan, ids: list[int]) -> np.ndarray:
    """Logits in fp32 of the weights rounded as the plan says, each by its own format."""
    with open_model(folder) as files:
        decoder = Decoder.from_files(files, torch.float32).eval()
    with torch.inference_mode():
        for layer, formats in enumerate(plan.layer_formats):
            for role, weight_format in formats.by_role().items():
                for name in PARTS[role]:
                    weight = decoder.get_submodule(f"model.layers.{layer}.{name}").weight
                    weight.copy_(round_weight(weight.clone(), weight_format))
        return decoder(torch.tensor([ids]))[0].numpy()


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2)) / expected.std())


def test_every_projection_runs_in_its_own_format(folder: str) -> None:
    base = make_plan(folder, "fp32")
    here = LayerFormats(qkv="i4g", output="f32", gate_up="bf16", down="i8g")
    there = LayerFormats(qkv="f32", output="i4g", gate_up="i4g", down="f16")
    plan, swapped = with_formats(base, here, there), with_formats(base, there, here)
    ids = tiny.token_ids(128, seed=9)
    with load(folder, plan=plan) as llm:
        found = llm.logits(ids)
    right = error(found, reference(folder, plan, ids))
    assert right < ROUNDING
    # The same formats in the other layers are another model.
    assert error(found, reference(folder, swapped, ids)) > 2 * right


def mixture(base: Plan, accepted_loss: float) -> Plan:
    """What the planner mixes of int8 and int4 to save bytes (of so small a model it would not be worth it)."""
    losses = quality.prior_losses(base.shape, {"F32": base.shape.num_parameters()})
    wide, narrow = (uniform(variant, base.shape, losses) for variant in VARIANTS[-2:])

    def num_bytes(weights: Weights) -> float:
        return cost.weight_bytes(base.shape, dataclasses.replace(base, layer_formats=weights.layer_formats).layout())[0]

    mixed = mixing.mix(wide, [narrow], losses, accepted_loss, num_bytes)
    assert mixed is not None
    assert mixed.loss <= accepted_loss
    return dataclasses.replace(base, precision="mixed", layer_formats=mixed.layer_formats)


def test_a_mixture_is_closer_to_fp32_than_its_coarser_format(folder: str) -> None:
    ids = tiny.token_ids(128, seed=9)
    plans = {name: make_plan(folder, name) for name in ("int8", "int4")}
    plans["mixed"] = mixture(plans["int8"], 0.05)
    expected = tiny.reference_logits(folder, ids)
    errors = {}
    for name, plan in plans.items():
        with load(folder, plan=plan) as llm:
            errors[name] = error(llm.logits(ids), expected)
    assert errors["int8"] < errors["mixed"] < errors["int4"]


def test_generate_takes_a_mixed_plan(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = mixture(make_plan(folder, "int8"), 0.1)
    mixed.save(tmp_path / "plan.json")
    arguments = ["generate", folder, "the quick", "--plan", str(tmp_path / "plan.json"), "--max-tokens", "6", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["precision"] == "mixed"
    with load(folder, plan=mixed) as llm:
        assert found["token_ids"] == list(llm.generate("the quick", SamplingParams(max_new_tokens=6))[0].token_ids)
    assert main([*arguments, "--precision", "int8"]) == 2
    assert "contradicts the plan, which says mixed" in capsys.readouterr().err
