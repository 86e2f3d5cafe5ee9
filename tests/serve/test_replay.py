"""Traces are read strictly, replayed at their times, and summed up as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from dseek.cli.main import main
from dseek.core.errors import FileFormatError
from dseek.serve.replay import Seen, Targets, fitted, percentiles, summed_up
from dseek.serve.trace import Arrival, read_trace, scaled

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


def test_a_trace_is_read_in_order_of_time(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + "2023-11-16 18:17:04.0319600,3180,8\n2023-11-16 18:17:03.5319600,4808,10\n")
    assert read_trace(path) == [Arrival(0.0, 4808, 10), Arrival(0.5, 3180, 8)]
    assert scaled(read_trace(path), 2.0)[1].at_s == 0.25
    assert fitted(read_trace(path), 1000)[0] == Arrival(0.0, 989, 10)
    assert len(read_trace(path, 1)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        HEAD,
        "a,b\n1,2\n",
        HEAD + "yesterday,1,1\n",
        HEAD + "2023-11-16 18:17:03,0,1\n",
        HEAD + "2023-11-16 18:17:03,1\n",
        HEAD + "2023-11-16 18:17:03,1,99999999999\n",
        HEAD + "2023-11-16 18:17:03,x,1\n",
    ],
)
def test_a_trace_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(FileFormatError, match=r"trace\.csv"):
        read_trace(write(tmp_path, text))


def test_percentiles_are_nearest_ranks() -> None:
    assert percentiles([float(number) for number in range(1, 101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert percentiles([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0}
    assert percentiles([]) == {}


def test_goodput_counts_what_kept_both_targets() -> None:
    def seen(first_s: float, whole_s: float, error: str | None = None) -> Seen:
        return Seen(Arrival(0.0, 5, 11), first_s, [0.1] * 10, whole_s, 11, error)

    targets = Targets(first_token_s=1.0, between_tokens_s=0.1)
    results = [seen(0.5, 1.5), seen(1.5, 2.5), seen(0.5, 2.0), seen(0.5, 1.5, "failed")]
    report = summed_up(results, targets)
    assert (report.requests, report.failed, report.good_share) == (4, 1, 0.25)
    assert report.goodput_s == pytest.approx(1 / 2.5)
    assert report.first_token_s["p50"] == 0.5 and report.whole_s["p99"] == 2.5


def test_it_needs_a_model_or_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, HEAD + "2023-11-16 18:17:03,1,1\n")
    assert main(["bench-serve", "--trace", str(path)]) == 2
    assert "--url" in capsys.readouterr().err
    assert main(["bench-serve", "--trace", str(path), "--url", "http://127.0.0.1:9"]) == 2
    assert "does not answer" in capsys.readouterr().err
