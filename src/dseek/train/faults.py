"""Faults of a training's processes as values: who fails, at which step, and how.

A training that means to be tested calls `strike` once a step. Faults strike at the first start only, so that a training
that was restarted gets past them.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dseek.core.errors import ConfigError

KINDS = ("kill", "stop", "slow", "exit")
_TEXT = re.compile(r"(kill|stop|slow|exit):(\d+)@(\d+)(?::(\d+(?:\.\d+)?))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What happens to one process."""

    kind: Literal["kill", "stop", "slow", "exit"]
    """kill: SIGKILL; stop: SIGSTOP, alive and silent; slow: sleeps at this step, goes on; exit: ends with status 3."""
    rank: int
    """To whom."""
    step: int
    """At the start of which step."""
    seconds: float = 1.0
    """How long a slow one sleeps."""


def parse(text: str) -> Fault:
    """Read a fault as the command line has it.

    Args:
        text: `KIND:RANK@STEP`, for a slow process `slow:RANK@STEP:SECONDS`.

    Returns:
        The fault.

    Raises:
        ConfigError: it is none.
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ConfigError(f"the fault is {text!r}", needed="KIND:RANK@STEP, KIND one of " + ", ".join(KINDS))
    kind, rank, step, seconds = match.groups()
    return Fault(kind=kind, rank=int(rank), step=int(step), seconds=float(seconds or 1.0))  # type: ignore[arg-type]


def strike(faults: Sequence[Fault], *, rank: int, step: int, start: int) -> None:
    """Let the faults of this rank and step happen.

    Args:
        faults: all of them.
        rank: this process.
        step: the step that begins.
        start: how often the training was restarted; faults strike at 0.
    """
    for fault in faults:
        if start or (fault.rank, fault.step) != (rank, step):
            continue
        if fault.kind == "slow":
            time.sleep(fault.seconds)
        elif fault.kind == "exit":
            os._exit(3)
        else:
            os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
