"""What ranks do in the transport's tests where something goes wrong: an interrupt, a quarrel, a peer that leaves."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dseek.parallel.transport import GroupError


def interrupt(rank: int, world_size: int) -> bool:
    """Ctrl-C on a rank that waits."""
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            dist.barrier()
        store.set("interrupted", "")
        store.wait(["told"])
    else:
        store.wait(["interrupted"])
        with pytest.raises(GroupError, match="rank 0 gave up"):
            dist.barrier()
        store.set("told", "")
    dist.destroy_process_group()
    return True


def leave_something_undone(rank: int, world_size: int) -> float:
    """A group that is destroyed while operations are under way fails them, and does not wait for them."""
    work = message = None
    if rank == 0:
        work, message = dist.all_reduce(torch.ones(3), async_op=True), dist.irecv(torch.empty(3), 1)
    start_s = time.monotonic()
    dist.destroy_process_group()
    for one in (work, message):
        if one is not None:
            with pytest.raises(GroupError):
                one.wait()
    return time.monotonic() - start_s


def offer_in_vain(rank: int, world_size: int) -> str:
    """A message larger than all buffers that nobody asks for fails when its receiver leaves."""
    message = dist.isend(torch.ones(8_000_000), 1) if rank == 0 else None
    dist.barrier()
    error = ""
    if message is None:
        dist.destroy_process_group()
    else:
        with pytest.raises(GroupError) as caught:
            message.wait()
        error = str(caught.value)
        dist.destroy_process_group()
    return error


def disagree(rank: int, world_size: int) -> str:
    """Ranks that call different things are told so."""
    with pytest.raises(GroupError) as caught:
        dist.all_reduce(torch.ones(3 + rank))
    with pytest.raises(GroupError):
        dist.barrier()
    dist.destroy_process_group()
    return str(caught.value)


def lose_a_peer(rank: int, world_size: int, how: str) -> tuple[str, float]:
    """The last rank goes; the others learn it soon, in whichever call they are."""
    dist.barrier()
    if rank == world_size - 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        dist.destroy_process_group()
        time.sleep(0.5)
        return "", 0.0
    receives = rank == 0 and how == "killed"
    x = torch.ones(100_000)
    start_s = time.monotonic()
    with pytest.raises(GroupError) as caught:
        dist.recv(x, world_size - 1) if receives else dist.all_reduce(x)
    waited_s = time.monotonic() - start_s
    with pytest.raises((GroupError, RuntimeError)):
        dist.all_reduce(torch.ones(3))
    dist.destroy_process_group()
    return str(caught.value), waited_s


def _meet_twice() -> None:
    """Over TCP the first may still find what a rank sent before it gave up."""
    dist.barrier()
    dist.barrier()


def wait_for_the_silent(rank: int, world_size: int) -> str:
    """A peer that is alive and does nothing is waited for as long as was said."""
    message = ""
    if rank == 0:
        dist.group.WORLD.set_timeout(timedelta(seconds=0.3))  # type: ignore[union-attr]
        with pytest.raises(GroupError, match=r"within 0\.3"):
            dist.recv(torch.empty(3), 1)
        with pytest.raises(GroupError) as caught:
            dist.barrier()
        message = str(caught.value)
    else:
        time.sleep(1.0)
        with pytest.raises(GroupError):
            _meet_twice()
    dist.destroy_process_group()
    return message
