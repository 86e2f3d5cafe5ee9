"""Keeps a training of several processes alive: where one is lost, all are stopped and start from the newest checkpoint.

Exact recovery: as many ranks as before, the same state, the same data; so every step after the restart gives the bits
that it would have given without the fault. What makes it exact is in the training: it saves at every step it wants to
come back to (`train.checkpoints`), its data position and random numbers with it, and begins from `newest`.

A process is lost when it ends with a status that is neither success, nor a user's error, nor a stop that was asked for,
or when it gives no sign through its lease in time (stopped, hanging, or waiting for one that is). Slow is not lost. The
processes are children of this one, on this host.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dseek.core import events
from dseek.core.errors import ConfigError, PeerError
from dseek.core.logs import get_logger
from dseek.train.lease import LeaseState, read_lease

STOPPED = 130
"""Exit status of a process that was asked to stop and did so in order."""
USER_ERROR = 2
"""Exit status of a process that a restart would not help: a user's error."""
_POLL_S = 0.02
_SHOWN_LINES = 15
"""Last lines of a lost rank's output that are logged."""
_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisorConfig:
    """What is run and how long is waited."""

    command: tuple[str, ...]
    """Program and arguments of every rank. It finds RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT,
    TORCHELASTIC_RUN_ID, TORCHELASTIC_RESTART_COUNT and DSEEK_LEASE in its environment."""
    world_size: int
    """Processes."""
    lease_s: float = 30.0
    """A process without a sign for so long is lost; longer than the longest step."""
    patience: float = 0.0
    """A process has at least so many times the longest interval between two signs so far, if that is more; 0 leaves it
    at `lease_s`."""
    start_s: float = 300.0
    """The same before a process has renewed for the first time: imports, reading the checkpoint, the first step."""
    grace_s: float = 3.0
    """Between SIGTERM and SIGKILL; 0 sends SIGKILL alone."""
    max_restarts: int = 3
    """So many restarts without a new step in between; the next loss ends the training."""
    only_first_speaks: bool = False
    """Rank 0 alone writes to this process's stdout and stderr. What others write is kept aside, and its end is logged
    where one is lost."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the processes get besides."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not self.command or self.world_size < 1:
            raise ConfigError(f"{self.world_size} processes of {self.command!r}", needed="a command, at least once")
        if min(self.lease_s, self.start_s) <= 0 or min(self.patience, self.grace_s, self.max_restarts) < 0:
            raise ConfigError("a time or a number of restarts is negative", needed="positive times")


@dataclass(frozen=True, kw_only=True, slots=True)
class Restart:
    """One recovery."""

    rank: int
    """Who was lost."""
    reason: str
    """How."""
    step: int
    """The furthest step any rank had reached."""
    stop_s: float
    """From noticing to all processes gone."""
    recovery_s: float
    """From noticing to the first renewal of every rank."""


@dataclass(slots=True)
class _Rank:
    process: subprocess.Popen[bytes]
    lease: Path
    output: Path | None
    state: LeaseState = field(default_factory=LeaseState)
    seen_s: float = field(default_factory=time.monotonic)


class Supervisor:
    """Runs one training to its end."""

    def __init__(self, config: SupervisorConfig) -> None:
        """Prepare to run `config`; nothing is started yet."""
        self.config = config
        self.restarts: list[Restart] = []
        self._run_id = secrets.token_hex(4)
        self._ranks: list[_Rank] = []
        self._longest_s = 0.0
        self._stops_wanted = 0
        self._stops_sent = 0

    def run(self) -> int:
        """Run all processes until all have ended well, were stopped, or met a user's error.

        Returns:
            0, `STOPPED` or `USER_ERROR`; the recoveries there were are in `restarts`.

        Raises:
            PeerError: processes were lost more than `max_restarts` times without a new step; it has the last reason.
        """
        with tempfile.TemporaryDirectory(prefix="dseek-leases-") as folder:
            try:
                return self._run(Path(folder))
            finally:
                self._end(grace_s=0.0 if self._stops_wanted else self.config.grace_s)

    def stop(self) -> None:
        """Ask all processes to stop in order, by SIGINT; the second time, end them at once. For signal handlers."""
        self._stops_wanted += 1

    def renewed(self) -> bool:
        """Tell whether every rank of this start has taken a step."""
        return bool(self._ranks) and all(one.state.renewals for one in self._ranks)

    def _run(self, folder: Path) -> int:
        furthest, num_in_vain = -1, 0
        self._start(folder, 0)
        while not isinstance(loss := self._watch(), int):
            noticed_s = time.monotonic()
            rank, reason = loss
            step = max(one.state.step for one in self._ranks)
            if step > furthest >= 0:
                num_in_vain = 0
            furthest = max(furthest, step)
            _log.warning("rank %d is lost at step %d: %s%s", rank, step, reason, self._last_words(rank))
            if self._stops_wanted:
                return STOPPED
            if num_in_vain >= self.config.max_restarts:
                raise PeerError(
                    f"rank {rank} was lost ({reason}) after {num_in_vain} restarts without a new step",
                    remedy="look at its output, then start the training again: it goes on from the newest checkpoint",
                )
            num_in_vain += 1
            self._end(grace_s=self.config.grace_s)
            stop_s = time.monotonic() - noticed_s
            self._start(folder, len(self.restarts) + 1)
            self._await_first_renewals()
            restart = Restart(
                rank=rank, reason=reason, step=step, stop_s=stop_s, recovery_s=time.monotonic() - noticed_s
            )
            self.restarts.append(restart)
            events.emit("supervisor.restart", restart=restart)
        return loss

    def _start(self, folder: Path, start: int) -> None:
        port = _free_port()
        self._ranks = []
        for rank in range(self.config.world_size):
            lease = folder / f"lease-{start}-{rank}"
            lease.write_bytes(b"")
            environment = {
                **os.environ,
                **self.config.environment,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.config.world_size),
                "LOCAL_WORLD_SIZE": str(self.config.world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": self._run_id,
                "TORCHELASTIC_RESTART_COUNT": str(start),
                "DSEEK_LEASE": str(lease),
            }
            output = folder / f"output-{start}-{rank}" if rank and self.config.only_first_speaks else None
            # A session of its own: Ctrl-C reaches the supervisor alone, and signals reach what a rank has started.
            with contextlib.ExitStack() as opened:
                file = None if output is None else opened.enter_context(output.open("wb"))
                process = subprocess.Popen(
                    self.config.command, env=environment, start_new_session=True, stdout=file, stderr=file
                )
            self._ranks.append(_Rank(process=process, lease=lease, output=output))

    def _watch(self) -> tuple[int, str] | int:
        """Wait until a rank is lost (who and why), or all have ended (with what status)."""
        while True:
            if self._stops_sent < self._stops_wanted:
                self._stops_sent += 1
                for one in self._ranks:
                    _signal(one.process, signal.SIGINT if self._stops_sent == 1 else signal.SIGKILL)
            found = self._look()
            if found is not None:
                return found
            time.sleep(_POLL_S)

    def _await_first_renewals(self) -> None:
        """Wait until every rank has renewed once, or one has ended or is lost, which `_watch` will find."""
        while (
            not self._stops_wanted
            and not self.renewed()
            and self._look() is None
            and any(one.process.returncode is None for one in self._ranks)
        ):
            time.sleep(_POLL_S)

    def _look(self) -> tuple[int, str] | int | None:
        """Look at every rank once; who died explains more than who is silent because of that."""
        silent, now_s = None, time.monotonic()
        for rank, one in enumerate(self._ranks):
            state = read_lease(one.lease)
            if state.signs != one.state.signs:
                if one.state.renewals:
                    self._longest_s = max(self._longest_s, now_s - one.seen_s)
                one.state, one.seen_s = state, now_s
            limit_s = max(self.config.lease_s, self.config.patience * self._longest_s)
            limit_s = limit_s if one.state.renewals else max(limit_s, self.config.start_s)
            if one.process.poll() is None and now_s - one.seen_s > limit_s and silent is None:
                silent = rank, f"silent for {limit_s:g} s"
        ended = self._ended()
        return silent if ended is None else ended

    def _ended(self) -> tuple[int, str] | int | None:
        """What the ranks that have ended say: one is lost, or the whole is over, or nothing yet."""
        statuses: list[Any] = [one.process.returncode for one in self._ranks]
        if self._stops_wanted:
            return None if None in statuses else (STOPPED if any(statuses) else 0)
        if USER_ERROR in statuses:
            self._await_words()
            rank = statuses.index(USER_ERROR)
            if self._ranks[0].process.returncode != USER_ERROR:  # which would have told it already
                _log.error("rank %d: %s", rank, self._last_words(rank) or f"ended with status {USER_ERROR}")
            return USER_ERROR
        lost = [(status >= 0, rank, status) for rank, status in enumerate(statuses) if status not in (None, 0, STOPPED)]
        if lost:  # who was killed first of all: peers may have ended with a status because of that
            _, rank, status = min(lost)
            return rank, f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return None if None in statuses else max(statuses)

    def _await_words(self) -> None:
        """Give rank 0 a moment to meet the error that another rank has met, and to tell it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._ranks[0].process.wait(self.config.grace_s or 1.0)

    def _last_words(self, rank: int) -> str:
        """The end of what a rank wrote where nobody saw it."""
        output = self._ranks[rank].output
        if output is None:
            return ""
        lines = output.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
        return "".join(f"\n  [rank {rank}] {line}" for line in lines)

    def _end(self, *, grace_s: float) -> None:
        """End all processes, those that are stopped too, and whatever they have started."""
        deadline = time.monotonic() + grace_s
        for one in self._ranks if grace_s else ():
            _signal(one.process, signal.SIGTERM)
        for one in self._ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(max(deadline - time.monotonic(), 0))
            _signal(one.process, signal.SIGKILL)
            one.process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def run_id() -> str:
    """Name this start of a training for `CheckpointWriter`, the same on all ranks; empty outside of a launcher."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{run}-{restart_count()}" if run else ""


def restart_count() -> int:
    """Tell how often this training was restarted, by this supervisor or by torchrun; 0 outside of both."""
    text = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return int(text) if text.isdecimal() else 0


def supervise(command: Sequence[str], world_size: int, **options: float | int) -> list[Restart]:
    """Run a training of several processes on this host until it ends, restarting it where one is lost.

    Args:
        command: program and arguments of every rank.
        world_size: processes.
        options: other fields of `SupervisorConfig`.

    Returns:
        The recoveries there were.

    Raises:
        PeerError: it cannot be kept alive.
    """
    config = SupervisorConfig(command=tuple(command), world_size=world_size, **options)  # type: ignore[arg-type]
    supervisor = Supervisor(config)
    status = supervisor.run()
    if status:
        raise PeerError(f"a rank of {' '.join(command)} ended with status {status}", remedy="look at its output")
    return supervisor.restarts
