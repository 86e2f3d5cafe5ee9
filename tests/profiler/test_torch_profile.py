"""Profiles of PyTorch code: work by the formulas of PyTorch's own counter, places by module, and scripts."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dseek.profiler import Profile, profile
from dseek.profiler.script import main
from dseek.profiler.torch_flops import attention_flops, cost_of
from tests.plan.machines import machine


class Net(torch.nn.Module):
    """A transformer block and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, dropout=0.0)
        self.conv = torch.nn.Conv1d(64, 64, 3, padding=1)
        self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.conv(x.transpose(1, 2)).transpose(1, 2))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def report(net: Net) -> Profile:
    x = torch.randn(2, 32, 64)
    return profile(lambda: net(x).sum().backward(), machine=machine(with_torch=True), title="net")


def test_operations_are_those_that_pytorch_counts(net: Net) -> None:
    x = torch.randn(2, 32, 64)
    with FlopCounterMode(display=False) as counter:
        net.encoder(x).sum().backward()
    report = profile(lambda: net.encoder(x).sum().backward(), machine=machine(with_torch=True))
    assert report.flops == counter.get_total_flops()


def test_a_convolution_is_counted(net: Net, report: Profile) -> None:
    (conv,) = (record for record in report.operators if record.name == "aten::conv1d")
    assert conv.flops == 2 * 2 * 32 * 64 * 64 * 3
    assert conv.place == "conv"


def test_operators_are_in_their_modules(report: Profile) -> None:
    linears = [record for record in report.operators if record.name == "aten::linear"]
    assert {record.place for record in linears} >= {"encoder.layers.0.linear1", "encoder.layers.1.linear2"}
    assert {record.layer for record in linears} == {0, 1}
    backward = [record for record in report.operators if record.phase == "backward" and record.kind == "linear"]
    assert {record.place for record in backward} >= {"encoder.layers.0.linear1", "encoder.layers.1.linear2"}
    assert {record.layer for record in report.by_layer()} == {0, 1}
    assert sum(record.seconds for record in report.operators) == pytest.approx(report.wall_s, rel=0.05)
    assert all(record.roof in ("memory", "compute") for record in linears)


def test_causal_attention_is_counted_as_the_half() -> None:
    shape = [2, 4, 10, 16]
    assert attention_flops(shape, shape, shape, causal=False) == 2 * 2 * 4 * 100 * 32
    assert attention_flops(shape, shape, shape, causal=True) == 2 * 2 * 4 * 55 * 32
    values = [None, None, None, None, 0.0, True]
    cost = cost_of("aten::scaled_dot_product_attention", [shape] * 3, ["float"] * 3, values)
    assert cost is not None
    assert cost.flops == 2 * 2 * 4 * 55 * 32
    assert cost.num_bytes == 4 * 4 * math.prod(shape)


def test_an_unknown_overload_is_not_guessed() -> None:
    assert cost_of("aten::mm", [], [], []) is None
    assert cost_of("aten::conv2d", [[1, 3, 8, 8], [4, 3, 3, 3]], ["float", "float"], [None, None, None, "a"]) is None


def test_what_raises_leaves_no_hooks(net: Net) -> None:
    session = profile(machine=machine(with_torch=True))
    with pytest.raises(RuntimeError, match="has not ended"):
        _ = session.result
    with pytest.raises(RuntimeError), session:
        net(torch.randn(1, 2, 3))
    assert session.result.wall_s > 0
    hooks = torch.nn.modules.module
    assert not hooks._global_forward_pre_hooks
    assert not hooks._global_forward_hooks


SCRIPT = """
import sys, torch
x = torch.randn(64, 64)
for _ in range(3):
    x = torch.nn.functional.linear(x, torch.randn(64, 64))
print("said", sys.argv[1:], __name__)
sys.exit(int(sys.argv[1]))
"""


def test_a_script_runs_as_if_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dseek.profiler.session.kept_machine", lambda: None)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    argv, path = list(sys.argv), list(sys.path)
    assert main(["--json", "--trace", str(tmp_path / "t.json"), str(script), "3", "--json"]) == 3
    said, shown = capsys.readouterr().out.splitlines()
    assert said == "said ['3', '--json'] __main__"
    found = json.loads(shown)
    (linear,) = (record for record in found["by_name"] if record["name"] == "aten::linear")
    assert linear["calls"] == 3
    assert linear["flops"] == 3 * 2 * 64**3
    assert found["roofs"] is None
    assert any("dseek doctor" in note for note in found["notes"])
    assert (sys.argv, sys.path) == (argv, path)
    assert any(
        event["name"] == "aten::linear" for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    )


def test_a_script_that_fails_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "bad.py"
    script.write_text("raise OSError('gone')")
    assert main(["--no-torch", "--json", str(script)]) == 1
    printed = capsys.readouterr()
    assert "OSError: gone" in printed.err
    assert json.loads(printed.out)["wall_s"] > 0
    assert main([str(tmp_path / "none.py")]) == 2
    assert "is no file" in capsys.readouterr().err
