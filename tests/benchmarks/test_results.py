"""Rows, results and the table: what is printed, what is kept, and that red rows report nothing."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import paths, result, rows, table
from benchmarks.errors import BenchmarkError, IncorrectError
from benchmarks.result import Outcome
from benchmarks.rows import ROWS, Row, Settings

MACHINE = {
    "cpu": "Some(R) CPU 9000 Processor",
    "cores": 2,
    "threads": 2,
    "features": ["avx2"],
    "last_cache_bytes": 1 << 25,
    "memory_bytes": 1 << 34,
    "kernels": "avx2",
}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A temporary cache, a known machine, and two rows that measure nothing."""
    monkeypatch.setenv("DSEEK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(command, "describe", lambda threads: {**MACHINE, "threads": threads})
    monkeypatch.setattr(rows.Row, "measure", _measure)


def _measure(self: Row, settings: Settings) -> Outcome:
    if self.name == "load":
        raise IncorrectError("a wrong answer")
    return Outcome(value=0.123456789, unit="s", ratio=1.5, limit_share=0.6, peer="somebody", details={"tokens": 512})


def test_every_row_has_its_function() -> None:
    for entry in ROWS.values():
        module, function = entry.place.split(":")
        assert callable(getattr(importlib.import_module(f"benchmarks.rows.{module}"), function))
        assert entry.bar


def test_unknown_row_names_the_nearest() -> None:
    with pytest.raises(BenchmarkError, match="did you mean prefill-512"):
        rows.row("prefil-512")


def test_list_shows_all_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == list(ROWS)


@pytest.mark.usefixtures("measured")
def test_run_prints_one_object_and_keeps_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["run", "prefill-512", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert tuple(record) == result.FIELDS
    assert record["value"] == 0.123457 and record["correct"] is True and record["machine"] == MACHINE
    kept = result.kept(MACHINE)["prefill-512"]
    assert kept["details"] == {"tokens": 512} and kept["measured_at"]


@pytest.mark.usefixtures("measured")
def test_red_row_reports_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["run", "load", "--json"]) == 1
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record["correct"] is False
    assert [record[key] for key in ("value", "unit", "ratio", "limit_share", "peer")] == [None] * 5
    assert "a wrong answer" in captured.err


@pytest.mark.usefixtures("measured")
def test_smoke_run_keeps_nothing() -> None:
    assert command.main(["run", "prefill-512", "--smoke"]) == 0
    assert result.kept(MACHINE) == {}


@pytest.mark.usefixtures("measured")
def test_user_errors_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["run", "no-such-row", "--json"]) == 2
    assert "error: there is no row" in capsys.readouterr().err


@pytest.mark.usefixtures("measured")
def test_table_is_written_to_results_and_readme(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    monkeypatch.setattr(table, "REPOSITORY", tmp_path)
    monkeypatch.setattr(table, "RESULTS_DIR", tmp_path / "results")
    assert command.main(["table", "--write"]) == 2  # nothing measured yet
    for name in ("prefill-512", "load"):
        command.main(["run", name])
    assert command.main(["table", "--write"]) == 0
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert re.search(
        r"`prefill-512`.*123\.5 ms \(4,147 tokens/s\) \| somebody \| 1\.50x \| 1\.15x \| 60 % \| yes", readme
    )
    assert re.search(r"`load`.*not reported: its check is red", readme)
    (path,) = (tmp_path / "results").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-some-9000-avx2-2t\.json", path.name)
    stored = json.loads(path.read_text())
    assert [record["name"] for record in stored["results"]] == ["prefill-512", "load"]


@pytest.mark.usefixtures("measured")
def test_the_readme_shows_the_newest_result_of_any_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"{table.START}\n{table.END}\n")
    monkeypatch.setattr(table, "REPOSITORY", tmp_path)
    monkeypatch.setattr(table, "RESULTS_DIR", tmp_path / "results")
    command.main(["run", "prefill-512"])
    assert command.main(["table", "--write"]) == 0
    (path,) = (tmp_path / "results").iterdir()
    own = json.loads(path.read_text())["results"][0]
    other = {**MACHINE, "cpu": "Elder"}
    older = {**own, "machine": other, "ratio": 9.0, "measured_at": "2001-01-01T00:00:00+00:00"}
    elsewhere = [older, {**older, "name": "prefill-512-1b", "ratio": 7.0}]
    (tmp_path / "results" / "2001-01-01-elder.json").write_text(json.dumps({"results": elsewhere}))
    assert command.main(["table", "--write"]) == 0
    readme = (tmp_path / "README.md").read_text()
    assert re.search(r"- A: .*9000", readme) and re.search(r"- B: Elder", readme)
    assert re.search(r"`prefill-512`.* 1\.50x .*\| A, 2", readme) and "9.00x" not in readme
    assert re.search(r"`prefill-512-1b`.* 7\.00x .*\| B, 2001-01-01", readme)


def test_table_needs_its_place() -> None:
    with pytest.raises(BenchmarkError, match="lacks the lines"):
        table.inserted("nothing here", "table")


def test_readme_has_a_place_for_the_table() -> None:
    table.inserted((paths.REPOSITORY / "README.md").read_text(), "table")


@pytest.mark.parametrize(
    ("ratio", "share", "met"), [(1.0, 0.75, True), (0.99, 0.9, False), (1.2, 0.74, False), (1.2, None, False)]
)
def test_claim_asks_for_ratio_and_share(ratio: float, share: float | None, met: bool) -> None:
    assert ROWS["prefill-512-1b"].is_met(ratio, share) is met


def test_ratio_to_a_bar_has_an_end() -> None:
    assert result.ratio_to_bar(0.15, 0.10) == pytest.approx(1.5)
    assert result.ratio_to_bar(0.15, 0.0) == result.MAX_RATIO
