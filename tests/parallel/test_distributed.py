"""The runner of the other tests itself: results in order, and no failure stays in a rank."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from dseek.core.errors import ConfigError
from dseek.parallel import balanced_assignment
from dseek.parallel.context_parallel import ContextParallel
from tests.parallel.distributed import RankError, run_ranks


def _sum_of_ranks(rank: int, world_size: int, add: int) -> tuple[int, int]:
    total = torch.tensor([rank + add])
    dist.all_reduce(total)
    return rank, int(total)


def _fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ZeroDivisionError("rank one gives up")
    dist.barrier()


def _die_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    time.sleep(60)


def _hang_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(600)


def _disagree(rank: int, world_size: int) -> list[str]:
    messages = []
    for assignment, length, start in (
        (balanced_assignment(3, 2), 150 + rank, 0),
        (balanced_assignment(3, 2, layout="zigzag" if rank else "contiguous"), 150, 0),
        (balanced_assignment(3, 2), 150, 64 * rank),
        (balanced_assignment(3, 3), 150, 0),
        (balanced_assignment(3, 2), 128, 0),
        (balanced_assignment(3, 2), 150, 63),
        (balanced_assignment(3, 2), 150, 192),
    ):
        with pytest.raises(ConfigError) as caught:
            ContextParallel(assignment, length, start=start)
        messages.append(str(caught.value))
    return messages


def test_results_come_back_in_order() -> None:
    assert run_ranks(2, _sum_of_ranks, 10) == [(0, 21), (1, 21)]


def test_a_failure_surfaces_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2 raised[\s\S]*_fail_on_one[\s\S]*rank one gives up"):
        run_ranks(2, _fail_on_one)


def test_a_death_surfaces() -> None:
    with pytest.raises(RankError, match="rank 1 of 2 died"):
        run_ranks(2, _die_on_one)


def test_a_hang_surfaces() -> None:
    with pytest.raises(RankError, match=r"ranks \[0, 1\] of 2 hang"):
        run_ranks(2, _hang_on_one, hang_s=8.0)


def test_ranks_that_disagree_or_err_all_say_so() -> None:
    first, second = run_ranks(2, _disagree)
    assert all("another sequence length, start or assignment than ranks [1]" in message for message in first[:3])
    assert all("another sequence length, start or assignment than ranks [0]" in message for message in second[:3])
    assert first[3:] == second[3:]
    for message, found in zip(first[3:], ("3 ranks", "128 tokens", "start at 63", "start at 192"), strict=True):
        assert found in message
