"""`dseek train CONFIG --nproc-per-node N`: the ranks of a training under the supervisor.

Each rank is the same command without these flags. Rank 0 speaks: its progress and its result go where this process's
would. Ctrl-C, SIGTERM and SIGHUP reach this process alone, which hands them on once: the training saves and ends.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dseek.core.errors import ConfigError
from dseek.parallel.meeting import LAUNCHER_VARIABLES
from dseek.train.supervisor import Supervisor, SupervisorConfig

if TYPE_CHECKING:
    from dseek.train.config import TrainConfig
    from dseek.train.faults import Fault

HANG_S = 60.0
"""Least time without progress after which a rank is lost."""
PATIENCE = 10.0
"""The same in multiples of the longest time so far."""
START_S = 1200.0
"""The same before the first step, where a large model may be read from a slow disk."""


def run_supervised(args: argparse.Namespace, config: TrainConfig, faults: Sequence[Fault]) -> int:
    """Train on several ranks of this host, starting all of them again where one is lost.

    Args:
        args: parsed arguments.
        config: the training.
        faults: of the arguments.

    Returns:
        The exit status: 0 done, 130 stopped and saved, 2 a user's error that a rank told.

    Raises:
        ConfigError: the arguments do not go together.
        PeerError: ranks are lost again and again.
    """
    num_ranks = args.nproc_per_node
    if num_ranks < 1:
        raise ConfigError(f"--nproc-per-node is {num_ranks}", needed="at least 1")
    if config.method == "gate":
        raise ConfigError('--nproc-per-node with method = "gate"', needed="full or lora: gates learn on one process")
    if all(os.environ.get(name) for name in LAUNCHER_VARIABLES):
        raise ConfigError(
            "--nproc-per-node on a rank that was started by torchrun, or another launcher",
            needed="one of the two",
            remedy="leave one out",
        )
    lost = [fault.rank for fault in faults if fault.rank >= num_ranks]
    if lost:
        raise ConfigError(f"--inject-fault names rank {lost[0]}", needed=f"a rank below {num_ranks}")
    supervisor = Supervisor(
        SupervisorConfig(
            command=(sys.executable, "-m", "dseek.cli.main", "train", *_arguments(args)),
            world_size=num_ranks,
            lease_s=HANG_S if args.hang_timeout is None else args.hang_timeout,
            patience=PATIENCE if args.hang_timeout is None else 0.0,
            start_s=START_S,
            grace_s=0.0,
            max_restarts=3 if args.max_restarts is None else args.max_restarts,
            only_first_speaks=True,
            environment=_threads(config, num_ranks),
        )
    )
    with _handing_on(supervisor):
        return supervisor.run()


def _arguments(args: argparse.Namespace) -> list[str]:
    """What every rank is told."""
    given = [f"--set={change}" for change in args.set]
    given += [f"--inject-fault={text}" for text in args.inject_fault]
    given += ["--dry-run"] if args.dry_run else []
    given += ["--json"] if args.json else []
    return [*given, "--", args.config]


def _threads(config: TrainConfig, num_ranks: int) -> dict[str, str]:
    """The processors, shared out, where nobody has said otherwise."""
    if config.num_threads or os.environ.get("OMP_NUM_THREADS"):
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // num_ranks))}


@contextmanager
def _handing_on(supervisor: Supervisor) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: supervisor.stop()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
