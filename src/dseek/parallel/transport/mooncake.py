"""Mooncake's transfer engine: writes into memory of another process that it has registered, by RDMA or by TCP.

The engine is a package of its own (`mooncake-transfer-engine`, `-non-cuda` where there is no CUDA), and what goes over
the network is its business. Here is the little that a transport needs of it: make memory reachable, write, and be told
of what failed. What can be written to is what is registered; who may write is not asked: it belongs into a network that
is trusted.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dseek.core.errors import ConfigError
from dseek.parallel.transport.work import group_error

NEEDED = "the package mooncake-transfer-engine-non-cuda (mooncake-transfer-engine beside CUDA) and libibverbs"
DEVICES = Path("/sys/class/infiniband")
"""Where Linux lists the devices that speak RDMA."""
_PAUSE_S = 20e-6
_LONGEST_PAUSE_S = 1e-3


def has_rdma() -> bool:
    """Say whether this host has a device for RDMA."""
    return DEVICES.is_dir() and any(DEVICES.iterdir())


def is_installed() -> bool:
    """Say whether the engine can be loaded."""
    try:
        _module()
    except ConfigError:
        return False
    return True


def _module() -> Any:
    # Its log goes to standard error, a line for every region; only errors are anybody else's business.
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    try:
        return importlib.import_module("mooncake.engine")
    except ImportError as error:  # a shared library that is missing is one, too
        raise ConfigError(
            f"Mooncake's transfer engine cannot be loaded ({error})",
            needed=NEEDED,
            remedy="install them (on Debian: apt install libibverbs1), or set DSEEK_TRANSPORT to tcp",
        ) from error


class Mooncake:
    """One engine, for the life of a group."""

    def __init__(self, address: str, protocol: str) -> None:
        """Start it.

        Args:
            address: of this host, as the peers reach it.
            protocol: "rdma" or "tcp".

        Raises:
            ConfigError: it is not installed, or does not start.
        """
        self.protocol = protocol
        self._engine = _module().TransferEngine()
        if self._engine.initialize(address, "P2PHANDSHAKE", protocol, "") != 0:
            raise ConfigError(
                f"Mooncake's transfer engine does not start on {address} with {protocol}",
                remedy="see its own message above, or set DSEEK_TRANSPORT to tcp",
            )
        self.session = f"{address}:{self._engine.get_rpc_port()}"
        self._lock = threading.Lock()  # collectives and messages have threads of their own
        self._kept: list[torch.Tensor] = []
        self._num_users: dict[tuple[int, int], int] = {}
        self._abandoned: list[torch.Tensor] = []

    def keep_reachable(self, x: torch.Tensor) -> None:
        """Register the memory of a contiguous tensor `x` for the life of the engine."""
        if x.nbytes:
            with self._lock:
                self._register(x)
                self._kept.append(x)

    @contextmanager
    def reachable(self, x: torch.Tensor, *, is_read: bool) -> Iterator[torch.Tensor]:
        """Register memory while the block runs; see `reach`.

        Args:
            x: contiguous, on the CPU.
            is_read: whether what it holds is needed.

        Yields:
            What `reach` returns.
        """
        reached = self.reach(x, is_read=is_read)
        try:
            yield reached
        finally:
            self.release(reached)

    def reach(self, x: torch.Tensor, *, is_read: bool) -> torch.Tensor:
        """Register the memory of a tensor until it is released.

        Nothing is kept registered beyond that: the allocator may give the pages to somebody else. Regions may not
        overlap; so where a part of this memory is registered for another operation, other memory stands in for it.

        Args:
            x: contiguous, on the CPU, not empty.
            is_read: whether what it holds is needed.

        Returns:
            x, or a tensor like it, with its values if they are needed.

        Raises:
            GroupError: memory cannot be registered.
        """
        with self._lock:
            key = (x.data_ptr(), x.nbytes)
            if any(_holds(kept, x) for kept in self._kept):
                return x
            if key not in self._num_users:
                if any(begin < key[0] + key[1] and key[0] < begin + size for begin, size in self._num_users):
                    x = x.clone() if is_read else torch.empty_like(x)
                    key = (x.data_ptr(), x.nbytes)
                self._register(x)
                self._num_users[key] = 0
            self._num_users[key] += 1
            return x

    def release(self, reached: torch.Tensor) -> None:
        """Undo what `reach` did that returned `reached`."""
        with self._lock:
            key = (reached.data_ptr(), reached.nbytes)
            if key not in self._num_users:  # registered for good
                return
            self._num_users[key] -= 1
            if self._num_users[key] == 0:
                del self._num_users[key]
                self._engine.unregister_memory(key[0])

    def _register(self, x: torch.Tensor) -> None:
        status = self._engine.register_memory(x.data_ptr(), x.nbytes)
        if status != 0:
            raise group_error(
                f"{x.nbytes} bytes of memory cannot be registered with Mooncake (status {status}); for RDMA the limit "
                "of locked memory (ulimit -l) must allow them"
            )

    def write_all(self, writes: dict[int, tuple[str, torch.Tensor, int]], deadline: float) -> None:
        """Write into the memory of several peers at once, and wait until all of it is there.

        Args:
            writes: by rank the peer's session, what is written, and the address there.
            deadline: of `time.monotonic`.

        Raises:
            GroupError: a peer is gone, refuses or is silent.
        """
        under_way: dict[int, int] = {}
        try:
            for rank, (session, x, address) in writes.items():
                under_way[rank] = self._engine.transfer_submit_write(session, x.data_ptr(), address, x.nbytes)
            self._wait(under_way, deadline)
        except BaseException:
            # A write that goes on reads this memory, which must not become anything else: it stays with the engine.
            self._abandoned += [writes[rank][1] for rank in under_way]
            raise

    def _wait(self, under_way: dict[int, int], deadline: float) -> None:
        """Take writes away as they end; none is left in the end."""
        pause_s = _PAUSE_S
        while under_way:
            for rank, ticket in list(under_way.items()):
                status = -1 if ticket < 0 else self._engine.transfer_check_status(ticket)
                if status < 0:
                    raise group_error(f"rank {rank} died or left, or refused what was written to it ({status})")
                if status > 0:
                    del under_way[rank]
            if under_way:
                if time.monotonic() > deadline:
                    raise group_error(f"ranks {sorted(under_way)} did not take what was written to them in time")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _holds(region: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether a tensor lies within the memory of another."""
    begin = region.data_ptr()
    return begin <= x.data_ptr() and x.data_ptr() + x.nbytes <= begin + region.nbytes
