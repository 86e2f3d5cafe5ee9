"""The rows on the server run on their smallest sizes, and their checks can be red."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.errors import BenchmarkError, IncorrectError
from benchmarks.hostile import complaint, hostile_requests
from benchmarks.rows import Settings, row, serving
from benchmarks.rows.load_generator import outcome_of
from benchmarks.server import Answered

SMOKE = Settings(threads=1, rounds=2, smoke=True)

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{40 + number:02d}.6805900,{50 + 9 * number},{4 + number}\n" for number in range(8)
)


@pytest.mark.rows
@pytest.mark.parametrize(
    "name", ["exact-under-load", "gap-long-prompt", "prefix-reuse", "streams", "soak", "hostile", "replica-kill"]
)
def test_a_row_runs(name: str) -> None:
    outcome = row(name).measure(SMOKE)
    assert outcome.value >= 0


@pytest.mark.rows
def test_the_trace_is_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trace.csv").write_text(TRACE)
    monkeypatch.setenv(serving.TRACE_VARIABLE, str(tmp_path / "trace.csv"))
    outcome = row("ttft-azure").measure(SMOKE)
    assert outcome.value > 0 and outcome.details["failed"] == 0


def test_without_a_trace_the_row_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serving.TRACE_VARIABLE, raising=False)
    with pytest.raises(BenchmarkError, match=serving.TRACE_VARIABLE):
        row("ttft-azure").measure(SMOKE)


def _report(**changes: Any) -> dict[str, Any]:
    spread = {"median": 1.0, "min": 32, "max": 32, "percentiles": {"p99": 2.0}}
    names = ("output_token_count", "time_to_first_token_ms", "inter_token_latency_ms")
    metrics = {name: {"successful": spread | changes.get(name, {})} for name in names}
    totals = {"successful": 8, "errored": 0, "incomplete": 0, "total": 8} | changes.get("totals", {})
    return {"benchmarks": [{"metrics": {**metrics, "request_totals": totals}}]}


def test_the_load_generators_report_is_judged() -> None:
    outcome = outcome_of(_report(), 8)
    assert outcome.ratio == 1 and outcome.details["time_to_first_token_ms"] == {"median": 1.0, "p99": 2.0}
    for wrong in ({"totals": {"successful": 7, "errored": 1}}, {"output_token_count": {"min": 31}}):
        with pytest.raises(IncorrectError):
            outcome_of(_report(**wrong), 8)
    with pytest.raises(IncorrectError):
        outcome_of(_report(), 9)
    with pytest.raises(BenchmarkError, match="not understood"):
        outcome_of({"benchmarks": []}, 8)


def test_an_idle_server_is_one_without_requests_and_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.time, "sleep", lambda seconds: None)

    class Fake:
        def __init__(self, **changes: int) -> None:
            self.found = {"running": 0, "waiting": 0, "free_pages": 8, "num_pages": 8, **changes}

        def status(self) -> dict[str, Any]:
            return self.found

    serving._check_idle(Fake())  # type: ignore[arg-type]
    for wrong in ({"running": 1}, {"waiting": 1}, {"free_pages": 7}):
        with pytest.raises(IncorrectError):
            serving._check_idle(Fake(**wrong))  # type: ignore[arg-type]


def test_answers_differ_by_text_length_and_end() -> None:
    one = Answered("text", 3, "stop")
    assert serving._same(one, Answered("text", 3, "stop", [1.0], 0.5))
    for other in (Answered("texts", 3, "stop"), Answered("text", 4, "stop"), Answered("text", 3, "length")):
        assert not serving._same(one, other)


def test_hostile_requests_repeat_and_are_judged() -> None:
    assert hostile_requests(50, seed=3) == hostile_requests(50, seed=3) != hostile_requests(50, seed=4)
    good = {"x-request-id": "1", "content-type": "application/json"}
    error = b'{"error":{"message":"m","type":"t","param":null,"code":null}}'
    assert complaint(400, good, error) is None
    assert complaint(500, good, error) and complaint(200, {}, b"{}")
    assert complaint(400, good, b'{"error":{"message":"m"}}') and complaint(404, good, b"root:x:0:0")
