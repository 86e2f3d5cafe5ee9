"""Keeps a training of several processes alive: where one is lost, all are stopped and start from the newest checkpoint.

Exact recovery: as many ranks as before, the same state, the same data; so every step after the restart gives the bits
that it would have given without the fault. What makes it exact is in the training: it saves at every step it wants to
come back to (`train.checkpoints`), its data position and random numbers with it, and begins from `newest`.

A process is lost when it ends with another status than 0, or does not renew its lease in time (stopped, hanging, or
waiting for one that is). Slow is not lost. The processes are children of this one, on this host.
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dseek.core import events
from dseek.core.errors import ConfigError, PeerError
from dseek.core.logs import get_logger
from dseek.train.lease import read_lease

_POLL_S = 0.02
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
    """A process that does not renew for so long is lost; longer than the longest step."""
    start_s: float = 300.0
    """How long the first renewal may take: imports, reading the checkpoint, the first step."""
    grace_s: float = 3.0
    """Between SIGTERM and SIGKILL."""
    max_restarts: int = 3
    """So many restarts without a new step in between end the training."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not self.command or self.world_size < 1:
            raise ConfigError(f"{self.world_size} processes of {self.command!r}", needed="a command, at least once")
        if min(self.lease_s, self.start_s) <= 0 or self.grace_s < 0 or self.max_restarts < 0:
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
    renewals: int = 0
    step: int = 0
    seen_s: float = field(default_factory=time.monotonic)


class Supervisor:
    """Runs one training to its end."""

    def __init__(self, config: SupervisorConfig) -> None:
        """Prepare to run `config`; nothing is started yet."""
        self.config = config
        self.restarts: list[Restart] = []
        self._run_id = secrets.token_hex(4)
        self._ranks: list[_Rank] = []

    def run(self) -> list[Restart]:
        """Run all processes until all have ended well.

        Returns:
            The recoveries there were.

        Raises:
            PeerError: processes were lost more than `max_restarts` times without a new step; it has the last reason.
        """
        with tempfile.TemporaryDirectory(prefix="dseek-leases-") as folder:
            try:
                self._run(Path(folder))
            finally:
                self._stop()
        return self.restarts

    def _run(self, folder: Path) -> None:
        furthest, num_without_progress = -1, 0
        self._start(folder, 0)
        while (loss := self._watch()) is not None:
            noticed_s = time.monotonic()
            rank, reason = loss
            step = max(one.step for one in self._ranks)
            num_without_progress = 0 if step > furthest else num_without_progress + 1
            furthest = max(furthest, step)
            _log.warning("rank %d is lost at step %d: %s", rank, step, reason)
            if num_without_progress > self.config.max_restarts:
                raise PeerError(
                    f"rank {rank} was lost again ({reason}), {num_without_progress} times without a new step",
                    remedy="look at its output, then start the training again: it goes on from the newest checkpoint",
                )
            self._stop()
            stop_s = time.monotonic() - noticed_s
            self._start(folder, len(self.restarts) + 1)
            self._await_first_renewals()
            restart = Restart(
                rank=rank, reason=reason, step=step, stop_s=stop_s, recovery_s=time.monotonic() - noticed_s
            )
            self.restarts.append(restart)
            events.emit("supervisor.restart", restart=restart)

    def _start(self, folder: Path, start: int) -> None:
        port = _free_port()
        self._ranks = []
        for rank in range(self.config.world_size):
            lease = folder / f"lease-{start}-{rank}"
            lease.write_bytes(b"")
            environment = {
                **os.environ,
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
            # A session of its own: Ctrl-C reaches the supervisor alone, and signals reach what a rank has started.
            process = subprocess.Popen(self.config.command, env=environment, start_new_session=True)
            self._ranks.append(_Rank(process=process, lease=lease))

    def _watch(self) -> tuple[int, str] | None:
        """Wait until a rank is lost, or all have ended well (None)."""
        while True:
            loss = self._look()
            if loss is not None:
                return loss
            if all(one.process.returncode == 0 for one in self._ranks):
                return None
            time.sleep(_POLL_S)

    def _await_first_renewals(self) -> None:
        """Wait until every rank has renewed once, or ended, or one is lost, which `_watch` will find."""
        while self._look() is None and any(one.renewals == 0 and one.process.returncode is None for one in self._ranks):
            time.sleep(_POLL_S)

    def _look(self) -> tuple[int, str] | None:
        """Look at every rank once; who is lost, and why. Who died explains more than who is silent because of that."""
        silent = None
        for rank, one in enumerate(self._ranks):
            status = one.process.poll()
            renewals, step = read_lease(one.lease)
            if renewals != one.renewals:
                one.renewals, one.step, one.seen_s = renewals, step, time.monotonic()
            if status not in (None, 0):
                return rank, f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
            limit_s = self.config.lease_s if one.renewals else self.config.start_s
            if status is None and time.monotonic() - one.seen_s > limit_s and silent is None:
                silent = rank, f"silent for {limit_s:g} s"
        return silent

    def _stop(self) -> None:
        """End all processes, those that are stopped too, and whatever they have started."""
        deadline = time.monotonic() + self.config.grace_s
        for one in self._ranks:
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
    run, start = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"{run}-{start}" if run else ""


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
    return Supervisor(
        SupervisorConfig(command=tuple(command), world_size=world_size, **options)  # type: ignore[arg-type]
    ).run()
