"""`dseek calibrate` on a tiny model: the file, what refuses it, losses, resuming, and plans that are made from it."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dseek import plan as planning
from dseek.cli.main import main
from dseek.compress import calibration as calibrating
from dseek.compress.calibration import CalibrationSettings, calibrate, cut
from dseek.compress.sensitivity import Sensitivity
from dseek.core.errors import ConfigError, FileFormatError
from dseek.engine.calibrated import calibrated
from dseek.models.calibration_file import find_calibration, place_beside, read_all, read_calibration
from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from dseek.plan.formats import ROLES
from tests.models import tiny
from tests.plan.machines import machine

TEXT = "the quick brown fox jumps over the lazy dog\nweights, keys and values; 0123456789\n" * 16
SETTINGS = CalibrationSettings(window_tokens=64, max_tokens=256, sensitivity="estimate", sensitivity_tokens=128)


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama-odd-sizes", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration with estimated losses."""
    path = tmp_path_factory.mktemp("calibration") / "found.json"
    run(folder, path, SETTINGS)
    return path


def run(folder: Path, path: Path, settings: CalibrationSettings, progress: Any = quiet) -> None:
    with open_model(str(folder)) as files:
        windows = cut([("text", files.tokenizer().encode(TEXT))], settings)
        calibrate(files, windows, ["text"], path, settings, progress)


def test_it_looks_at_every_tensor_and_layer(folder: Path, made: Path) -> None:
    calibration, tensors = read_all(made)
    names = {(entry.name, entry.kind) for entry in tensors}
    with open_model(str(folder)) as files:
        assert {name for name, kind in names if kind == "weight"} == set(files.tensor_names())
        shape = files.shape
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        assert {(prefix + role, "input") for role in ROLES} <= names
        assert {(prefix + "self_attn.k", "key"), (prefix + "self_attn.v", "value")} <= names
        for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            assert (prefix + path, "output") in names
    assert calibration.source.num_tokens == 256
    entry = next(e for e in tensors if e.name == "model.layers.1.mlp.down_proj" and e.kind == "output")
    assert entry.num_values == 256 * shape.hidden_size
    assert entry.cancellation is not None
    assert entry.cancellation.median > 1


def test_statistics_are_those_of_what_passes_through(folder: Path, made: Path) -> None:
    with open_model(str(folder)) as files:
        decoder = Decoder.from_files(files).requires_grad_(False)
        ids = torch.tensor(files.tokenizer().encode(TEXT)[:256]).view(4, 64)
    seen: list[torch.Tensor] = []
    handle = (
        decoder.model.layers[1]
        .get_submodule("mlp.down_proj")
        .register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].flatten()))
    )
    with torch.inference_mode():
        for window in ids:
            decoder(window[None])
    handle.remove()
    calibration, tensors = read_all(made)
    entry = next(e for e in tensors if (e.name, e.kind) == ("model.layers.1.down", "input"))
    values = torch.cat(seen)
    assert entry.magnitude == pytest.approx(float(values.abs().max()), rel=1e-5)
    assert entry.variance == pytest.approx(float(values.double().var(correction=0)), rel=1e-4)
    assert calibration.limits.plain["down"][1] == pytest.approx(entry.magnitude)


def test_losses_are_complete_and_in_order(made: Path) -> None:
    losses = read_calibration(made).losses
    sums = {
        name: sum(v or 0.0 for values in roles.values() for v in values) for name, roles in losses.projections.items()
    }
    assert set(sums) == {"i4g", "i8c", "i8g", "bf16", "f16"}
    assert sums["i4g"] > 10 * sums["i8c"] > 0
    assert sums["i4g"] > sums["i8g"] > sums["f16"] > 0
    assert 0 < losses.caches["bf16"] < losses.caches["int8"]
    assert not any(any(marks) for roles in losses.measured.values() for marks in roles.values())


def test_the_estimate_is_near_what_is_measured(folder: Path, made: Path, tmp_path: Path) -> None:
    measured = tmp_path / "measured.json"
    measured.write_text(made.read_text())
    run(folder, measured, dataclasses.replace(SETTINGS, sensitivity="measure", formats=("i4g",)))
    estimated = read_calibration(made).losses.projections["i4g"]
    found = read_calibration(measured).losses
    assert all(all(marks) for marks in found.measured["i4g"].values())
    for role in ROLES:
        for guess, true in zip(estimated[role], found.projections["i4g"][role], strict=True):
            assert guess is not None
            assert true is not None
            assert 0.3 < guess / true < 3.0


