"""The harness's talk with a worker: answers, failures, freezing, and the contest that alternates."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks import contest
from benchmarks.errors import BenchmarkError
from benchmarks.peers import client, environments, worker
from benchmarks.peers.client import PeerProcess


@pytest.fixture(autouse=True)
def fake_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make `fake` a worker of the project's own environment, with its logs in a temporary cache."""
    monkeypatch.setenv("DSEEK_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(client.WORKERS, "fake", "tests.benchmarks.fake_worker")
    monkeypatch.setattr(client, "OWN", (*client.OWN, "fake"))


def test_answers_come_back_and_prints_do_not_disturb() -> None:
    with PeerProcess("fake", threads=2) as process:
        answer = process.call("load", path="p", threads=2, context_tokens=8)
        assert (answer["path"], answer["omp"]) == ("p", "2")
        assert process.call("memory")["peak_bytes"] > 1 << 20
    assert "engines print to stdout" in process.log_path.read_text()


def test_failure_is_an_error_and_the_worker_goes_on() -> None:
    with PeerProcess("fake") as process:
        with pytest.raises(BenchmarkError, match="as asked"):
            process.call("fail")
        with pytest.raises(BenchmarkError, match="no such operation"):
            process.call("juggle")
        assert process.call("generate", token_ids=[7], num_tokens=2)["token_ids"] == [7, 7]


def test_death_is_an_error() -> None:
    with PeerProcess("fake") as process, pytest.raises(BenchmarkError, match="ended during die"):
        process.call("die")


def test_a_worker_tells_its_first_token_on_the_clock_of_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    before = time.monotonic()
    with PeerProcess("fake") as process:
        answer = process.call("start", path="p")
        assert before <= process.started_s < answer["first_token_at_s"] <= time.monotonic()
        assert answer["keeps_bytecode"]


def test_frozen_worker_is_stopped_and_woken_by_the_next_call() -> None:
    with PeerProcess("fake") as process:
        process.call("memory")
        process.freeze()
        status = Path(f"/proc/{process._process.pid}/stat")
        deadline = time.monotonic() + 5
        while status.read_text().rsplit(")", 1)[1].split()[0] != "T":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert process.call("memory")["now_bytes"] > 0


def test_contest_alternates_and_turns_the_order_around() -> None:
    calls: list[tuple[str, int]] = []

    def call_of(name: str):  # type: ignore[no-untyped-def]
        def call(round_idx: int) -> dict[str, float]:
            calls.append((name, round_idx))
            return {"s": float(round_idx)}

        return call

    answers = contest.alternate({"a": call_of("a"), "b": call_of("b")}, rounds=3)
    assert calls == [("b", -1), ("a", -1), ("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert contest.median_of(answers["a"], "s") == 1.0
    assert contest.spread_of(answers["b"], "s") == {"median": 1.0, "least": 0.0, "greatest": 2.0, "rounds": 3}


def test_engines_answer_the_same_prompts_in_turn() -> None:
    entrants = [contest.Entrant("one", "fake", "a"), contest.Entrant("two", "fake", "b")]
    with contest.running(entrants, threads=1, context_tokens=4) as engines:
        answers = contest.generate_in_turn(engines, [[1], [2], [3]], 2, rounds=2)
    for name in ("one", "two"):
        assert [answer["token_ids"] for answer in answers[name]] == [[1, 1], [2, 2]]
        assert [answer["prompt_idx"] for answer in answers[name]] == [0, 1]


def test_steady_time_leaves_the_first_token_out() -> None:
    assert worker.steady_token_s([10.0, 10.5, 11.0]) == pytest.approx(0.5)
    assert worker.steady_token_s([10.0]) == 0.0


def test_folder_of_the_environments_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert environments.peers_dir() == tmp_path / "peers"
    monkeypatch.setenv(environments.PEERS_DIR_VARIABLE, str(tmp_path / "elsewhere"))
    assert environments.peers_dir() == tmp_path / "elsewhere"
    with pytest.raises(BenchmarkError, match="unknown peer"):
        environments.interpreter("nobody")
    assert environments.installed_version(tmp_path / "no" / "python", "pip") is None
