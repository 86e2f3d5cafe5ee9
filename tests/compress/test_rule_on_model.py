"""The dtype rule on the weights and activations of a real model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dseek.compress.dtype_rule import projection_noise, rounding
from dseek.compress.rounding import RoundedLinear
from dseek.compress.statistics import Accumulator
from dseek.models.calibration_file import TensorStatistics
from dseek.models.encoding import to_float32
from dseek.models.files import ModelFiles, open_model
from dseek.ops.linear.reference import rotate, round_weight

pytestmark = pytest.mark.model

STORED = {"fp16": "f16", "bf16": "bf16", "i8c": "i8c", "i8g": "i8g", "i4g": "i4g"}


@pytest.fixture(scope="module")
def files(embedded_model: Path) -> Iterator[ModelFiles]:
    with open_model(str(embedded_model)) as opened:
        yield opened


def weight_of(files: ModelFiles, name: str) -> torch.Tensor:
    """A weight off the grid that its file has it on."""
    weight = torch.tensor(to_float32(files.tensor(name)))[:512]
    factors = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(0))
    return weight * torch.exp((2 * factors - 1) * math.log(1.25))


def collect(x: torch.Tensor, formats: tuple[str, ...] = ("i8c", "i8g", "i4g")) -> TensorStatistics:
    found = Accumulator("x", "weight", x.shape[1], formats)  # type: ignore[arg-type]
    found.add(x)
    return found.result()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.14.self_attn.k_proj.weight",
        "model.layers.29.mlp.down_proj.weight",
        "model.layers.3.mlp.up_proj.weight",
        "model.embed_tokens.weight",
    ],
)
def test_weights(files: ModelFiles, name: str) -> None:
    weight = weight_of(files, name)
    known = collect(weight)
    for rule_name, stored in STORED.items():
        exact = rotate(weight) if stored == "i8c" else weight
        error = (round_weight(weight, stored).double() - exact.double()).square().sum()
        measured = math.sqrt(float(error / weight.double().square().sum()))
        found = rounding(known, rule_name)
        assert measured <= found.bound
        assert 20 * math.log10(found.expected / measured) == pytest.approx(0, abs=1.0), rule_name


@pytest.mark.parametrize("weight_format", ["i4g", "i8c", "i8g", "bf16"])
def test_outputs_of_a_projection(files: ModelFiles, weight_format: str) -> None:
    """Rows of the embedding, normed, into the first layer's queries."""
    weight = weight_of(files, "model.layers.0.self_attn.q_proj.weight")
    rows = torch.tensor(to_float32(files.tensor("model.embed_tokens.weight")))[1000:1400]
    gain = torch.tensor(to_float32(files.tensor("model.layers.0.input_layernorm.weight")))
    inputs = gain * rows / rows.square().mean(1, keepdim=True).sqrt()
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    outputs = linear(inputs)
    error = (RoundedLinear(linear, weight_format)(inputs).double() - outputs.double()).square().sum()
    measured = math.sqrt(float(error / outputs.double().square().sum()))
    known = Accumulator("y", "output", outputs.shape[1], ())
    known.add(outputs)
    known.add_cancellation(inputs[::10], weight)
    predicted = projection_noise(collect(inputs), collect(weight), known.result(), weight_format)
    assert 20 * math.log10(predicted / measured) == pytest.approx(0, abs=3.0)
