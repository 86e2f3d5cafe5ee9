"""`dseek tune`: the smallest batch of least time a token, and a plan for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dseek import plan as planning
from dseek.cli import measuring
from dseek.cli.main import main
from dseek.cli.tune import Tried, best_of
from tests.models import tiny
from tests.plan.machines import machine


def tried(batch: int, token_s: float) -> Tried:
    return Tried(batch=batch, step_s=batch * token_s, token_s=token_s, predicted_token_s=None)


def test_ties_go_to_the_smaller_batch() -> None:
    assert best_of([tried(1, 3.0), tried(4, 1.02), tried(8, 1.0)]).batch == 4
    assert best_of([tried(1, 3.0), tried(4, 1.1), tried(8, 1.0)]).batch == 8


@pytest.mark.native
def test_the_verb_measures_and_saves_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "load_or_measure", lambda **_: machine())
    folder, saved = tiny.save("llama", tmp_path / "tiny"), tmp_path / "plan.json"
    options = ["--batches", "1,3", "--prompt-tokens", "8", "--tokens", "3", "--repeats", "1", "--precision", "fp32"]
    assert main(["tune", str(folder), *options, "--json", "--save", str(saved)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["batch"] for entry in found["tried"]] == [1, 3]
    assert planning.load(saved).max_batch == found["best_batch"]
    assert main(["tune", str(folder), *options, "--plan", str(saved)]) == (0 if found["best_batch"] == 3 else 2)


@pytest.mark.native
def test_benchmarks_are_remembered_and_correct_later_plans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSEEK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(measuring, "load_or_measure", lambda **_: machine())
    monkeypatch.setattr("dseek.cli.report.planned_machine", lambda _: machine())
    folder = str(tiny.save("llama", tmp_path / "tiny"))
    kept = tmp_path / "cache" / "history" / f"{machine().machine_id}.jsonl"
    options = ["--contexts", "8,16", "--batches", "1,2", "--tokens", "2", "--repeats", "1", "--precision", "fp32"]

    assert main(["bench", folder, *options, "--no-history", "--json"]) == 0
    assert not kept.exists()
    assert main(["bench", folder, *options, "--json"]) == 0
    assert len(kept.read_text().splitlines()) == 8  # prefill and decode of four cases
    capsys.readouterr()

    def planned(*more: str) -> float:
        assert main(["plan", folder, "--precision", "fp32", "--json", *more]) == 0
        return float(json.loads(capsys.readouterr().out)["predicted"]["decode_tokens_s"])

    assert planned() != planned("--no-history")
    assert main(["plan", folder, "--precision", "fp32"]) == 0
    assert "corrected by past benchmarks" in capsys.readouterr().out
