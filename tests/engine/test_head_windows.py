"""Windows by head: measured on the model, kept, and followed from the wish to the kernels."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dseek.cli.main import main
from dseek.core import events
from dseek.core.attention_pattern import EVERY_BLOCK, WINDOWS
from dseek.core.errors import ConfigError
from dseek.engine import window_calibration
from dseek.engine.head_facts import head_facts
from dseek.engine.llm import load
from dseek.engine.window_calibration import head_windows, measure_windows
from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from dseek.models.gate_file import FILE_NAME, fingerprint
from dseek.ops import native
from dseek.plan.attention_wish import AttentionWish
from dseek.train.gate_training import GateTraining, new_gates, save_gates
from tests.models import tiny
from tests.plan.machines import machine

POSITIONS = 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama for long texts."""
    path = tiny.save("llama", tmp_path_factory.mktemp("models") / "tiny")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": POSITIONS}))
    return path


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSEEK_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_windows_are_measured_once_and_kept(
    folder: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[int, int]] = []
    stop = events.subscribe("calibration.layer", lambda layer, num_layers: told.append((layer, num_layers)))
    with open_model(str(folder)) as files:
        windows = head_windows(files)
        stop()
        assert told == [(0, 2), (1, 2)]
        assert np.isin(windows, WINDOWS[:4]).all() and np.shape(windows) == (2, 2)
        assert sum(map(sum, windows)) <= 4 * 512
        (path,) = (cache_dir / "windows").iterdir()
        assert path.stem == fingerprint(files)
        assert measure_windows(files) == windows

        def never(files: object) -> None:
            raise AssertionError("measured again")

        with monkeypatch.context() as patch:
            patch.setattr(window_calibration, "measure_windows", never)
            assert head_windows(files) == windows
        # What is kept is not trusted.
        good = json.loads(path.read_text())
        for change in (
            {"windows": [[100, 64], [64, 64]]},
            {"windows": [[64], [64]]},
            {"windows": [[64, 64]]},
            {"model": "another"},
            {"version": 99},
            {"extra": 1},
        ):
            path.write_text(json.dumps(good | change))
            caplog.clear()
            assert head_windows(files) == windows
            assert "of no use and are measured anew" in caplog.text
            assert json.loads(path.read_text()) == good
        path.write_bytes(b"\xff{")
        assert head_windows(files) == windows


