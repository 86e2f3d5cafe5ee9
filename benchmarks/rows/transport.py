"""The process group `dseek` beside gloo: all-reduce, and handing one large tensor to the others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks.errors import BenchmarkError, IncorrectError
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
        for size, times in on_ranks(world_size, _time_sizes, wanted).items():
            cases[f"{size} bytes, {world_size} processes"] = _summary(times)
    value = next(iter(cases.values()))["dseek"]["median"]
    ratio = min(case["ratio"] for case in cases.values())
    return Outcome(value=value, unit="s", ratio=ratio, peer="gloo", details=cases)


LEAST_GLOO = 10.0
"""How many times gloo's broadcast the hand-over has to be."""


def handover(settings: Settings) -> Outcome:
    """One rank hands 256 MiB to another, which may read them then: where they lie, and by copying, beside gloo and Ray.

    The value is of a tensor in memory that both have mapped, which `hand_over` does not move. The ratio is the smaller
    share of two bars: ten times gloo's broadcast, and Ray's object store (put by one process and got by another, one
    copy). Broadcasts, which fill a tensor of the taker's own, are in the details.
    """
    num_bytes = 256 << 20 if not settings.smoke else 1 << 20
    times = on_ranks(2, _time_handover, num_bytes, settings.rounds)
    spread = {name: _spread(values) for name, values in times.items()}
    medians = {name: figures["median"] for name, figures in spread.items()}
    own = medians["dseek, in place"]
    ratios = {name: median / own for name, median in medians.items()}
    return Outcome(
        value=own,
        unit="s",
        ratio=min(ratios["gloo"] / LEAST_GLOO, ratios["Ray"]),
        peer="gloo, Ray",
        details={
            **spread,
            "ratios": ratios,
            "gloo over dseek's broadcast": medians["gloo"] / medians["dseek"],
            "gloo over dseek's broadcast, mapped memory": medians["gloo"] / medians["dseek, mapped memory"],
        },
    )


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def _time_handover(num_bytes: int, rounds: int) -> dict[str, list[float]]:
    """On both ranks: times of the slower rank in each round, by way; Ray's driver is rank 0."""
    import torch
    import torch.distributed as dist

    rank, ours = dist.get_rank(), dseek_group()
    ordinary, mapped = torch.empty(num_bytes // 4), ours.empty_shared(num_bytes // 4)

    def broadcast(group: Any, x: torch.Tensor) -> torch.Tensor:
        dist.broadcast(x, 0, group=group)
        return x

    ways: dict[str, tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]] = {
        "gloo": (ordinary, lambda x: broadcast(None, x)),
        "dseek": (ordinary, lambda x: broadcast(ours, x)),
        "dseek, mapped memory": (mapped, lambda x: broadcast(ours, x)),
        "dseek, in place": (mapped, lambda x: ours.hand_over(x, 0)),
    }
    times: dict[str, list[float]] = {name: [] for name in [*ways, "Ray"]}
    with ExitStack() as stack:
        give = stack.enter_context(_ray_taker(num_bytes)) if rank == 0 else None
        names = list(times)
        for round_idx in range(-1, rounds):
            for name in names if round_idx % 2 else reversed(names):
                x, hand = ways.get(name, (ordinary, lambda x: x))
                x.fill_(float(round_idx + 2) if rank == 0 else -1.0)
                dist.barrier()
                start_s = time.perf_counter()
                taken = hand(x)
                if name == "Ray" and give is not None:
                    give(x.numpy())
                elapsed = torch.tensor([time.perf_counter() - start_s], dtype=torch.float64)
                if name != "Ray" and not bool((taken == round_idx + 2).all()):
                    raise IncorrectError(f"{num_bytes} bytes by {name} are wrong on rank {rank}")
                dist.all_reduce(elapsed, dist.ReduceOp.MAX)
                if round_idx >= 0:
                    times[name].append(float(elapsed))
    return times


@contextmanager
def _ray_taker(num_bytes: int) -> Iterator[Callable[[Any], None]]:
    """Start Ray with one actor.

    Args:
        num_bytes: of the largest array.

    Yields:
        What puts an array into the object store and returns when the actor has got it, checked by its last element.

    Raises:
        BenchmarkError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise BenchmarkError("Ray is not installed; `make dev` brings it") from None

    class Taker:
        def take(self, references: list[Any]) -> float:
            return float(ray.get(references[0])[-1])

    store_bytes = max(4 * num_bytes, 128 << 20)
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=store_bytes,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        taker = ray.remote(Taker).remote()

        def give(array: Any) -> None:
            reference = ray.put(array)
            if ray.get(taker.take.remote([reference])) != float(array[-1]):
                raise IncorrectError("what Ray handed over is wrong")

        yield give
    finally:
        ray.shutdown()


def _summary(times: dict[str, list[float]]) -> dict[str, Any]:
    spread: dict[str, Any] = {name: _spread(values) for name, values in times.items()}
    return {**spread, "ratio": spread["gloo"]["median"] / spread["dseek"]["median"]}


def _time_sizes(rounds: dict[int, int]) -> dict[int, dict[str, list[float]]]:
    """On every rank: times by size and group, in so many rounds of each size."""
    group = dseek_group()
    return {num_bytes: _time_both(group, num_bytes, count) for num_bytes, count in rounds.items()}


def _time_both(ours: Any, num_bytes: int, rounds: int) -> dict[str, list[float]]:
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
            dist.all_reduce(x, group=group)
            elapsed = torch.tensor([time.perf_counter() - start_s], dtype=torch.float64)
            if not bool((x == world_size * (world_size + 1) / 2).all()):
                raise IncorrectError(f"all-reduce of {num_bytes} bytes on {name} is wrong on rank {rank}")
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
            if round_idx >= 0:
                times[name].append(float(elapsed))
    return times
