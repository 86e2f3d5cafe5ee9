"""The rows on profiling and planning: where their points are kept, and that they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.models import BenchModel
from benchmarks.rows import Settings, planning, row


def _point(model: str, precision: str, predicted: float, measured: float) -> dict[str, Any]:
    rates = {"prefill_tokens_s": 100.0}
    return {
        "kind": "time",
        "model": model,
        "precision": precision,
        "context": 128,
        "batch": 1,
        "predicted": {**rates, "decode_tokens_s": predicted},
        "measured": {**rates, "decode_tokens_s": measured},
    }


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Points without engines; lists the loads that were measured."""
    from tests.plan.machines import machine

    loads: list[str] = []

    def measure(_: Settings, model: BenchModel, precision: str, cases: object) -> list[dict[str, Any]]:
        loads.append(f"{model.name} {precision} {cases}")
        return [
            _point(model.name, precision, 10.0 if precision == "int8" else 5.0, 8.0 if precision == "int4" else 4.0)
        ]

    monkeypatch.setattr(planning, "_measure", measure)
    monkeypatch.setattr(planning, "work_dir", lambda: tmp_path)
    monkeypatch.setattr("dseek.hardware.store.load_or_measure", machine)
    return loads


def test_points_are_measured_once_and_a_broken_line_again(measured: list[str], tmp_path: Path) -> None:
    planning.plan_time(Settings())
    assert len(measured) == len(set(measured)) >= 40
    (path,) = (tmp_path / "plan-points").iterdir()
    text = path.read_text().rstrip("\n")
    path.write_text(text[:-30])  # a run was stopped while it wrote
    count = len(measured)
    outcome = planning.plan_pick(Settings())
    assert len(measured) == count + 1
    assert outcome.details["hits"] == 0  # int8 was picked, int4 is faster
    prefill_s = 128 / 100
    expected = (prefill_s + 128 / 4) / (prefill_s + 128 / 8) - 1
    assert outcome.details["mean_lost"] == pytest.approx(expected) and outcome.value == 0


def test_the_cases_are_as_many_as_the_claim_says() -> None:
    points = sum(len(cases) for _, _, cases in planning._jobs(Settings()))
    batches = {batch for _, _, cases in planning._jobs(Settings()) for _, batch in cases}
    contexts = {context for _, _, cases in planning._jobs(Settings()) for context, _ in cases}
    assert points >= 40
    assert (min(batches), max(batches), min(contexts), max(contexts)) == (1, 32, 128, 8192)


@pytest.mark.rows
@pytest.mark.parametrize("name", ["profiler-overhead", "plan-what-if", "plan-time", "plan-memory", "plan-pick"])
def test_the_rows_run(name: str) -> None:
    outcome = row(name).measure(Settings(rounds=1, smoke=True))
    assert outcome.ratio is not None
