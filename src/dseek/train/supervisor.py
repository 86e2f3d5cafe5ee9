"""Keeps a training of several processes alive: where one is lost, all are stopped and start from the newest checkpoint.

Exact recovery: as many ranks as before, the same state, the same data; so every step after the restart gives the bits
that it would have given without the fault. What makes it exact is in the training: it saves at every step it wants to
come back to (`train.checkpoints`), its data position and random numbers with it, and begins from `newest`.

A process is lost when it ends with a status that is neither success, nor a user's error, nor a stop that was asked for,
or when it gives no sign through its lease in time (stopped, hanging, or waiting for one that is). Slow is not lost. The
processes are children of this one, on this host.
"""

from __future__ import annotations

import os
import secrets
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dseek.core import events
from dseek.core.errors import ConfigError, PeerError
from dseek.core.logs import get_logger
from dseek.train.local_ranks import POLL_S, Launch, LocalRanks, free_port, launch_command

STOPPED = 130
"""Exit status of a process that was asked to stop and did so in order."""
USER_ERROR = 2
"""Exit status of a process that a restart would not help: a user's error."""
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


class Progress:
    """Counts restarts without a new step, and says when there are too many."""

    def __init__(self, max_restarts: int) -> None:
        """Begin to count.

        Args:
            max_restarts: so many are allowed.
        """
        self._max_restarts = max_restarts
        self._furthest, self._num_in_vain = -1, 0

    def count_loss(self, rank: int, reason: str, step: int) -> None:
        """Count the restart that a loss leads to.

        Args:
            rank: who was lost.
            reason: how.
            step: the furthest that any rank had reached.

        Raises:
            PeerError: it would be one too many.
        """
        if step > self._furthest:
            self._furthest, self._num_in_vain = step, 0 if self._furthest >= 0 else self._num_in_vain
        if self._num_in_vain >= self._max_restarts:
            raise PeerError(
                f"rank {rank} was lost ({reason}) after {self._num_in_vain} restarts without a new step",
                remedy="look at its output, then start the training again: it goes on from the newest checkpoint",
            )
        self._num_in_vain += 1


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
            launch or launch_command(config.command, only_first_speaks=config.only_first_speaks),
            lease_s=config.lease_s,
            start_s=config.start_s,
            grace_s=config.grace_s,
            patience=config.patience,
        )
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
                self._ranks.stop(0.0 if self._stops_wanted else None)

    def stop(self) -> None:
        """Ask all processes to stop in order, by SIGINT; the second time, end them at once. For signal handlers."""
        self._stops_wanted += 1

    def renewed(self) -> bool:
        """Tell whether every rank of this start has taken a step, or ended."""
        return self._ranks.have_renewed

    def _run(self, folder: Path) -> int:
        progress = Progress(self.config.max_restarts)
        self._start(folder, 0)
        while not isinstance(loss := self._watch(), int):
            noticed_s = time.monotonic()
            rank, reason = loss
            step = self._ranks.step
            _log.warning("rank %d is lost at step %d: %s%s", rank, step, reason, self._ranks.last_words(rank))
            if self._stops_wanted:
                return STOPPED
            progress.count_loss(rank, reason, step)
            self._ranks.stop()
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
        port = free_port()
        size = self.config.world_size
        self._ranks.start(
            folder,
            [
                {
                    **self.config.environment,
                    **variables_of(rank, size, rank, size, "127.0.0.1", port, run=self._run_id, start=start),
                }
                for rank in range(size)
            ],
        )

    def _watch(self) -> tuple[int, str] | int:
        """Wait until a rank is lost (who and why), or all have ended (with what status)."""
        while True:
            if self._stops_sent < self._stops_wanted:
                self._stops_sent += 1
                self._ranks.signal(signal.SIGINT if self._stops_sent == 1 else signal.SIGKILL)
            found = self._look()
            if found is not None:
                return found
            time.sleep(POLL_S)

    def _await_first_renewals(self) -> None:
        """Wait until every rank has renewed once or ended, or one is lost, which `_watch` will find."""
        while not self._stops_wanted and self._look() is None and not self._ranks.have_renewed:
            time.sleep(POLL_S)

    def _look(self) -> tuple[int, str] | int | None:
        """Look at every rank once: one is lost, or the whole is over, or nothing yet."""
        loss = self._ranks.look(orderly=(0, STOPPED, USER_ERROR))
        statuses = self._ranks.statuses
        ended = [status for status in statuses.values() if status is not None]
        is_over = len(ended) == len(statuses)
        if self._stops_wanted:
            # Whoever dies now was asked to; only who is silent would be waited for in vain.
            if is_over:
                return STOPPED if any(ended) else 0
            return loss if loss is not None and statuses[loss[0]] is None else None
        if USER_ERROR in ended:
            self._tell_users_error(statuses)
            return USER_ERROR
        if loss is None and is_over:
            return max(ended)
        return loss

    def _tell_users_error(self, statuses: Mapping[int, int | None]) -> None:
        """Let rank 0 tell the error that another rank has met, which it meets a moment later; else tell it."""
        self._ranks.await_end(0, self.config.grace_s or 1.0)
        if self._ranks.statuses[0] != USER_ERROR:
            rank = next(rank for rank, status in statuses.items() if status == USER_ERROR)
            _log.error("rank %d: %s", rank, self._ranks.last_words(rank) or f"ended with status {USER_ERROR}")


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
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{run}-{restart_count()}" if run else ""


def restart_count() -> int:
    """Tell how often this training was restarted, by this supervisor or by torchrun; 0 outside of both."""
    text = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return int(text) if text.isdecimal() else 0


def supervise(config: SupervisorConfig, *, launch: Launch | None = None) -> list[Restart]:
    """Run a training of several processes on this host until it ends, restarting it where one is lost.

    Args:
        config: what is run.
        launch: see `Supervisor`.

    Returns:
        The recoveries there were.

    Raises:
        PeerError: it cannot be kept alive, or a rank was stopped or met a user's error.
    """
    supervisor = Supervisor(config, launch=launch)
    status = supervisor.run()
    if status:
        raise PeerError(f"a rank of {' '.join(config.command)} ended with status {status}", remedy="look at its output")
    return supervisor.restarts
