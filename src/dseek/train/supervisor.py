"""Keeps a training of several processes alive: where one is lost, all are stopped and start from the newest checkpoint.

Exact recovery: as many ranks as before, the same state, the same data; so every step after the restart gives the bits
that it would have given without the fault. What makes it exact is in the training: it saves at every step it wants to
come back to (`train.checkpoints`), its data position and random numbers with it, and begins from `newest`.

A process is lost when it ends with another status than 0, or does not renew its lease in time (stopped, hanging, or
waiting for one that is). Slow is not lost. The processes are children of this one, on this host.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dseek.core import events
from dseek.core.errors import ConfigError, PeerError
from dseek.core.logs import get_logger
from dseek.train.local_ranks import POLL_S, Launch, LocalRanks, free_port, launch_command

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


class Supervisor:
    """Runs one training to its end."""

    def __init__(self, config: SupervisorConfig, *, launch: Launch | None = None) -> None:
        """Prepare to run a training; nothing is started yet.

        Args:
            config: what is run.
            launch: starts a rank otherwise than by `config.command`, which is then only its name.
        """
        self.config = config
        self.restarts: list[Restart] = []
        self._run_id = secrets.token_hex(4)
        self._ranks = LocalRanks(
            launch or launch_command(config.command),
            lease_s=config.lease_s,
            start_s=config.start_s,
            grace_s=config.grace_s,
        )

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
                self._ranks.stop()
        return self.restarts

    def _run(self, folder: Path) -> None:
        furthest, num_without_progress = -1, 0
        self._start(folder, 0)
        while (loss := self._watch()) is not None:
            noticed_s = time.monotonic()
            rank, reason = loss
            step = self._ranks.step
            num_without_progress = 0 if step > furthest else num_without_progress + 1
            furthest = max(furthest, step)
            _log.warning("rank %d is lost at step %d: %s", rank, step, reason)
            if num_without_progress > self.config.max_restarts:
                raise PeerError(
                    f"rank {rank} was lost again ({reason}), {num_without_progress} times without a new step",
                    remedy="look at its output, then start the training again: it goes on from the newest checkpoint",
                )
            self._ranks.stop()
            stop_s = time.monotonic() - noticed_s
            self._start(folder, len(self.restarts) + 1)
            self._await_first_renewals()
            restart = Restart(
                rank=rank, reason=reason, step=step, stop_s=stop_s, recovery_s=time.monotonic() - noticed_s
            )
            self.restarts.append(restart)
            events.emit("supervisor.restart", restart=restart)

    def _start(self, folder: Path, start: int) -> None:
        port = free_port()
        size = self.config.world_size
        ranks = range(size)
        self._ranks.start(
            folder,
            [variables_of(rank, size, rank, size, "127.0.0.1", port, run=self._run_id, start=start) for rank in ranks],
        )

    def _watch(self) -> tuple[int, str] | None:
        """Wait until a rank is lost, or all have ended well (None)."""
        while True:
            loss = self._ranks.look()
            if loss is not None:
                return loss
            if self._ranks.have_ended:
                return None
            time.sleep(POLL_S)

    def _await_first_renewals(self) -> None:
        """Wait until every rank has renewed once, or ended, or one is lost, which `_watch` will find."""
        while self._ranks.look() is None and not self._ranks.have_renewed:
            time.sleep(POLL_S)


def variables_of(
    rank: int, world_size: int, local_rank: int, local_size: int, address: str, port: int, *, run: str, start: int
) -> dict[str, str]:
    """Name a rank to itself, as torchrun does.

    Args:
        rank: among all.
        world_size: all of them.
        local_rank: among those of its host.
        local_size: those.
        address: of rank 0's host.
        port: there.
        run: of this training.
        start: how often it was restarted.

    Returns:
        Variables of its environment.
    """
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": run,
        "TORCHELASTIC_RESTART_COUNT": str(start),
    }


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