def test_measured_windows_are_those_of_the_attention(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole table of weights is the judge."""
    from dseek.models.projections import layer_projections

    monkeypatch.setattr(window_calibration, "NUM_TOKENS", 512)
    monkeypatch.setattr(window_calibration, "NUM_ROWS", 60)
    with open_model(str(folder)) as files:
        windows = measure_windows(files)
        token_ids = window_calibration._text(files)
        assert len(token_ids) == 512
        decoder = Decoder.from_files(files, torch.bfloat16).requires_grad_(False)
        layers = list(layer_projections(decoder, torch.tensor(token_ids)))
    rows = torch.linspace(256, 511, 60).long().unique().tolist()
    for layer, projections in enumerate(layers):
        q, k = projections.rotated_queries.float(), projections.rotated_keys.float()
        for group in range(2):
            held = torch.zeros(2, 3)
            for row in rows:
                for place, head in enumerate((2 * group, 2 * group + 1)):
                    weights = (q[row, head] @ k[: row + 1, group].T / q.shape[-1] ** 0.5).softmax(-1)
                    own = row // 64 * 64
                    for index, window in enumerate((64, 128, 256)):
                        held[place, index] += (
                            weights[:64].sum() * (own - window > 0) + weights[max(0, own - window) :].sum()
                        )
            assert held[:, 0].max() < 0.95 * held[:, -1].max(), "nothing lies beyond the shortest window"
            enough = (held >= 0.9 * held[:, -1:]).all(0).tolist()
            assert windows[layer][group] == (64, 128, 256)[enough.index(True)]


def test_what_is_missing_is_said(folder: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    with open_model(str(folder)) as files:
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
            with pytest.raises(ConfigError, match=r"needs PyTorch.*one window for all heads"):
                head_windows(files)
        monkeypatch.setattr(window_calibration, "MODULES", ("no_such_module",))
        with pytest.raises(ConfigError, match=r"measured over 0 tokens.*one window for all heads"):
            head_windows(files)


def test_only_what_is_asked_for_is_found_out(folder: Path, cache_dir: Path, tmp_path: Path) -> None:
    gated = Path(shutil.copytree(folder, tmp_path / "gated"))
    windows = [[64, 256], [512, 128]]
    write_gate(gated, windows)
    with open_model(str(gated)) as files:
        assert head_facts(files, AttentionWish(kind="dense")).gate is False
        assert head_facts(files, AttentionWish(window_tokens=64)).gate is False
        by_rows = head_facts(files, None)
        assert (by_rows.gate, by_rows.dense_heads, by_rows.windows) == (True, ((), (1,)), ())
        assert head_facts(files, AttentionWish(window_tokens="auto")).windows == ((64, 256), (512, 128))
    assert not cache_dir.exists(), "the gate file says the windows, and they were measured"
    write_gate(gated, None)
    with open_model(str(gated)) as files:
        facts = head_facts(files, AttentionWish(kind="dynamic", window_tokens="auto"))
        assert facts.gate and facts.windows == measure_windows(files)


@pytest.mark.native
def test_the_kernels_get_the_windows_of_the_heads(
    folder: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch_patterns(monkeypatch)
    gated = Path(shutil.copytree(folder, tmp_path / "gated"))
    write_gate(gated, [[64, 256], [512, 128]])
    options: dict[str, Any] = {"machine": machine(), "precision": "fp32", "context": 1024, "attention_window": "auto"}
    with load(str(gated), **options) as llm:
        assert seen == [([1, 4], False), ([8, 2], False)]
        path = tmp_path / "plan.json"
        llm.plan.save(path)
        ids = tiny.token_ids(1000, seed=4)
        expected = llm.logits(ids)
    seen.clear()
    with load(str(gated), plan=path, attention_window="auto") as llm:
        assert seen == [([1, 4], False), ([8, 2], False)]
        np.testing.assert_array_equal(llm.logits(ids), expected)
    with pytest.raises(ConfigError, match="contradicts the plan, which says windows 64 to 512"):
        load(str(gated), plan=path, attention_window=64)
    seen.clear()
    with load(str(gated), attention="dynamic", **options) as llm:
        assert seen == [([1, 4], True), ([8, EVERY_BLOCK], True)]
        llm.logits(ids)
    # A model without a gate is measured.
    seen.clear()
    with load(str(folder), **options), open_model(str(folder)) as files:
        assert seen == [([tokens // 64 for tokens in layer], False) for layer in measure_windows(files)]


@pytest.mark.native
def test_the_command_line_shows_the_measuring(
    folder: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dseek.cli import measuring

    monkeypatch.setattr(measuring, "load_or_measure", lambda **_: machine())
    told: list[tuple[float, str]] = []
    monkeypatch.setattr(measuring._Bar, "tell", lambda self, share, what: told.append((share, what)))
    command = ["plan", str(folder), "--attention-window", "auto", "--context", "1024"]
    assert main([*command, "--json"]) == 0
    windows = [pattern["window_tokens"] for pattern in json.loads(capsys.readouterr().out)["attention_patterns"]]
    assert told == [(0.0, "layer 0 of 2"), (0.5, "layer 1 of 2")]
    assert main([*command, "--json"]) == 0
    again = [pattern["window_tokens"] for pattern in json.loads(capsys.readouterr().out)["attention_patterns"]]
    assert again == windows and len(told) == 2


def write_gate(folder: Path, windows: list[list[int]] | None) -> None:
    """A gate that was not trained, whose second layer's second head stays dense."""
    with open_model(str(folder)) as files:
        gates = new_gates(files.shape, GateTraining(gate_dim=16))
        factors = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
        chosen = None if windows is None else torch.tensor(windows)
        save_gates(gates, factors, files.shape.rope.theta, fingerprint(files), folder / FILE_NAME, chosen)


def watch_patterns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], bool]]:
    """Let decoders write down the windows in blocks that they are given, and whether a gate comes with them."""
    compiled = native.require()
    real, seen = compiled.Decoder, []

    class Watched:
        def __init__(self, **sizes: Any) -> None:
            self.decoder = real(**sizes)

        def set_pattern(self, layer: int, **pattern: Any) -> None:
            seen.append((pattern["near_blocks"], pattern["gate"] is not None))
            self.decoder.set_pattern(layer, **pattern)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.decoder, name)

    monkeypatch.setattr(compiled, "Decoder", Watched)
    return seen
