"""How processes become ranks of each other, what they agree on, and what they are told when a peer fails them."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from dseek.core.errors import ConfigError, PeerError
from dseek.parallel.ranks import Ranks
from dseek.parallel.strategy import Link

TIMEOUT_S = 120.0
"""How long a rank waits for a peer that is alive and silent, such as one that measures its machine first. A peer that
dies is noticed at once, by its closed connection."""

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells a process."""


def join(timeout_s: float = TIMEOUT_S) -> Ranks:
    """Find this process's peers: the default process group, or a new gloo group of what torchrun has started.

    Args:
        timeout_s: how long the new group waits for a silent peer; a group that exists keeps its own timeout.

    Returns:
        This process among its peers.

    Raises:
        ConfigError: there is no group and nothing says who the peers are, or the group moves no memory of the CPU.
        PeerError: a peer did not come.
    """
    if not dist.is_available():
        raise ConfigError("this PyTorch has no torch.distributed", needed="one with gloo")
    if not dist.is_initialized():
        missing = [name for name in LAUNCHER_VARIABLES if not os.environ.get(name)]
        if missing:
            raise ConfigError(
                "a shard strategy was asked for, but there are no ranks: torch.distributed is not initialised and "
                f"{', '.join(missing)} not set",
                needed="one process a rank",
                remedy="start it with `torchrun --nproc-per-node N --no-python dseek ...`, or leave the strategy out",
            )
        try:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
        except ValueError as error:
            raise ConfigError(f"the ranks' environment variables are wrong ({error})") from error
        except RuntimeError as error:
            raise PeerError(f"the ranks did not come together ({_first_line(error)})") from error
        atexit.register(_leave)
    if dist.get_backend() == "nccl":
        raise ConfigError("the process group's backend is nccl", needed="gloo: the cache lies in the CPU's memory")
    return Ranks()


@contextlib.contextmanager
def expecting(what: str) -> Iterator[None]:
    """Turn the backend's error in a block into one that says which message did not come.

    Args:
        what: what was to be exchanged.

    Raises:
        PeerError: a peer died or is silent.
    """
    try:
        yield
    except RuntimeError as error:
        raise PeerError(
            f"a peer died or does not answer: {what} did not arrive ({_first_line(error)})",
            remedy="look at the first rank that failed, and start all of them again",
        ) from error


def agree(ranks: Ranks, digest: bytes, what: str) -> None:
    """Make sure that all ranks mean the same. All ranks call this together.

    Args:
        ranks: this process and its peers.
        digest: 32 bytes, equal where they do.
        what: what it is the digest of.

    Raises:
        PeerError: they differ, or a peer does not answer.
    """
    own = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    with expecting(f"the digest of {what}"):
        digests = ranks.all_gather(own)
    others = [rank for rank, other in enumerate(digests) if not torch.equal(other, own)]
    if others:
        raise PeerError(
            f"rank {ranks.rank} has another {what} than ranks {others}",
            needed="the same program with the same arguments on every rank",
        )


def agree_on_text(ranks: Ranks, text: str, what: str) -> None:
    """Make sure that all ranks hold the same text; see `agree`.

    Args:
        ranks: this process and its peers.
        text: any length.
        what: what it is.

    Raises:
        PeerError: they differ, or a peer does not answer.
    """
    agree(ranks, hashlib.sha256(text.encode()).digest(), what)


def measure_link(ranks: Ranks, *, num_bytes: int = 1 << 20, repeats: int = 3) -> Link:
    """Time messages among the ranks; some milliseconds. All ranks call this together.

    Args:
        ranks: this process and its peers, at least two.
        num_bytes: of the long message.
        repeats: of each length; the shortest time counts, on the slowest rank.

    Returns:
        The same on every rank.

    Raises:
        PeerError: a peer does not answer.
    """
    with expecting("a message to time"):
        shortest = []
        for size in (8, num_bytes):
            message = torch.zeros(size, dtype=torch.uint8)
            room = message.new_empty((ranks.world_size, size))
            times = []
            for _ in range(repeats + 1):  # the first opens connections
                start_s = time.perf_counter()
                ranks.all_gather(message, room)
                times.append(time.perf_counter() - start_s)
            shortest.append(min(times[1:]))
        slowest = torch.stack(ranks.all_gather(torch.tensor(shortest, dtype=torch.float64))).amax(0)
    empty_s, full_s = slowest.tolist()
    num_peers = ranks.world_size - 1
    return Link(latency_s=empty_s / num_peers, gbs=num_peers * num_bytes / max(full_s - empty_s, 1e-9) / 1e9)


def _leave() -> None:
    """End the group that `join` made, before the interpreter goes and the backend's threads with it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
