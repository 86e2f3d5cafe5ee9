"""The process group `dseek` beside gloo: all-reduce, and handing one large tensor to the others."""

from __future__ import annotations

import statistics
import time
from typing import Any

from benchmarks.errors import IncorrectError
from benchmarks.ranks import dseek_group, on_ranks
from benchmarks.result import Outcome
from benchmarks.rows import Settings


def sync(settings: Settings) -> Outcome:
    """All-reduce of float32, 64 MiB and 1 MiB, between 2 and 4 processes of one thread, both groups in turn.

    The ratio is the smallest of the four; the value is the time of 64 MiB between two.
    """
    sizes = (64 << 20, 1 << 20) if not settings.smoke else (1 << 20, 1 << 16)
    cases: dict[str, dict[str, Any]] = {}
    for world_size in (2, 4):
        wanted = {size: settings.rounds * (1 if settings.smoke or size > 4 << 20 else 10) for size in sizes}
        for size, times in on_ranks(world_size, _time_sizes, "all_reduce", wanted).items():
            cases[f"{size} bytes, {world_size} processes"] = _summary(times)
    value = next(iter(cases.values()))["dseek"]["median"]
    ratio = min(case["ratio"] for case in cases.values())
    return Outcome(value=value, unit="s", ratio=ratio, peer="gloo", details=cases)


def handover(settings: Settings) -> Outcome:
    """One rank hands 256 MiB to another, from ordinary memory and from memory that both have mapped, beside gloo.

    The ratio is that of ordinary memory, which needs no other program; the mapped one is in the details.
    """
    num_bytes = 256 << 20 if not settings.smoke else 1 << 20
    summary = _summary(on_ranks(2, _time_sizes, "broadcast", {num_bytes: settings.rounds})[num_bytes])
    return Outcome(value=summary["dseek"]["median"], unit="s", ratio=summary["ratio"], peer="gloo", details=summary)


def _summary(times: dict[str, list[float]]) -> dict[str, Any]:
    spread: dict[str, Any] = {
        name: {"median": statistics.median(values), "least": min(values), "greatest": max(values)}
        for name, values in times.items()
    }
    return {**spread, "ratio": spread["gloo"]["median"] / spread["dseek"]["median"]}


def _time_sizes(operation: str, rounds: dict[int, int]) -> dict[int, dict[str, list[float]]]:
    """On every rank: times by size and group, in so many rounds of each size."""
    group = dseek_group()
    return {num_bytes: _time_both(group, operation, num_bytes, count) for num_bytes, count in rounds.items()}


def _time_both(ours: Any, operation: str, num_bytes: int, rounds: int) -> dict[str, list[float]]:
    """On every rank: times of the slowest rank in each round, by group."""
    import torch
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    ordinary = torch.empty(num_bytes // 4)
    mapped = ours.empty_shared(num_bytes // 4)
    entrants = {"gloo": (None, ordinary), "dseek": (ours, ordinary), "dseek, mapped memory": (ours, mapped)}
    times: dict[str, list[float]] = {name: [] for name in entrants}
    names = list(entrants)
    for round_idx in range(-1, rounds):
        for name in names if round_idx % 2 else reversed(names):
            group, x = entrants[name]
            x.fill_(rank + 1)
            dist.barrier(group=group)
            start_s = time.perf_counter()
            if operation == "all_reduce":
                dist.all_reduce(x, group=group)
            else:
                dist.broadcast(x, 0, group=group)
            elapsed = torch.tensor([time.perf_counter() - start_s], dtype=torch.float64)
            wanted = world_size * (world_size + 1) / 2 if operation == "all_reduce" else 1.0
            if not bool((x == wanted).all()):
                raise IncorrectError(f"{operation} of {num_bytes} bytes on {name} is wrong on rank {rank}")
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
            if round_idx >= 0:
                times[name].append(float(elapsed))
    return times
