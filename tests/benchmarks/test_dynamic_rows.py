"""The rows on the speed of dynamic attention: they run on their smallest sizes, and their checks can be red."""

from __future__ import annotations

import copy
import dataclasses
import threading
from typing import Any

import pytest
import torch
from safetensors import safe_open

from benchmarks.errors import IncorrectError
from benchmarks.models import SMOLLM2
from benchmarks.peers.turns import TurnRanks, run_in_turn
from benchmarks.rows import Settings, pattern, row, shards, training
from dseek.models.gate_file import SHIPPED
from dseek.plan.attention_wish import AttentionWish

SMOKE = Settings(threads=1, rounds=1, smoke=True)


@pytest.mark.rows
@pytest.mark.native
def test_training_runs_and_checks_gradients() -> None:
    outcome = row("train-attention").measure(SMOKE)
    details = outcome.details
    assert outcome.value > 0 and outcome.ratio is not None
    assert outcome.ratio == min(details["forward_ratio"] / 2.5, details["backward_ratio"] / 1.7)
    assert [check["seen"] < 1 for check in details["check"]] == [True, True]

    for name in ("output", "q", "k", "v"):
        for key, value in (("difference", 0.03), ("cosine", 0.99), ("difference", float("nan"))):
            checks = copy.deepcopy(details["check"])
            checks[1][key][name] = value
            with pytest.raises(IncorrectError, match=name):
                training._check(checks)


@pytest.mark.rows
@pytest.mark.native
def test_shards_run_and_check_rows_and_choices() -> None:
    outcome = row("shards-100k").measure(SMOKE)
    details = outcome.details
    assert sum(details["tokens_of_subtasks"]) == 5000 and len(details["tokens_of_subtasks"]) == 8
    assert outcome.value == pytest.approx(details["sum_s"]["median"] / 8)
    assert outcome.ratio == pytest.approx(details["dense_s"]["median"] / details["sum_s"]["median"])
    assert details["slowest_s"]["median"] <= details["sum_s"]["median"]

    right: dict[str, Any] = {"tokens": details["tokens_of_subtasks"], **details["check"]}
    shards._check(right)
    for wrong in ({"tokens": [5000]}, {"difference": 0.04}, {"cosine": 0.99}, {"same_choices": 0.99}):
        with pytest.raises(IncorrectError):
            shards._check({**right, **wrong})


@pytest.mark.rows
@pytest.mark.slow
@pytest.mark.native
@pytest.mark.usefixtures("embedded_model")
def test_decode_runs_and_its_answers_are_judged() -> None:
    outcome = row("decode-16k").measure(SMOKE)
    assert outcome.value > 0 and outcome.peer == "dseek int8, dense"
    assert outcome.details["plan"]["attention"] == "window 64 and shares from 0.03, up to 64 blocks"
    assert set(outcome.details["check"]["regret"]) == {"dseek int8", "dseek int8, dense"}


def test_the_pattern_is_said_in_one_place() -> None:
    wish = AttentionWish(
        kind=pattern.LOAD_OPTIONS["attention"],
        window_tokens=pattern.LOAD_OPTIONS["attention_window"],
        top_blocks=pattern.LOAD_OPTIONS["attention_top_blocks"],
        min_share=pattern.LOAD_OPTIONS["attention_min_share"],
    )
    assert wish.patterns() == [dataclasses.replace(pattern.MODEL_PATTERN, gate=False)]
    assert pattern.visible_tokens(100) == pytest.approx(100)
    seen = pattern.MODEL_PATTERN.visible_tokens(16384, 1)
    assert seen < pattern.visible_tokens(16384) == pytest.approx(seen + (16384 - seen) * 2 / 90)
    by_hand = sum(pattern.visible_tokens(tokens) for tokens in range(1, 1001))
    assert pattern.prefill_pairs(1000) == pytest.approx(by_hand)
    dense = SMOLLM2.prefill_attention_operations(1000)
    assert SMOLLM2.prefill_attention_operations(1000, by_hand) == pytest.approx(dense * by_hand / (1000 * 1001 / 2))


def test_the_dense_heads_are_those_of_the_gate_that_ships() -> None:
    (file,) = SHIPPED.glob("smollm2-135m-*.safetensors")
    with safe_open(str(file), "pt") as stored:
        dense = torch.cat([stored.get_tensor(name) for name in stored.keys() if name.endswith(".dense")])  # noqa: SIM118
    assert pattern.DENSE_SHARE == pytest.approx(float(dense.float().mean()))


def test_ranks_take_turns_and_are_charged_for_what_they_do() -> None:
    running: list[int] = []
    most_at_once = []

    def work(ranks: TurnRanks) -> list[float]:
        running.append(ranks.rank)
        most_at_once.append(len(running))
        torch.ones(1 << 18 if ranks.rank == 1 else 1).cumsum(0)
        running.remove(ranks.rank)
        gathered = ranks.all_gather(torch.tensor([float(ranks.rank)]))
        target = torch.empty(1)
        sent = ranks.send(torch.tensor([10.0 + ranks.rank]), (ranks.rank + 1) % 3)
        received = ranks.receive(target, (ranks.rank - 1) % 3)
        sent.wait()
        received.wait()
        return [float(x) for x in (*gathered, target)]

    results, busy_s = run_in_turn(3, work, threads=1)
    assert results == [[0.0, 1.0, 2.0, 12.0], [0.0, 1.0, 2.0, 10.0], [0.0, 1.0, 2.0, 11.0]]
    assert set(most_at_once) == {1} and all(seconds > 0 for seconds in busy_s)


def test_a_rank_that_fails_ends_the_others() -> None:
    def work(ranks: TurnRanks) -> None:
        if ranks.rank == 1:
            raise ValueError("broken")
        ranks.all_gather(torch.zeros(1))

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="a rank failed") as raised:
        run_in_turn(3, work, threads=1)
    assert isinstance(raised.value.__cause__, ValueError)
    assert threading.active_count() == before
