"""The rows about transport, checkpoints and faults run on their smallest sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import namespaces
from benchmarks.errors import IncorrectError
from benchmarks.rows import ROWS, Settings, availability, faults
from benchmarks.rows.checkpoints import recovery_seconds


@pytest.mark.rows
@pytest.mark.native
@pytest.mark.parametrize("name", ["sync", "handover", "snapshot"])
def test_row_runs(name: str) -> None:
    outcome = ROWS[name].measure(Settings(smoke=True, rounds=2))
    assert outcome.value > 0 and outcome.ratio is not None and outcome.ratio > 0 and outcome.peer


@pytest.mark.rows
@pytest.mark.model
def test_a_recovery_is_measured() -> None:
    outcome = ROWS["recovery"].measure(Settings(smoke=True, rounds=2))
    assert outcome.value > 0 and outcome.ratio is not None and outcome.ratio > 0


def test_a_standstill_is_read_from_what_a_training_wrote() -> None:
    lines = [
        (1.0, "step 1 of 3: loss 2"),
        (2.0, "step 2 of 3: loss 2"),
        (2.5, "lost"),
        (6.0, "going on after step 1 of 3"),
    ]
    assert recovery_seconds([*lines, (7.0, "step 2 of 3: loss 2"), (7.5, "step 3 of 3: loss 2")]) == 5.0
    for wrong in (lines, lines[:2], [*lines, *lines]):
        with pytest.raises(IncorrectError):
            recovery_seconds(wrong)


@pytest.mark.native
def test_faults_are_soaked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick enough to run always; over namespaces only where the rows are asked for."""
    monkeypatch.setattr(namespaces, "why_not", lambda: "not in this test")
    outcome = ROWS["fault-soak"].measure(Settings(smoke=True))
    assert outcome.value == 0 and outcome.ratio == 1.0
    assert outcome.details["faults"] == 4 and "cut" in outcome.details["not_drawn"]


@pytest.mark.rows
@pytest.mark.native
def test_faults_are_soaked_over_a_network() -> None:
    if reason := namespaces.why_not():
        pytest.skip(reason)
    outcome = ROWS["fault-soak"].measure(Settings(smoke=True))
    assert outcome.value == 0 and not outcome.details["not_drawn"]


@pytest.mark.rows
@pytest.mark.model
def test_availability_is_estimated() -> None:
    outcome = ROWS["availability"].measure(Settings(smoke=True))
    assert 0.99 < outcome.value < 1 and outcome.details["recovery_s"]


def test_availability_takes_what_recovery_has_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    record: dict[str, Any] = {"correct": True, "measured_at": "then", "details": {"dseek": [2.0, 4.0]}}
    monkeypatch.setattr(availability.result, "kept", lambda machine: {"recovery": record})
    monkeypatch.setattr(availability, "describe", lambda threads: {})
    assert availability._recoveries(Settings()) == ((2.0, 4.0), "recovery, measured at then")


def test_a_soak_goes_on_where_it_was_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs that are kept are not made again; one that ended wrong makes the row red and is named by its seed."""
    made: list[int] = []

    def run(folder: Path, seed: int, *_: Any) -> dict[str, Any]:
        made.append(seed)
        if len(made) == 3:
            raise KeyboardInterrupt
        wrong = "other bits" if seed == faults.SEED + 1 else ""
        entry = {"seed": seed, "faults": ["kill:1@2"], "wrong": wrong, "restarts": []}
        return {**entry, "steps_done_again": 0, "seconds": 1.0}

    monkeypatch.setattr(faults, "work_dir", lambda: tmp_path)
    monkeypatch.setattr(faults, "_run", run)
    monkeypatch.setattr(faults, "_without_faults", lambda *_: ["", ""])
    with pytest.raises(KeyboardInterrupt):
        faults.fault_soak(Settings())
    (kept,) = (tmp_path / "fault-soak").iterdir()
    lines = kept.read_text().splitlines()
    assert [json.loads(line)["run"]["seed"] for line in lines if line] == [faults.SEED, faults.SEED + 1]
    kept.write_text(kept.read_text() + '\n{"key": "torn')
    with pytest.raises(IncorrectError, match=f"1 of 25 runs end wrong: seed {faults.SEED + 1} .kill:1@2.: other bits"):
        faults.fault_soak(Settings())
    stopped = faults.SEED + 2
    assert made == [faults.SEED, faults.SEED + 1, stopped, *range(stopped, faults.SEED + 25)]
    assert not kept.exists()
