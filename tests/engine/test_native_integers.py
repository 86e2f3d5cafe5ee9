"""Folders of integers on the native kernels: planned in the format that holds them, packed as they are, run."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dseek import plan as planning
from dseek.cli.main import build_parser, main
from dseek.cli.precision_options import precision_from
from dseek.core.errors import ConfigError
from dseek.engine.llm import load
from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from dseek.ops.linear.reference import round_rows
from dseek.plan import quality
from dseek.plan.formats import AS_GIVEN, VARIANTS, LayerFormats, WeightFormat, packed_bytes, variants_for
from dseek.plan.plan import Plan
from tests.models import tiny
from tests.plan.machines import machine

CASES = {
    "i8p": ["int8"],
    "i8g": ["int8", "--group-size", "32"],
    "i4g": ["int4", "--no-symmetric", "--group-size", "64"],
}


@pytest.fixture(scope="module", params=CASES)
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[WeightFormat, str]:
    """The format that is exact, and the folder."""
    base = tmp_path_factory.mktemp("m")
    model = tiny.save("llama-64-mha", base / "m")
    arguments = ["quantize", str(model), "--out", str(base / "out"), "--enable_quantization", *CASES[request.param]]
    assert main(arguments) == 0
    return request.param, str(base / "out")


def make_plan(folder: str, **options: str | None) -> Plan:
    with open_model(folder) as files:
        return planning.make(
            files.shape,
            machine(),
            planning.Objective(context_tokens=128, batch=1, max_quality_loss=0.0011),
            encodings=files.encodings(),
            num_threads=2,
            **options,
        )


def test_the_plan_takes_the_format_that_holds_them(quantised: tuple[WeightFormat, str]) -> None:
    weight_format, folder = quantised
    plan = make_plan(folder, precision="int4" if weight_format == "i4g" else "int8")
    if weight_format != "i8p":
        assert {name for layer in plan.layer_formats for name in layer.by_role().values()} == {weight_format}
        return
    # Among two int8 formats that are accurate enough the search may take either; what it thinks of them is known.
    with open_model(folder) as files:
        shape, encodings = files.shape, files.encodings()
    losses = {
        variant.weight_format: quality.weight_loss(variant, shape, encodings) for variant in (*VARIANTS, AS_GIVEN)
    }
    assert losses["i8p"] == 0 and losses["i8c"] == quality.WEIGHT_LOSS["i8c"]
    assert {name for layer in plan.layer_formats for name in layer.by_role().values()} == {"i8p"}


def test_channels_as_given_are_considered_only_where_a_file_has_some() -> None:
    assert AS_GIVEN not in variants_for({"F32": 10}) and AS_GIVEN in variants_for({"F32": 10, "I8_CHANNEL": 5})
    assert packed_bytes("i8p", 33, 100) == packed_bytes("i8c", 33, 100)


@pytest.mark.native
def test_the_engine_computes_with_the_files_own_integers(quantised: tuple[WeightFormat, str]) -> None:
    weight_format, folder = quantised
    plan = make_plan(folder, precision="int4" if weight_format == "i4g" else "int8", cache_dtype="fp32")
    formats = (LayerFormats.uniform(weight_format),) * plan.shape.num_layers
    plan = dataclasses.replace(plan, layer_formats=formats, embedding_format="f32", head_format="f32")
    ids = tiny.token_ids(60)
    with load(folder, plan=plan) as llm:
        found = llm.logits(ids)
    with open_model(folder) as files:
        decoder = Decoder.from_files(files)
    with torch.inference_mode():
        wide = decoder(torch.tensor([ids]))[0].numpy()
        if weight_format == "i8p":
            for name, module in decoder.named_modules():
                if name.endswith("_proj"):
                    module.register_forward_pre_hook(lambda _, inputs: (round_rows(inputs[0][0])[None],))
        expected = decoder(torch.tensor([ids]))[0].numpy()
    # i8p rounds activations as the reference does, up to inputs on a boundary; the grouped formats widen to bf16.
    bound = 0.01 if weight_format == "i8p" else 0.05
    error = np.sqrt(np.mean((found - expected) ** 2)) / expected.std()
    assert error < bound
    if weight_format == "i8p":
        assert error < 0.5 * np.sqrt(np.mean((found - wide) ** 2)) / expected.std()


def test_the_torch_runner_widens_them(quantised: tuple[WeightFormat, str]) -> None:
    _, folder = quantised
    plan = dataclasses.replace(make_plan(folder, precision="fp32"), kernels="torch")
    with load(folder, plan=plan) as llm, open_model(folder) as files:
        ids = tiny.token_ids(40)
        with torch.inference_mode():
            expected = Decoder.from_files(files)(torch.tensor([ids]))[0].numpy()
        np.testing.assert_allclose(llm.logits(ids), expected, atol=1e-4)


def parsed(verb: str, *options: str) -> argparse.Namespace:
    positional = {"generate": ["m", "p"], "chat": ["m"], "bench": ["m"], "plan": ["m"], "eval": ["m", "--text", "t"]}
    return build_parser(verb).parse_args([*positional[verb], *options])


@pytest.mark.parametrize("verb", ["generate", "chat", "bench", "eval", "plan"])
def test_the_flags_are_wishes_on_every_verb(verb: str) -> None:
    assert precision_from(parsed(verb)) == {"precision": None, "cache_dtype": None}
    for spelling in ("--enable_quantization", "--enable-quantization"):
        args = parsed(verb, spelling, "int4", "--cache-dtype", "int8")
        assert precision_from(args) == {"precision": "int4", "cache_dtype": "int8"}
    assert precision_from(parsed(verb, "--enable_quantization", "int8", "--precision", "int8"))["precision"] == "int8"
    with pytest.raises(ConfigError, match="--enable_quantization int8 and --precision bf16"):
        precision_from(parsed(verb, "--enable_quantization", "int8", "--precision", "bf16"))


@pytest.mark.native
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_the_cache_has_the_dtype_that_was_asked_for(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dseek.cli.measuring.measured_machine", machine)
    folder = str(tiny.save("llama", tmp_path / "m"))
    (tmp_path / "text.txt").write_text("a small model answers a small question. " * 20, encoding="utf-8")
    arguments = ["eval", folder, "--text", str(tmp_path / "text.txt"), "--context", "64", "--cache-dtype", dtype]
    assert main([*arguments, "--enable_quantization", "int8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cache_dtype"] == dtype and told["precision"] == "int8" and told["perplexity"] > 1


def test_a_plan_with_another_cache_is_a_contradiction(tmp_path: Path) -> None:
    folder = str(tiny.save("llama", tmp_path / "m"))
    plan = make_plan(folder, precision="int8", cache_dtype="bf16")
    with pytest.raises(ConfigError, match="cache dtype int8 contradicts the plan"):
        load(folder, plan=plan, cache_dtype="int8")
