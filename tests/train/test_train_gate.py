"""`dseek train-gate`: samples, training that goes on after a stop, its file, and the engine that follows it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dseek import plan as planning
from dseek.cli.main import main
from dseek.core.attention_pattern import WINDOWS, AttentionPattern
from dseek.core.errors import ConfigError, FileFormatError
from dseek.engine.llm import load
from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from dseek.models.gate_file import FILE_NAME, find_gates, read_gates
from dseek.plan.plan import Plan
from dseek.train import level_bias
from dseek.train.gate_training import GateTraining, make_samples, new_gates, read_samples, train_gates
from tests.models import tiny
from tests.plan.machines import machine

SOURCE = argparse.__file__
"""A long text that every Python has."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama for long texts."""
    path = tiny.save("llama", tmp_path_factory.mktemp("models") / "tiny")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 4096}))
    return path


@pytest.fixture(scope="module")
def gate(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gate trained for it on the command line."""
    out = tmp_path_factory.mktemp("gate")
    options = ["--tokens", "1280", "--samples", "2", "--passes", "2", "--gate-dim", "16"]
    assert main(["train-gate", str(folder), "--text", SOURCE, "--out", str(out), *options]) == 0
    return out / FILE_NAME


def test_the_file_is_for_its_model_only(folder: Path, gate: Path, tmp_path: Path) -> None:
    with open_model(str(folder)) as files:
        assert find_gates(files) is None
        gates = read_gates(gate, files.shape)
        assert len(gates.layers) == files.shape.num_layers and gates.gate_dim == 16
        for layer in gates.layers:
            assert layer.level_bias is not None and layer.level_bias.shape == (files.shape.num_heads, 1)
            assert layer.level_bias.any()
    shutil.copytree(folder, tmp_path / "same")
    shutil.copy(gate, tmp_path / "same" / FILE_NAME)
    with open_model(str(tmp_path / "same")) as files:
        found = find_gates(files)
        assert found is not None and np.array_equal(found.layers[0].query, gates.layers[0].query)
    other = tiny.save("llama", tmp_path / "other")
    norm = dict(_tensors(other / "model.safetensors"))
    norm["model.norm.weight"] = norm["model.norm.weight"] * 2
    save_file(norm, other / "model.safetensors", {"format": "pt"})
    shutil.copy(gate, other / FILE_NAME)
    with open_model(str(other)) as files, pytest.raises(FileFormatError, match="another model"):
        find_gates(files)


def test_damaged_files_are_refused(folder: Path, gate: Path, tmp_path: Path) -> None:
    with open_model(str(folder)) as files:
        shape = files.shape
    with safe_open(str(gate), "pt") as stored:
        metadata = stored.metadata()
    tensors = dict(_tensors(gate))

    def refused(changed: dict[str, torch.Tensor], metadata: dict[str, str], message: str) -> None:
        save_file(changed, tmp_path / "bad.safetensors", metadata)
        with pytest.raises(FileFormatError, match=message):
            read_gates(tmp_path / "bad.safetensors", shape)

    missing = {name: value for name, value in tensors.items() if name != "layers.1.key"}
    refused(missing, metadata, "no tensor layers.1.key")
    refused(tensors | {"layers.0.query": tensors["layers.0.query"][:, :-1].contiguous()}, metadata, "has the shape")
    refused(tensors | {"layers.0.dense": tensors["layers.0.scale"].clone()}, metadata, "has the shape")
    refused(tensors | {"layers.0.key": tensors["layers.0.key"] * float("inf")}, metadata, "not finite")
    window = tensors["layers.0.window"].float()  # bfloat16 has no 257
    for bad in (window * 0, window + 1, -window, window * 4096, window * float("nan"), window[:1].clone()):
        refused(tensors | {"layers.0.window": bad}, metadata, "windows, each one of 64, 128|not finite")
    some = {name: value for name, value in tensors.items() if name != "layers.0.window"}
    refused(some, metadata, "windows for some layers only")
    none = {name: value for name, value in some.items() if not name.endswith(".window")}
    save_file(none, tmp_path / "none.safetensors", metadata)
    assert read_gates(tmp_path / "none.safetensors", shape).windows == ()
    factor = tensors["layers.0.share_factor"].float()
    for bad in (factor * 0, -factor, factor + 2000, factor * float("nan"), factor[:1].clone()):
        refused(tensors | {"layers.0.share_factor": bad}, metadata, "factors above 0|not finite")
    some = {name: value for name, value in tensors.items() if name != "layers.1.share_factor"}
    refused(some, metadata, "factors on the least share for some layers only")
    bias = tensors["layers.1.level_bias"]
    bad_biases = [
        (torch.full_like(bias, float("nan")), "not finite"),
        (torch.full_like(bias, float("-inf")), "not finite"),
        (bias.clone().fill_(0).index_fill_(0, torch.tensor(1), -30.25), "level_bias holds -30.25"),
        (bias.clone().index_fill_(0, torch.tensor(0), 40.0), "level_bias holds 40.0"),
        (bias[:-1].clone(), "level_bias has the shape"),
        (bias[:, 0].clone(), "level_bias has the shape"),
        (bias[:, :0].clone(), "level_bias has the shape"),
        (bias.repeat(1, 7), "level_bias has the shape"),
    ]
    for changed, message in bad_biases:
        refused(tensors | {"layers.1.level_bias": changed}, metadata, message)
    refused(tensors, metadata | {"theta": "nan"}, "theta 'nan'")
    refused(tensors, metadata | {"format": "other"}, "format 'other'")
    data = gate.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(FileFormatError):
        read_gates(tmp_path / "cut.safetensors", shape)


def test_biases_are_optional_and_the_last_level_stands_for_those_above(
    folder: Path, gate: Path, tmp_path: Path
) -> None:
    with open_model(str(folder)) as files:
        shape = files.shape
    with safe_open(str(gate), "pt") as stored:
        metadata = stored.metadata()
    tensors = dict(_tensors(gate))
    heads = shape.num_heads
    del tensors["layers.0.level_bias"]
    tensors["layers.1.level_bias"] = torch.tensor([[-30.0, 2.0]]).repeat(heads, 1)
    save_file(tensors, tmp_path / "some.safetensors", metadata)
    without, with_two = read_gates(tmp_path / "some.safetensors", shape).layers
    assert without.level_bias is None and without.bias_of_levels(3) is None
    for levels, expected in ((1, [-30]), (2, [-30, 2]), (4, [-30, 2, 2, 2])):
        bias = with_two.bias_of_levels(levels)
        assert bias is not None and bias.dtype == np.float32 and bias.flags.c_contiguous
        assert bias.tolist() == [expected] * heads


def test_a_finished_command_learns_no_bias_again(
    folder: Path, gate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(gate.parent, tmp_path / "again")
    options = ["--tokens", "1280", "--samples", "2", "--passes", "2", "--gate-dim", "16"]
    command = ["train-gate", str(folder), "--text", SOURCE, "--out", str(out), *options]
    monkeypatch.setattr(level_bias, "fit_level_bias", lambda *_: pytest.fail("a finished layer is learned again"))
    assert main(command) == 0
    before, after = dict(_tensors(gate)), dict(_tensors(out / FILE_NAME))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert main([*command, "--seed", "1"]) == 2


@pytest.mark.native
def test_a_trained_gate_is_kept_where_heads_are_measured_anew(
    folder: Path, gate: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tokens", "1280", "--samples", "1", "--head-texts", "1", "--density", "0.9", "--gate", str(gate)]
    assert main(["train-gate", str(folder), "--text", SOURCE, "--out", str(tmp_path), *options]) == 0
    before, after = dict(_tensors(gate)), dict(_tensors(tmp_path / FILE_NAME))
    changed = {name.rsplit(".", 1)[1] for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed and changed <= {"dense", "share_factor"}
    other = shutil.copytree(folder, tmp_path / "other")
    weights = dict(_tensors(other / "model.safetensors"))
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"] * 2}, other / "model.safetensors")
    capsys.readouterr()
    assert main(["train-gate", str(other), "--text", SOURCE, "--out", str(tmp_path / "no"), *options]) == 2
    assert "was trained for another model" in capsys.readouterr().err


def test_the_engine_follows_the_gate_beside_the_model(folder: Path, gate: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "gated")
    shutil.copy(gate, tmp_path / "gated" / FILE_NAME)
    ids = [3 + 7 * index % 350 for index in range(1200)]
    plain_few = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=8, min_share=0.08)
    few = dataclasses.replace(plain_few, gate=True)
    gated = _logits(tmp_path / "gated", _plan(folder, few), ids)
    for path in (folder, tmp_path / "gated"):
        # The plan decides, not the file that lies there.
        plain = _logits(path, _plan(folder, plain_few), ids)
        assert not np.allclose(plain[-1], gated[-1], atol=1e-4), "the gate chooses like the mean keys"
    with pytest.raises(ConfigError, match="follows a trained gate"):
        _logits(folder, _plan(folder, few), ids)
    stepwise = _logits(tmp_path / "gated", dataclasses.replace(_plan(folder, few), prefill_chunk_tokens=37), ids)
    np.testing.assert_allclose(stepwise, gated, atol=1e-4)
    all_blocks = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=32, min_share=1e-12, gate=True)
    dense = _logits(folder, _plan(folder, AttentionPattern()), ids)
    assert np.array_equal(_logits(tmp_path / "gated", _plan(folder, all_blocks), ids), dense)


@pytest.mark.native
def test_heads_that_stay_dense_are_the_plans(folder: Path) -> None:
    ids = [3 + 7 * index % 350 for index in range(1200)]
    few = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=1, min_share=0.5)
    dense = _logits(folder, _plan(folder, AttentionPattern()), ids)
    everything = dataclasses.replace(few, dense_heads=(0, 1))
    assert np.array_equal(_logits(folder, _plan(folder, everything), ids), dense)
    half, none = (
        _logits(folder, _plan(folder, dataclasses.replace(few, dense_heads=heads)), ids) for heads in ((1,), ())
    )
    assert not np.allclose(half, dense, atol=1e-2) and not np.allclose(half, none, atol=1e-2)


def test_windows_are_those_of_the_samples(folder: Path, gate: Path) -> None:
    """The file's windows against the definition, row by row: 90 % of what the longest holds, for each query head."""
    with open_model(str(folder)) as files:
        shape = files.shape
        windows = read_gates(gate, shape).windows
    samples = [read_samples(file, shape.num_layers) for file in sorted((gate.parent / "samples").iterdir())]
    assert len(samples) == 2
    sizes = [window for window in WINDOWS if window <= 512]  # of 1,280 tokens too few rows have 1,024 before them
    for layer in range(shape.num_layers):
        for group in range(shape.num_kv_heads):
            enough = []
            for window in sizes:
                needed = []
                for head in (2 * group, 2 * group + 1):
                    held, most = (
                        sum(
                            float(sample[layer].mass[place, head, blocks].double().sum())
                            for sample in samples
                            for place, row in enumerate(sample[layer].rows.tolist())
                            if row // 64 >= 8
                            for blocks in [sorted({0, *range(row // 64 - span // 64, row // 64 + 1)})]
                        )
                        for span in (window, 512)
                    )
                    needed.append(held >= 0.9 * most)
                enough.append(all(needed))
            assert windows[layer][group] == sizes[enough.index(True)]


def test_the_mean_of_the_windows_is_kept(folder: Path, gate: Path, tmp_path: Path) -> None:
    shutil.copytree(gate.parent, tmp_path / "out")
    options = ["--tokens", "1280", "--samples", "2", "--passes", "2", "--gate-dim", "16", "--mean-window", "128"]
    assert main(["train-gate", str(folder), "--text", SOURCE, "--out", str(tmp_path / "out"), *options]) == 0
    with open_model(str(folder)) as files:
        before, after = (read_gates(path, files.shape).windows for path in (gate, tmp_path / "out" / FILE_NAME))
    both = [(old, new) for olds, news in zip(before, after, strict=True) for old, new in zip(olds, news, strict=True)]
    assert sum(new for _, new in both) <= 128 * len(both) < sum(old for old, _ in both)
    assert all(new <= old for old, new in both)


def test_training_goes_on_where_it_was_stopped(folder: Path, tmp_path: Path) -> None:
    config = GateTraining(gate_dim=16, num_passes=3, seed=5)
    with open_model(str(folder)) as files:
        decoder = Decoder.from_files(files, torch.float32).requires_grad_(False)
    texts = [torch.randint(3, 380, (1024,), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    seen: list[tuple[str, int, int]] = []

    def note(*args: object) -> None:
        seen.append(args[:3])  # type: ignore[arg-type]

    samples = make_samples(lambda _: decoder, texts, tmp_path / "samples", config, note, model="a")
    assert seen == [("samples", 1, 2), ("samples", 2, 2)]
    with pytest.raises(ConfigError, match="another text"):
        make_samples(lambda _: decoder, texts[::-1], tmp_path / "samples", config, note, model="a")
    with pytest.raises(ConfigError, match="another text or model"):
        make_samples(lambda _: decoder, texts, tmp_path / "samples", config, note, model="b")
    whole = new_gates(decoder.shape, config)
    losses: list[float] = []
    train_gates(whole, samples, tmp_path / "whole", config, lambda *args: losses.append(args[3]["loss"]))
    assert losses[-1] < losses[0]

    def stop(what: str, done: int, total: int, figures: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_gates(new_gates(decoder.shape, config), samples, tmp_path / "parts", config, stop)
    resumed = new_gates(decoder.shape, config)
    train_gates(resumed, samples, tmp_path / "parts", config, lambda *_: None)
    for expected, found in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    other = dataclasses.replace(config, near_blocks=2)
    with pytest.raises(ConfigError, match="another folder"):
        train_gates(resumed, samples, tmp_path / "parts", other, lambda *_: None)


def test_lists_of_texts_and_lengths_take_turns(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("the quick brown fox jumps over the lazy dog. " * 2000)
    texts = ["--text", SOURCE, "--text", str(tmp_path / "words.txt")]
    options = ["--tokens", "1024", "4608", "--samples", "4", "--passes", "1", "--gate-dim", "16", "--head-texts", "1"]
    out = tmp_path / "out"
    assert main(["train-gate", str(folder), *texts, *options, "--out", str(out)]) == 0
    assert [_sample_blocks(out, index) for index in range(4)] == [16, 16, 64, 64], "the model has 4096 positions"
    out = tmp_path / "extended"
    options += ["--max-position-embeddings", "8192"]
    assert main(["train-gate", str(folder), *texts, *options, "--out", str(out)]) == 0
    assert [_sample_blocks(out, index) for index in range(4)] == [16, 16, 72, 72]
    first, second = (dict(_tensors(out / "samples" / f"000{index}.safetensors")) for index in range(2))
    assert not torch.equal(first["0.means"], second["0.means"]), "the lists do not take turns"


def test_bad_options_end_with_status_2(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train-gate", str(folder), "--out", str(tmp_path)]
    assert main([*command, "--text", str(tmp_path / "none.txt"), "--tokens", "1024"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("too short")
    assert main([*command, "--text", str(tmp_path / "short.txt"), "--tokens", "1024"]) == 2
    assert "at least 1024" in capsys.readouterr().err
    assert main([*command, "--text", SOURCE, "--tokens", "100"]) == 2
    assert main([*command, "--text", SOURCE, "--gate-dim", "20"]) == 2
    assert "multiple of 16" in capsys.readouterr().err
    assert main([*command, "--text", SOURCE, "--mean-window", "5000"]) == 2
    assert "needed: 64 to 4096 tokens" in capsys.readouterr().err


def _tensors(path: Path) -> list[tuple[str, torch.Tensor]]:
    with safe_open(str(path), "pt") as stored:
        return [(name, stored.get_tensor(name)) for name in stored.keys()]  # noqa: SIM118


def _sample_blocks(out: Path, index: int) -> int:
    tensors = dict(_tensors(out / "samples" / f"{index:04d}.safetensors"))
    return len(tensors["0.means"])


def _plan(folder: Path, pattern: AttentionPattern) -> Plan:
    with open_model(str(folder)) as files:
        plan = planning.make(
            files.shape,
            machine(),
            planning.Objective(context_tokens=1408, batch=1),
            encodings=files.encodings(),
            precision="fp32",
            num_threads=2,
        )
    return dataclasses.replace(plan, attention_patterns=(pattern,) * plan.shape.num_layers)


def _logits(folder: Path, plan: Plan, ids: list[int]) -> np.ndarray:
    with load(str(folder), plan=plan) as llm:
        return llm.logits(ids)
