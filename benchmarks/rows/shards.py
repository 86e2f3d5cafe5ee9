"""One long sequence cut into subtasks with dynamic attention, against one task with dense attention."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.contest import alternate, spread_of
from benchmarks.errors import IncorrectError
from benchmarks.peers.client import PeerProcess
from benchmarks.result import Outcome
from benchmarks.rows import Settings
from benchmarks.rows.pattern import FIELDS

NUM_HEADS, NUM_GROUPS, HEAD_DIM = 9, 3, 64
"""Attention of SmolLM2."""

NUM_SUBTASKS = 8

MAX_DIFFERENCE, MIN_COSINE = 0.03, 0.9995
"""Of results of size 1 and below in bf16, and float32 attention over the selected blocks."""

MIN_SAME_CHOICES = 0.999
"""Least share of choices that the kernel makes too over the whole sequence; near ties may fall otherwise."""


def shards_100k(settings: Settings) -> Outcome:
    """100,000 tokens as 8 subtasks with dynamic attention; attention alone, the keys' exchange included.

    The subtasks are ranks of the context-parallel attention. So that the figure does not need eight machines, they run
    in one process, one at a time, each with as many threads as the dense task has. A subtask's busy time is all that it
    computes and copies: sums of keys, selection, the copies of what it sends and receives, attention; not the waiting
    for the other subtasks, nor a network between machines. Throughput a worker is tokens / (8 x mean busy time), that
    of the one dense task tokens / its time, so the ratio is the dense time over the sum of the busy times. The slowest
    subtask, which would bound the time on eight machines, is in the details.
    """
    num_tokens = settings.pick(100_000, 5_000)
    # The least maximum, in whole blocks, that gives so many chunks.
    max_chunk_tokens = -(-num_tokens // (NUM_SUBTASKS * 64)) * 64
    with PeerProcess("shards", threads=settings.threads) as worker:
        worker.call(
            "setup",
            threads=settings.threads,
            num_tokens=num_tokens,
            num_heads=NUM_HEADS,
            num_groups=NUM_GROUPS,
            head_dim=HEAD_DIM,
        )

        def shards(round_idx: int) -> dict[str, Any]:
            answer = worker.call("shards", max_chunk_tokens=max_chunk_tokens, pattern=FIELDS, check=round_idx == 0)
            return {**answer, "sum_s": sum(answer["busy_s"]), "slowest_s": max(answer["busy_s"])}

        answers = alternate({"shards": shards, "dense": lambda _: worker.call("dense")}, rounds=settings.rounds)
    checked = answers["shards"][0]
    _check(checked)
    sum_s = statistics.median(answer["sum_s"] for answer in answers["shards"])
    dense_s = statistics.median(answer["busy_s"] for answer in answers["dense"])
    return Outcome(
        value=sum_s / NUM_SUBTASKS,
        unit="s",
        ratio=dense_s / sum_s,
        limit_share=None,
        peer="dseek, dense attention as one task",
        details={
            "tokens_of_subtasks": checked["tokens"],
            "threads_per_worker": settings.threads,
            "tokens_s_per_worker": {"shards": num_tokens / sum_s, "dense": num_tokens / dense_s},
            "sum_s": spread_of(answers["shards"], "sum_s"),
            "slowest_s": spread_of(answers["shards"], "slowest_s"),
            "dense_s": spread_of(answers["dense"], "busy_s"),
            "check": {key: checked[key] for key in ("difference", "cosine", "same_choices")},
        },
    )


def _check(answer: dict[str, Any]) -> None:
    """Raise IncorrectError where rows are wrong, chunks are too few, or other blocks were chosen."""
    if len(answer["tokens"]) != NUM_SUBTASKS:
        raise IncorrectError(f"the sequence was cut into {len(answer['tokens'])} subtasks, not {NUM_SUBTASKS}")
    if not (answer["difference"] <= MAX_DIFFERENCE and answer["cosine"] >= MIN_COSINE):
        raise IncorrectError(
            f"attention is off by {answer['difference']:.4f}, cosine {answer['cosine']:.6f}; right are "
            f"{MAX_DIFFERENCE} and {MIN_COSINE}"
        )
    if not answer["same_choices"] >= MIN_SAME_CHOICES:
        raise IncorrectError(
            f"{answer['same_choices']:.4%} of the choices are the kernel's, not {MIN_SAME_CHOICES:.1%}"
        )
