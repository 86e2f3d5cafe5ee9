"""Converted modules compute what the rounding ones do: kernels and PyTorch, odd sizes, twice in a row; their files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dseek.compress import qat
from dseek.compress.integer_layers import IntegerConv, IntegerLayer, IntegerLinear
from dseek.core.errors import ConfigError, FileFormatError
from dseek.ops import native

EPSILON = 2.0**-23


@pytest.fixture(params=[pytest.param("kernels", marks=pytest.mark.native), "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "module", lambda: None)
    return str(request.param)


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def prepared_and_converted(plain: torch.nn.Module, config: qat.QatConfig, x: torch.Tensor) -> tuple[Any, Any]:
    prepared = qat.prepare(copy.deepcopy(plain), config)
    if config.activations == "static":
        qat.calibrate(prepared, [x])
    converted = qat.convert(copy.deepcopy(prepared))
    return prepared.eval(), converted


def step_of_one_input(prepared: torch.nn.Module, x: torch.Tensor) -> float:
    """What one input that lies on the edge between two integers may change in an output: a step times a weight."""
    layer = next(layer for layer in prepared.modules() if isinstance(layer, qat.QatLayer))
    return float(x.abs().max() / 127 * layer.weight.detach().abs().max())


@pytest.mark.parametrize("shape", [(1, 33), (7, 33), (2, 3, 33), (70, 33), (5, 1, 64)], ids=str)
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (3, 5), (2, 2)], ids=str)
@pytest.mark.parametrize("activations", ["dynamic", "static", "none"])
def test_linear(backend: str, shape: tuple[int, ...], bits: tuple[int, int], activations: str) -> None:
    config = qat.QatConfig(weight_bits=bits[0], activation_bits=bits[1], activations=activations, step_rule="error")
    x = draw(*shape) if shape[0] != 7 else draw(*shape).abs()  # the latter become unsigned
    torch.manual_seed(1)
    prepared, converted = prepared_and_converted(torch.nn.Linear(shape[-1], 21, bias=shape[0] != 2), config, x)
    assert isinstance(converted, IntegerLinear)
    with torch.no_grad():
        expected = prepared(x)
    found = converted(x)
    # The linear kernel multiplies by the inverse of its step; everything else rounds to the same integers.
    edge = step_of_one_input(prepared, x) if (activations, bits[1], backend) == ("dynamic", 8, "kernels") else 0.0
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 16 * EPSILON * expected.abs().max() + edge
    if edge:
        assert ((found - expected).abs() > 16 * EPSILON * expected.abs().max()).float().mean() < 0.05
    assert torch.equal(converted(x), found)
    strided = torch.stack([x, x + 1], -1)[..., 0]
    assert not strided.is_contiguous() and torch.equal(converted(strided), found)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kind", ["int4", "int4 asymmetric", "int4 learned", "int8"])
@pytest.mark.parametrize("rows", [1, 8, 9, 40])
def test_linear_of_groups(backend: str, group: int, kind: str, rows: int) -> None:
    config = qat.QatConfig(
        weight_bits=8 if kind == "int8" else 4,
        group_size=group,
        symmetric="asymmetric" not in kind,
        estimator="lsq" if "learned" in kind else "ste",
    )
    torch.manual_seed(2)
    x = draw(rows, 150)
    prepared, converted = prepared_and_converted(torch.nn.Linear(150, 35), config, x)
    with torch.no_grad():
        expected = prepared(x)
        weight = prepared.weight_rounding(prepared.weight).values
    # The integers, scales and minima are the same, so the weight is; what differs are products in bfloat16 that widen
    # it to 2^-9 (many rows) and inputs on the edge between two integers (few).
    torch.testing.assert_close(converted.wide_weight(), weight, rtol=2e-7, atol=1e-8)
    found = converted(x)
    magnitude = (x.abs() @ weight.abs().T).max()
    bound = 32 * EPSILON * magnitude
    if backend == "kernels":
        bound = bound + (2.0**-9 * magnitude if rows > 8 else step_of_one_input(prepared, x))
    assert (found - expected).abs().max() <= bound
    assert torch.equal(converted(x), found)


CONVOLUTIONS = [
    lambda: torch.nn.Conv2d(5, 7, 3, padding=1),
    lambda: torch.nn.Conv2d(5, 7, (2, 4), padding="same", bias=False),
    lambda: torch.nn.Conv2d(6, 9, 3, stride=2, groups=3, dilation=2, padding=(2, 1)),
    lambda: torch.nn.Conv2d(18, 18, 3, groups=18, padding=1),
    lambda: torch.nn.Conv2d(6, 12, 3, groups=6, stride=(1, 2)),
    lambda: torch.nn.Conv2d(5, 7, 3, padding=2, padding_mode="reflect"),
    lambda: torch.nn.Conv2d(5, 7, (3, 2), padding="same", padding_mode="circular"),
    lambda: torch.nn.Conv1d(5, 11, 4, stride=3, padding=2),
    lambda: torch.nn.Conv1d(20, 20, 5, groups=20, padding="same", padding_mode="replicate"),
]


@pytest.mark.parametrize("index", range(len(CONVOLUTIONS)))
@pytest.mark.parametrize("activations", ["dynamic", "static", "none"])
@pytest.mark.parametrize("batch", [1, 3])
def test_convolutions(backend: str, index: int, activations: str, batch: int) -> None:
    torch.manual_seed(index)
    plain = CONVOLUTIONS[index]()
    size = (11,) if isinstance(plain, torch.nn.Conv1d) else (11, 9)
    x = draw(batch, plain.in_channels, *size, seed=index)
    if index % 2:
        x = x.relu()
    config = qat.QatConfig(activations=activations, estimator="lsq", step_rule="error")
    prepared, converted = prepared_and_converted(plain, config, x)
    assert isinstance(converted, IntegerConv)
    with torch.no_grad():
        expected = prepared(x)
        single = prepared(x[0])
    found = converted(x)
    # Sums of unsigned integers are of integers with 127 taken away; what that adds and removes is rounded, too.
    magnitude = expected.abs().max() + 127 * prepared.weight.abs().flatten(1).sum(1).max() * x.abs().max() / 127
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 16 * EPSILON * magnitude
    assert torch.equal(converted(x), found)
    assert (converted(x[0]) - single).abs().max() <= 16 * EPSILON * magnitude
    if x.dim() == 4:
        for layout in (torch.stack([x, x], -1)[..., 0], x.transpose(2, 3).contiguous().transpose(2, 3)):
            assert not layout.is_contiguous()
            # Integers add up to the same in any order; floats of a weight that is widened do not.
            assert (converted(layout) - found).abs().max() <= (16 * EPSILON * magnitude if activations == "none" else 0)


def network() -> torch.nn.Sequential:
    torch.manual_seed(3)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 12, 3, padding=1),
        torch.nn.BatchNorm2d(12),
        torch.nn.ReLU(),
        torch.nn.Conv2d(12, 12, 3, groups=12, stride=2, bias=False),
        torch.nn.BatchNorm2d(12),
        torch.nn.Hardtanh(),
        torch.nn.Flatten(),
        torch.nn.LayerNorm(12 * 9),
        torch.nn.Linear(12 * 9, 10),
    )
    for norm in net:
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.data.normal_()
    return net.eval()


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("statistics", ["frozen", "batch"])
def test_a_network_with_batch_norm(backend: str, activations: str, statistics: str) -> None:
    x = draw(6, 1, 8, 8)
    config = qat.QatConfig(activations=activations, batch_norm=statistics, estimator="lsq", step_rule="error")
    prepared = qat.prepare(network(), config)
    if activations == "static":
        qat.calibrate(prepared, [x])
    prepared.train()
    optimizer = torch.optim.SGD(qat.parameter_groups(prepared, learning_rate=0.01), momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        optimizer.step()
    prepared.eval()
    converted = qat.convert(copy.deepcopy(prepared))
    assert sum(isinstance(part, torch.nn.BatchNorm2d) for part in converted.modules()) == 0
    with torch.no_grad():
        expected = prepared(x)
    found = converted(x)
    # An activation on the edge between two integers may go either way, which the layers behind it see as one step.
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    assert (found - expected).abs().mean() < 2e-3 * expected.abs().mean()
    assert torch.equal(converted(x), found)
    torch.testing.assert_close(converted(x[:1]), found[:1], rtol=1e-3, atol=2e-3)


CONFIGS = {
    "dynamic": qat.QatConfig(),
    "static": qat.QatConfig(activations="static", activation_bits=6),
    "groups": qat.QatConfig(overrides={"8": qat.QatConfig(weight_bits=4, group_size=64, symmetric=False)}),
    "wide inputs": qat.QatConfig(activations="none", ignore=("3",)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_files(tmp_path: Path, name: str) -> None:
    x = draw(4, 1, 8, 8)
    _, converted = prepared_and_converted(network(), CONFIGS[name], x)
    file = tmp_path / "deep" / "model.safetensors"
    qat.save(converted, file)
    with safe_open(str(file), framework="pt") as stored:
        assert stored.get_tensor("0.values").dtype == torch.int8
    again = qat.load(network(), file)
    assert sum(isinstance(part, IntegerLayer) for part in again.modules()) == (2 if name == "wide inputs" else 3)
    assert torch.equal(again(x), converted(x))
    loaded = qat.load(copy.deepcopy(network()), file)
    loaded.load_state_dict(converted.state_dict(), strict=True)
    assert torch.equal(loaded(x), converted(x))


def test_a_file_is_not_believed(tmp_path: Path) -> None:
    x = draw(4, 1, 8, 8)
    _, converted = prepared_and_converted(network(), CONFIGS["groups"], x)
    file = tmp_path / "model.safetensors"
    qat.save(converted, file)
    with safe_open(str(file), framework="pt") as stored:
        header = dict(stored.metadata())
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    scheme = json.loads(header["layers"])

    def refused(message: str, changed: dict[str, Any] | None = None, **other: Any) -> None:
        lines = {key: value if isinstance(value, str) else json.dumps(value) for key, value in other.items()}
        save_file({**tensors, **(changed or {})}, str(file), {**header, **lines})
        with pytest.raises(FileFormatError, match=message):
            qat.load(network(), file)

    refused("format", format="dseek-integers-99")
    refused("layers", layers="[" * 100_000)
    refused("no dict", layers=[])
    refused("no linear or convolution layer 'x'", layers={**scheme, "x": scheme["0"]})
    refused("no linear or convolution layer '2'", layers={**scheme, "2": scheme["0"]})
    refused("description", layers={**scheme, "0": {}})
    refused("weight_bits", layers={**scheme, "0": {**scheme["0"], "weight_bits": 1e9}})
    refused("group_size", layers={**scheme, "8": {**scheme["8"], "group_size": 1}})
    refused("groups", layers={**scheme, "0": {**scheme["0"], "group_size": 32}})
    refused("activations", layers={**scheme, "0": {**scheme["0"], "activations": ["dynamic"]}})
    refused("unsigned", layers={**scheme, "0": {**scheme["0"], "unsigned": True}})
    refused("input_step", layers={**scheme, "0": {**scheme["0"], "activations": "static"}})
    refused("no batch norm", identities=["8"])
    refused("no batch norm", identities=[["1"]])
    refused("values", {"0.values": tensors["0.values"].float()})
    refused("values", {"0.values": tensors["0.values"][:1]})
    refused("beyond -8", {"8.values": tensors["8.values"] * 0 + 9})
    refused("zero points", {"0.zero_point": torch.zeros(12, dtype=torch.int8)})
    refused("scale", {"0.scale": torch.full((12,), float("nan"))})
    refused("scale", {"8.scale": torch.full_like(tensors["8.scale"], 1e30)})
    refused("architecture", {"stranger": torch.zeros(1)})
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(FileFormatError, match="safetensors"):
        qat.load(network(), file)
    with pytest.raises(FileNotFoundError):
        qat.load(network(), tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match="integer layers"):
        qat.save(network(), file)


def test_what_cannot_be_converted_is_told() -> None:
    with pytest.raises(ConfigError, match="prepare"):
        qat.convert(network())
    prepared = qat.prepare(network(), qat.QatConfig(activations="static"))
    with pytest.raises(ConfigError, match="never measured"):
        qat.convert(prepared)
    with pytest.raises(ConfigError, match="never measured"):
        prepared.eval()(draw(1, 1, 8, 8))
    if native.module() is not None:
        with pytest.raises(ConfigError, match=r"the module: .*1 x 65537"):
            qat.convert(qat.prepare(torch.nn.Linear(65537, 1)))
    broken = qat.prepare(network())
    broken[8].weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="8: its weight is not finite"):
        qat.convert(broken)
