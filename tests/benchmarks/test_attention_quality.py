"""Rows on the quality of dynamic attention: what is counted as skipped and as found, and that every row runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import prose
from benchmarks.errors import BenchmarkError, IncorrectError
from benchmarks.needles import Needle
from benchmarks.peers import attention_pairs
from benchmarks.peers.dseek_worker import DseekWorker
from benchmarks.rows import ROWS, Settings, attention_quality
from benchmarks.rows import needle as needle_row
from dseek.core.attention_pattern import DENSE, AttentionPattern
from dseek.engine.llm import load
from dseek.plan.selection import skipped_share
from tests.models import tiny
from tests.plan.machines import machine

NUM_TOKENS = 1300
"""20 blocks and a part."""
PATTERN = AttentionPattern(kind="dynamic", window_tokens=(128,), top_blocks=3)
SAME_EVERY_TIME = 1e-12


@pytest.mark.parametrize(("first", "past"), [(0, 1), (0, 130), (70, 130), (129, 130)])
def test_causal_pairs_are_those_on_and_below_the_diagonal(first: int, past: int) -> None:
    assert attention_pairs.causal_pairs(first, past) == np.tri(past)[first:].sum()


@pytest.mark.parametrize(("first", "past"), [(0, 1000), (200, 1000), (0, 210), (200, 210), (256, 300), (0, 192)])
def test_seen_pairs_are_those_of_a_mask(first: int, past: int) -> None:
    mask = np.zeros((256, 256), dtype=int)
    for block in (0, 2):
        mask[192:, 64 * block : 64 * (block + 1)] = 1
    mask[192:, 192:] = np.tri(64, dtype=int)
    rows = mask[max(first, 192) : min(past, 256)]
    assert attention_pairs.seen_pairs(3, [0, 2, 3], 0, first, past) == rows.sum()
    assert attention_pairs.seen_pairs(3, [0, 2, 3], 5, first, past) == rows.sum() + 5 * len(rows)


@pytest.mark.parametrize(("first", "past"), [(0, 1000), (200, 1000), (0, 210), (196, 201), (200, 203), (0, 192)])
def test_seen_pairs_by_rows_are_those_of_a_mask(first: int, past: int) -> None:
    mask = np.zeros((256, 256), dtype=int)
    mask[192:208, 0:64] = 1
    mask[199:208, 64:128] = 1  # the seventh row of the strip opens a block
    mask[192:, 192:] = np.tri(64, dtype=int)
    rows = mask[max(first, 192) : min(past, 208)]
    assert attention_pairs.seen_pairs_by_rows(192, [0, 1, 3], [0, 7, 0], first, past) == rows.sum()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny.save("llama-nine-heads", tmp_path_factory.mktemp("model"))
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 4096}))
    return path


def _worker(folder: Path, patterns: tuple[AttentionPattern, ...] | None) -> DseekWorker:
    """The benchmarks' worker, in this process, around a small random model."""
    options: dict[str, Any] = {"precision": "bf16", "context": 1408, "batch": 1, "machine": machine()}
    with load(str(folder), attention="dense", **options) as llm:
        plan = llm.plan
    worker = DseekWorker()
    if patterns is not None:
        plan = dataclasses.replace(plan, attention_patterns=patterns)
    worker.llm = load(str(folder), plan=plan)
    return worker


@pytest.mark.native
@pytest.mark.parametrize("first", [0, 700])
def test_counts_come_from_selections_of_every_layer(folder: Path, first: int) -> None:
    ids = tiny.token_ids(NUM_TOKENS, seed=3)
    expected = skipped_share(PATTERN, NUM_TOKENS - 1, 3, first_token=first)
    for patterns, share in (((PATTERN, PATTERN), expected), ((PATTERN, DENSE), expected / 2), ((DENSE, DENSE), 0)):
        worker = _worker(folder, patterns)
        with worker.llm:
            assert worker.watch()["gate"] is False
            worker.llm.engine.allocator.allocate(1)  # so that pages are not the blocks' own numbers
            worker.nll(ids[:-1], window=NUM_TOKENS)
            assert worker.skipped([first])["shares"] == [pytest.approx(share, abs=SAME_EVERY_TIME)]


