"""The processes of a training on this host: started, watched by their leases, ended with all that they have started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dseek.train.lease import allow_until, read_lease

POLL_S = 0.02
"""Between two looks at the processes."""


class RankProcess(Protocol):
    """What is asked of a process, as `subprocess.Popen` has it. It leads a process group of its own."""

    pid: int
    """Its number."""
    returncode: int | None
    """Its status, the negative number of a signal, or None while it runs; as of the last `poll` or `wait`."""

    def poll(self) -> int | None:
        """Look whether it has ended; its status."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; subprocess.TimeoutExpired where it does not come in time."""


Launch = Callable[[Mapping[str, str]], RankProcess]
"""Starts one rank with the given variables of the environment added to this process's own."""


def launch_command(command: Sequence[str]) -> Launch:
    """Start ranks by a command.

    Args:
        command: program and arguments.

    Returns:
        What starts one.
    """

    def launch(variables: Mapping[str, str]) -> RankProcess:
        # A session of its own: Ctrl-C reaches the supervisor alone, and signals reach what a rank has started.
        return subprocess.Popen(command, env={**os.environ, **variables}, start_new_session=True)

    return launch


@dataclass(slots=True)
class _Rank:
    rank: int
    process: RankProcess
    lease: Path
    renewals: int = 0
    step: int = 0
    seen_s: float = field(default_factory=time.monotonic)


class LocalRanks:
    """Ranks of one start of a training on this host."""

    def __init__(self, launch: Launch, *, lease_s: float, start_s: float, grace_s: float) -> None:
        """Start nothing yet.

        Args:
            launch: starts one rank.
            lease_s: a rank that does not renew for so long is lost.
            start_s: how long its first renewal may take.
            grace_s: between SIGTERM and SIGKILL.
        """
        self._launch = launch
        self._lease_s, self._start_s, self._grace_s = lease_s, start_s, grace_s
        self._ranks: list[_Rank] = []

    def start(self, folder: Path, variables: Sequence[Mapping[str, str]]) -> None:
        """Start one rank for each set of variables.

        Args:
            folder: for their leases.
            variables: of each rank's environment, RANK and TORCHELASTIC_RESTART_COUNT among them.
        """
        self._ranks = []
        for one in variables:
            lease = folder / f"lease-{one['TORCHELASTIC_RESTART_COUNT']}-{one['RANK']}"
            lease.write_bytes(b"")
            process = self._launch({**one, "DSEEK_LEASE": str(lease)})
            self._ranks.append(_Rank(rank=int(one["RANK"]), process=process, lease=lease))

    def look(self) -> tuple[int, str] | None:
        """Look at every rank once; who is lost, and why. Who died explains more than who is silent because of that."""
        silent = None
        for one in self._ranks:
            status = one.process.poll()
            renewals, step = read_lease(one.lease)
            if renewals != one.renewals:
                one.renewals, one.step, one.seen_s = renewals, step, time.monotonic()
            if status not in (None, 0):
                return one.rank, f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
            limit_s = self._lease_s if one.renewals else self._start_s
            if status is None and time.monotonic() - one.seen_s > limit_s and silent is None:
                silent = one.rank, f"silent for {limit_s:g} s"
        return silent

    @property
    def have_ended(self) -> bool:
        """Whether all have ended well, as of the last look."""
        return all(one.process.returncode == 0 for one in self._ranks)

    @property
    def have_renewed(self) -> bool:
        """Whether each has renewed its lease once or ended, as of the last look."""
        return all(one.renewals or one.process.returncode is not None for one in self._ranks)

    @property
    def step(self) -> int:
        """The furthest step that any has reached, as of the last look."""
        return max((one.step for one in self._ranks), default=0)

    def allow_until(self, deadline_s: float) -> None:
        """Let the leases be renewed until then, and not after it.

        Args:
            deadline_s: by `time.monotonic`.
        """
        for one in self._ranks:
            allow_until(one.lease, deadline_s)

    def stop(self, grace_s: float | None = None) -> None:
        """End all processes, those that are stopped too, and whatever they have started.

        Args:
            grace_s: between SIGTERM and SIGKILL; None takes the usual one.
        """
        deadline = time.monotonic() + (self._grace_s if grace_s is None else grace_s)
        for one in self._ranks:
            _signal(one.process, signal.SIGTERM)
        for one in self._ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(max(deadline - time.monotonic(), 0))
            _signal(one.process, signal.SIGKILL)
            one.process.wait()


def _signal(process: RankProcess, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def free_port(address: str = "127.0.0.1") -> int:
    """Find a port of this host that nobody listens on at the moment.

    Args:
        address: of the interface.
    """
    with socket.create_server((address, 0)) as server:
        port: int = server.getsockname()[1]
        return port