def test_a_stopped_sweep_goes_on(folder: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stopped.json"
    path.write_text(made.read_text())
    settings = dataclasses.replace(SETTINGS, sensitivity="measure", formats=("i4g",))

    def stop(what: str, done: int, total: int) -> None:
        if what == "projections" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, path, settings, stop)
    kept = read_calibration(path).losses
    assert sum(sum(marks) for marks in kept.measured["i4g"].values()) == 5

    calls = []
    real = Sensitivity.divergence
    monkeypatch.setattr(
        Sensitivity, "divergence", lambda self, formats, **o: calls.append(1) or real(self, formats, **o)
    )
    monkeypatch.setattr(calibrating, "weight_statistics", None)
    run(folder, path, settings)
    assert len(calls) == 12 - 5
    again = read_calibration(path).losses
    assert again.projections["i4g"]["qkv"][0] == kept.projections["i4g"]["qkv"][0]


def test_other_texts_or_another_model_are_refused(folder: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="other texts"):
        run(folder, made, dataclasses.replace(SETTINGS, window_tokens=32))
    with pytest.raises(ConfigError, match="other tokens or another seed"):
        run(folder, made, dataclasses.replace(SETTINGS, seed=1))
    other = tiny.save("llama", tmp_path / "other")
    with pytest.raises(FileFormatError, match="another model"):
        run(other, made, SETTINGS)
    with open_model(str(other)) as files, pytest.raises(FileFormatError, match="another model"):
        calibrated(files, made)


def test_the_same_model_with_other_weights_is_refused(folder: Path, made: Path, tmp_path: Path) -> None:
    """Its norms are the same, as those of a quantised copy are; what rounding costs is not."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"] *= 1.01
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with open_model(str(folder)) as files:
        assert calibrated(files, made)
    with open_model(str(copy)) as files, pytest.raises(FileFormatError, match="another model"):
        calibrated(files, made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format="dseek-calibration-9"), "dseek-calibration-9"),
        (lambda data: data.update(surprise=1), "surprise"),
        (lambda data: data.update(num_layers=10**9), "num_layers"),
        (lambda data: data["losses"]["caches"].update(int8=-1.0), "a loss of -1.0"),
        (lambda data: data["losses"]["projections"]["i4g"].update(qkv=[0.1]), "1 entries"),
        (lambda data: data["losses"]["projections"]["i4g"].update(value=[0.1] * 3), "'value'"),
        (lambda data: data["limits"]["plain"].update(qkv=[-1.0] * 3), "a limit of -1.0"),
        (lambda data: data.update(tensors=None), "list of tensors"),
    ],
)
def test_damaged_files_are_refused(made: Path, tmp_path: Path, change: Any, message: str) -> None:
    data = json.loads(made.read_text())
    change(data)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(FileFormatError, match=message):
        read_calibration(path)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", '{"format": NaN}', "\ufeff{}"])
def test_what_is_no_calibration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(FileFormatError):
        read_calibration(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_calibration(tmp_path / "absent.json")


def test_a_plan_takes_the_file_beside_the_model(folder: Path, made: Path) -> None:
    with open_model(str(folder)) as files:
        assert find_calibration(files) is None
        assert calibrated(files, None) == {}
        beside = place_beside(files)
        beside.write_text(made.read_text())
        try:
            found = calibrated(files, None)
        finally:
            beside.unlink()
        calibration = read_calibration(made)
        assert found["losses"].projections == calibration.loss_table()
        objective = planning.Objective(context_tokens=128, batch=1)
        options = {"encodings": files.encodings(), "precision": "int8", **found}
        plan = planning.make(files.shape, machine(), objective, **options)
        told = next(entry for entry in plan.choices if entry.name == "precision and cache")
        taken = next(entry for entry in told.alternatives if not entry.rejected)
        losses = calibration.loss_table()
        name = plan.layer_formats[0].qkv
        total = sum(loss for (_, _, weight_format), loss in losses.items() if weight_format == name)
        total += calibration.losses.caches[plan.cache_dtype] + calibration.losses.tables[plan.head_format]
        assert taken.quality_loss == pytest.approx(total)
        assert len(plan.activation_limits) == files.shape.num_layers
        limits = calibration.limits.rotated if name == "i8c" else calibration.limits.plain
        assert plan.activation_limits[1].down == pytest.approx(2 * limits["down"][1])
        assert planning.Plan.from_json(plan.to_json()) == plan


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out, picture = tmp_path / "text.txt", tmp_path / "c.json", tmp_path / "c.png"
    text.write_text(TEXT)
    arguments = ["calibrate", str(folder), "--text", str(text), "--out", str(out), "--window", "64"]
    arguments += ["--max-tokens", "128", "--sensitivity", "--sensitivity-tokens", "64", "--formats", "i4g"]
    assert main([*arguments, "--picture", str(picture), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_tokens"] == 128
    assert found["not_finite"] == []
    assert set(found["losses"]) == {"i4g"}
    assert all(math.isfinite(loss) for loss in found["cache_losses"].values())
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert main(arguments) == 0
    assert "every number is finite" in capsys.readouterr().out
    assert main([*arguments[:6], "--window", "4096"]) == 2
    assert "at most 256" in capsys.readouterr().err
    assert main(["calibrate", str(folder), "--text", str(tmp_path / "no.txt"), "--out", str(out)]) == 2
    assert "cannot be read" in capsys.readouterr().err