@pytest.mark.native
def test_only_a_sequence_with_all_its_logits_is_counted(folder: Path) -> None:
    ids = tiny.token_ids(NUM_TOKENS, seed=4)
    worker = _worker(folder, (PATTERN, PATTERN))
    with worker.llm:
        worker.watch()
        for compute in (lambda: None, lambda: worker.generate(ids, 5)):
            compute()
            with pytest.raises(RuntimeError, match="`nll` does that"):
                worker.skipped([0])
        worker.nll(ids, window=NUM_TOKENS)
        share = skipped_share(PATTERN, NUM_TOKENS, 3)
        assert worker.skipped([0])["shares"] == [pytest.approx(share, abs=SAME_EVERY_TIME)]


@pytest.mark.native
def test_runner_tells_what_it_selected_and_refuses_what_there_is_not(folder: Path) -> None:
    worker = _worker(folder, (PATTERN, DENSE))
    with worker.llm:
        runner = worker.llm.engine.runner
        worker.watch()
        worker.nll(tiny.token_ids(NUM_TOKENS, seed=5), window=NUM_TOKENS)
        pages = worker.llm.engine.runner.pages
        exact, far = runner.selection(0, 0, pages, 20)
        assert far == [] and exact[0] == 0 and exact[-3:] == [18, 19, 20] and len(exact) == 1 + 2 + 1 + 3
        with pytest.raises(ValueError, match="no such layer"):
            runner.selection(1, 0, pages, 20)
        with pytest.raises(ValueError, match="does not reach"):
            runner.selection(0, 0, pages[:4], 20)


def test_rows_attend_as_one_function_says() -> None:
    budget = attention_quality.Budget(window_tokens=128, top_blocks=5, min_share=0.1)
    assert attention_quality.dynamic_wish(budget) == {
        "attention": "dynamic",
        "attention_window": 128,
        "attention_top_blocks": 5,
        "attention_min_share": 0.1,
    }


def test_bar_says_what_the_share_is_of() -> None:
    assert ROWS["gate-8k"].bar == "0.992x, 78 % of the pairs skipped"
    assert ROWS["prose-perplexity"].bar == "0.994x, 80 % of the pairs skipped"
    assert ROWS["needle"].bar == "0.98x"
    assert ROWS["prefill-512-1b"].bar == "1x, 75 % of the limit"
    assert not ROWS["gate-8k"].is_met(1.0, 0.7) and ROWS["gate-8k"].is_met(0.993, 0.79)


def _trials(count: int) -> list[needle_row.Trial]:
    hidden = Needle("Wanda", "12345")
    return [
        needle_row.Trial(length=64, depth=place / 10, needle=hidden, prompt=[1], answer=[2]) for place in range(count)
    ]


def test_needles_count_where_dense_attention_finds_them() -> None:
    found = {"dense": [True, True, False, True, True], "dynamic": [True, False, True, True, True]}
    outcome = needle_row._outcome(_trials(5), found, [0.5] * 5, {})
    assert outcome.ratio == outcome.value == 0.75
    assert outcome.details["found_by_dense"] == 4
    assert [missed["depth"] for missed in outcome.details["missed"]] == [0.1]
    assert [missed["depth"] for missed in outcome.details["not_found_by_dense"]] == [0.2]


def test_row_is_red_where_dense_attention_finds_too_little() -> None:
    found = {"dense": [True, False, False], "dynamic": [True, True, True]}
    with pytest.raises(IncorrectError, match="finds 1 of 3 needles"):
        needle_row._outcome(_trials(3), found, [0.5] * 3, {})


def test_row_without_prose_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(prose.PROSE_VARIABLE, raising=False)
    with pytest.raises(BenchmarkError, match="BENCHMARKS_PROSE"):
        attention_quality.prose_perplexity(Settings(smoke=True))


@pytest.mark.rows
@pytest.mark.native
@pytest.mark.model
@pytest.mark.slow
@pytest.mark.usefixtures("embedded_model")
@pytest.mark.parametrize("name", ["gate-8k", "gate-16k", "needle", "prose-perplexity"])
def test_row_runs_on_the_smallest_sizes(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pydoc_data.topics import topics

    path = tmp_path / "manual.jsonl"
    path.write_text("".join(json.dumps({"title": "manual", "context": text}) + "\n" for text in topics.values()))
    monkeypatch.setenv(prose.PROSE_VARIABLE, str(path))
    assert command.main(["run", name, "--smoke", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["correct"] is True and record["peer"] == "dense attention"
    assert 0.5 < record["ratio"] < 1.5 and 0 < record["limit_share"] < 0.5
