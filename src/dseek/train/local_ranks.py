"""The processes of a training on this host: started, watched by their leases, ended with all that they have started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dseek.train.lease import LeaseState, allow_until, read_lease

POLL_S = 0.02
"""Between two looks at the processes."""

_SHOWN_LINES = 15
"""Last lines of a lost rank's output that are shown."""


class RankProcess(Protocol):
    """What is asked of a process, as `subprocess.Popen` has it. It leads a process group of its own."""

    pid: int
    """Its number."""
    returncode: int | None
    """Its status, the negative number of a signal, or None while it runs; as of the last `poll` or `wait`."""

    def poll(self) -> int | None:
        """Look whether it has ended; its status."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Args:
            timeout: seconds; None for ever.

        Returns:
            Its status.

        Raises:
            subprocess.TimeoutExpired: it has not come.
        """


Launch = Callable[[Mapping[str, str]], RankProcess]
"""Starts one rank with the given variables of the environment added to this process's own."""


def launch_command(command: Sequence[str], *, only_first_speaks: bool = False) -> Launch:
    """Start ranks by a command.

    Args:
        command: program and arguments.
        only_first_speaks: rank 0 alone writes to this process's stdout and stderr; what others write is kept beside
            their leases, where `LocalRanks.last_words` finds it.

    Returns:
        What starts one.
    """

    def launch(variables: Mapping[str, str]) -> RankProcess:
        is_quiet = only_first_speaks and int(variables["RANK"]) > 0
        with contextlib.ExitStack() as opened:
            output = opened.enter_context(_output(Path(variables["DSEEK_LEASE"])).open("wb")) if is_quiet else None
            # A session of its own: Ctrl-C reaches the supervisor alone, and signals reach what a rank has started.
            return subprocess.Popen(
                command, env={**os.environ, **variables}, start_new_session=True, stdout=output, stderr=output
            )

    return launch


def _output(lease: Path) -> Path:
    """Where a rank writes that does not speak."""
    return lease.with_name(f"{lease.name}.output")


@dataclass(slots=True)
class _Rank:
    rank: int
    process: RankProcess
    lease: Path
    state: LeaseState = field(default_factory=LeaseState)
    seen_s: float = field(default_factory=time.monotonic)


class LocalRanks:
    """Ranks of one start of a training on this host."""

    def __init__(
        self, launch: Launch, *, lease_s: float, start_s: float, grace_s: float, patience: float = 0.0
    ) -> None:
        """Start nothing yet.

        Args:
            launch: starts one rank.
            lease_s: a rank that gives no sign for so long is lost.
            start_s: the same before it has renewed for the first time.
            grace_s: between SIGTERM and SIGKILL; 0 sends SIGKILL alone.
            patience: a rank has at least so many times the longest interval between two signs so far, of any rank
                and start, if that is more; 0 leaves it at `lease_s`.
        """
        self._launch = launch
        self._lease_s, self._start_s, self._grace_s, self._patience = lease_s, start_s, grace_s, patience
        self._longest_s = 0.0
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

    def look(self, orderly: Collection[int] = (0,)) -> tuple[int, str] | None:
        """Look at every rank once; who is lost, and why. Who died explains more than who is silent because of that.

        Args:
            orderly: statuses by which a rank ends without being lost.
        """
        silent, now_s = None, time.monotonic()
        for one in self._ranks:
            # In this order: what a process did last is seen before its end is.
            status, state = one.process.poll(), read_lease(one.lease)
            if state.signs != one.state.signs:
                if one.state.renewals:
                    self._longest_s = max(self._longest_s, now_s - one.seen_s)
                one.state, one.seen_s = state, now_s
            limit_s = max(self._lease_s, self._patience * self._longest_s)
            limit_s = limit_s if one.state.renewals else max(limit_s, self._start_s)
            if status is None and now_s - one.seen_s > limit_s and silent is None:
                silent = one.rank, f"silent for {limit_s:g} s"
        return self._dead(orderly) or silent

    def _dead(self, orderly: Collection[int]) -> tuple[int, str] | None:
        """Who was killed first of all: peers may have ended with a status because of that."""
        dead = [
            (status >= 0, one.rank, status)
            for one in self._ranks
            if (status := one.process.returncode) is not None and status not in orderly
        ]
        if not dead:
            return None
        _, rank, status = min(dead)
        return rank, f"killed by signal {-status}" if status < 0 else f"ended with status {status}"

    @property
    def statuses(self) -> dict[int, int | None]:
        """The status of each rank, None while it runs, as of the last look."""
        return {one.rank: one.process.returncode for one in self._ranks}

    @property
    def have_ended(self) -> bool:
        """Whether all have ended well, as of the last look."""
        return all(one.process.returncode == 0 for one in self._ranks)

    @property
    def have_renewed(self) -> bool:
        """Whether there are any, and each has renewed its lease once or ended, as of the last look."""
        return bool(self._ranks) and all(
            one.state.renewals or one.process.returncode is not None for one in self._ranks
        )

    @property
    def step(self) -> int:
        """The furthest step that any has reached, as of the last look."""
        return max((one.state.step for one in self._ranks), default=0)

    def last_words(self, rank: int) -> str:
        """The end of what a rank wrote where nobody saw it; empty where somebody did.

        Args:
            rank: one of this start.
        """
        for one in self._ranks:
            output = _output(one.lease)
            if one.rank == rank and output.exists():
                lines = output.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
                return "".join(f"\n  [rank {rank}] {line}" for line in lines)
        return ""

    def allow_until(self, deadline_s: float) -> None:
        """Let the leases be renewed until then, and not after it.

        Args:
            deadline_s: by `time.monotonic`.
        """
        for one in self._ranks:
            allow_until(one.lease, deadline_s)

    def signal(self, number: int) -> None:
        """Send a signal to all processes, and to what they have started.

        Args:
            number: of the signal.
        """
        for one in self._ranks:
            _signal(one.process, number)

    def await_end(self, rank: int, longest_s: float) -> None:
        """Wait for a rank's end, or that time.

        Args:
            rank: one of this start.
            longest_s: seconds.
        """
        for one in self._ranks:
            if one.rank == rank:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    one.process.wait(longest_s)

    def stop(self, grace_s: float | None = None) -> None:
        """End all processes, those that are stopped too, and whatever they have started.

        Args:
            grace_s: between SIGTERM and SIGKILL, 0 for SIGKILL alone; None takes the usual one.
        """
        grace_s = self._grace_s if grace_s is None else grace_s
        deadline = time.monotonic() + grace_s
        if grace_s:
            self.signal(signal.SIGTERM)
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
