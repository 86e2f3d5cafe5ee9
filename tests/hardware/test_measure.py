"""Measuring with made-up kernels; PyTorch's part for real, once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dseek.core.errors import ConfigError
from dseek.hardware import measure, native, store
from dseek.hardware.machine import Machine
from dseek.hardware.measure import Measurements
from dseek.hardware.probe import probe
from tests.hardware.fake_native import FakeNative, vnni


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's part comes out empty at once."""
    monkeypatch.setattr(measure, "_measure_torch", lambda *_, **__: Measurements())


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, without_torch: None) -> FakeNative:
    """Made-up kernels in a cache folder of their own."""
    fake = vnni()
    monkeypatch.setenv("DSEEK_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("DSEEK_KERNELS", raising=False)
    monkeypatch.setattr(native, "load", lambda: fake)
    return fake


def test_measured_machine_is_kept_and_measured_again_on_demand(kernels: FakeNative, tmp_path: Path) -> None:
    told: list[float] = []
    machine = store.load_or_measure(progress=lambda share, what: told.append(share))
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert machine.kernel_variant == "avx512"
    assert {curve.weight_format for curve in machine.linears} == {"f32", "f16", "bf16", "i8c", "i8g", "i4g"}
    assert [entry.num_threads for entry in machine.scalings][-1] == machine.num_threads
    calls = kernels.calls
    assert store.load_or_measure() == machine
    assert kernels.calls == calls
    store.load_or_measure(refresh=True)
    assert kernels.calls > calls
    # A damaged file is measured anew, not fatal.
    path = next((tmp_path / "machines").glob("*.json"))
    path.write_text(path.read_text()[:-100])
    assert store.load_or_measure().machine_id == machine.machine_id


def test_machine_json_there_and_back_and_refusals(kernels: FakeNative) -> None:
    machine = store.load_or_measure()
    text = machine.to_json()
    assert Machine.from_json(text) == machine
    for broken in (
        text.replace('"num_rows":[1,', '"num_rows":[4,', 1),
        text.replace('"format_version":1', '"format_version":99'),
        text.replace('"gbs":', '"gbs":-', 1),
        text.replace('"cpu_name":', '"cpu":'),
    ):
        assert broken != text
        with pytest.raises(ConfigError):
            Machine.from_json(broken)


def test_kernel_variant_of_the_environment(kernels: FakeNative, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSEEK_KERNELS", "amx")
    with pytest.raises(ConfigError, match="generic, avx2, avx512"):
        store.load_or_measure()


def test_budget_leaves_out_the_last_shapes(without_torch: None) -> None:
    found = measure.measure(probe(), vnni(), budget_s=0.0)
    shapes = {(curve.num_outputs, curve.num_inputs) for curve in found.linears}
    assert shapes == set(measure.LINEAR_SHAPES[:2])
    assert {(c.num_heads, c.num_kv_heads, c.head_dim) for c in found.attentions} == {measure.HEAD_SHAPES[0]}


def test_nothing_to_measure_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(1, "python", stderr="no torch")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ConfigError, match="neither the native kernels nor PyTorch"):
        measure.measure(probe(), None)


@pytest.mark.slow
def test_torch_is_measured_in_its_own_process() -> None:
    found = measure.measure(probe(), None)
    assert {rate.dtype for rate in found.gemm} == {"fp32", "bf16", "fp16", "int8"}
    assert {rate.shape_class for rate in found.gemm} == {"matvec", "thin", "square"}
    assert found.torch_process_bytes > 5e7
    assert {curve.weight_format for curve in found.linears} == {"f32", "bf16", "f16"}


def test_measuring_imports_no_torch() -> None:
    code = "import sys, dseek.hardware.store; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


_: Callable[[], native.NativeModule] = FakeNative  # the fake has every function that measuring uses
