"""Ranks that share one process and take turns, so that each one's busy time is that of a machine of its own.

A rank is a thread. It computes only while it holds the baton; where it waits for a peer it hands the baton on, and
copies what it receives when it has it again. So one rank runs at a time, with all of the process's kernel threads, and
what it is charged with is everything but waiting: the copies of its messages too, the wire between machines not.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

import torch

from dseek.parallel.ranks import Ranks

Result = TypeVar("Result")


class _Table:
    """Where the ranks of one run leave their messages."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.changed = threading.Condition()
        self.gathered: dict[tuple[int, int], torch.Tensor] = {}
        self.sent: defaultdict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)
        self.holder: int | None = None
        self.failed: BaseException | None = None


class TurnRanks(Ranks):
    """One rank of a run; made by `run_in_turn`."""

    def __init__(self, rank: int, table: _Table) -> None:
        self.rank, self.world_size = rank, table.world_size
        self.busy_s = 0.0
        self._table = table
        self._num_gathers = 0

    def take(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Wait for the baton, and until `ready`."""
        table = self._table
        with table.changed:
            table.changed.wait_for(lambda: table.failed is not None or (table.holder is None and ready()))
            if table.failed is not None:
                raise RuntimeError("another rank failed") from table.failed
            table.holder = self.rank
        self._started_s = time.perf_counter()

    def hand_on(self) -> None:
        """Let another rank compute."""
        self.busy_s += time.perf_counter() - self._started_s
        with self._table.changed:
            self._table.holder = None
            self._table.changed.notify_all()

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Get everybody's tensor; see `Ranks`."""
        number, gathered = self._num_gathers, self._table.gathered
        self._num_gathers += 1
        gathered[number, self.rank] = x
        self.hand_on()
        self.take(lambda: all((number, rank) in gathered for rank in range(self.world_size)))
        return [x if rank == self.rank else gathered[number, rank].clone() for rank in range(self.world_size)]

    def send(self, x: torch.Tensor, rank: int) -> _Done:
        """Leave a tensor for a peer; see `Ranks`."""
        self._table.sent[self.rank, rank].append(x)
        return _Done()

    def receive(self, x: torch.Tensor, rank: int) -> _Arrival:
        """Fetch a tensor when it is waited for; see `Ranks`."""
        return _Arrival(self, x, self._table.sent[rank, self.rank])


class _Done:
    """A message that needs no waiting: who receives it holds on to its memory."""

    def wait(self) -> None: ...


class _Arrival:
    """A message to come."""

    def __init__(self, ranks: TurnRanks, target: torch.Tensor, queue: list[torch.Tensor]) -> None:
        self._ranks, self._target, self._queue = ranks, target, queue

    def wait(self) -> None:
        """Wait for it, if need be, and copy it."""
        if not self._queue:
            self._ranks.hand_on()
            self._ranks.take(lambda: bool(self._queue))
        self._target.copy_(self._queue.pop(0))


def run_in_turn(
    world_size: int, function: Callable[[TurnRanks], Result], *, threads: int
) -> tuple[list[Result], list[float]]:
    """Call a function once a rank, one rank computing at a time.

    Args:
        world_size: ranks.
        function: what each does; it records no gradients.
        threads: PyTorch's threads for the rank whose turn it is.

    Returns:
        What each rank returned, and the seconds each was busy.

    Raises:
        RuntimeError: a rank raised; the first one's error is the cause.
    """
    table = _Table(world_size)
    ranks = [TurnRanks(rank, table) for rank in range(world_size)]
    results: dict[int, Result] = {}

    def run(own: TurnRanks) -> None:
        # Both are settings of a thread.
        torch.set_num_threads(threads)
        with torch.no_grad():
            try:
                own.take()
                results[own.rank] = function(own)
                own.hand_on()
            except BaseException as error:
                with table.changed:
                    table.failed = table.failed or error
                    table.changed.notify_all()

    workers = [threading.Thread(target=run, args=(own,)) for own in ranks]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if table.failed is not None:
        raise RuntimeError("a rank failed") from table.failed
    return [results[rank] for rank in range(world_size)], [own.busy_s for own in ranks]
