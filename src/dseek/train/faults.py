"""Faults of a training's processes as values: who fails, at which step, and how.

A fault is read from a text, prints as that text, and is drawn from a seed; `train.injection` lets it happen. A training
that means to be tested calls `Injector.strike` once a step, or `strike`, which knows only what needs no files.

What it does not know: faults of the hardware that nobody notices, such as a wrong sum or a flipped bit in memory.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from dseek.core.errors import ConfigError

Kind = Literal["kill", "stop", "slow", "exit", "full", "torn", "rot", "cut"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""kill: SIGKILL. stop: SIGSTOP, alive and silent. slow: sleeps, goes on. exit: ends with status 3. full: the disk takes
no more. torn: a file of the newest checkpoint is cut in half and the process killed, as by a loss of power. rot: a bit
of such a file flips and nobody is told. cut: a network interface goes down."""

KINDS_OF_FILES = ("full", "torn", "rot")
"""Those that happen to the files of a checkpoint, so that an Injector alone can let them happen."""

FILES = ("manifest", "part", "chunk")
"""What of a checkpoint can be torn or rot."""

_SECONDS = r"\d{1,6}(?:\.\d{1,6})?"
_START = re.compile(r"([a-z]+):(\d{1,9})@(\d{1,15})(?::(.*))?")
_DEVICE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}")
_FORMS = (
    "KIND:RANK@STEP, KIND one of kill, exit; stop and slow may have :SECONDS after it; full may have :WRITES; "
    "torn and rot may have :manifest, :part or :chunk; cut must have :INTERFACE and may have :SECONDS after that"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What happens to one process."""

    kind: Kind
    """One of `KINDS`."""
    rank: int
    """To whom."""
    step: int
    """At the start of which step."""
    seconds: float | None = None
    """How long it is slow (None: 1), stopped or cut off (None: for ever)."""
    writes: int = 1
    """How many writes of files fail on a full disk, one after the other."""
    file: str = "manifest"
    """Which file is torn or rots, one of `FILES`."""
    device: str = ""
    """Which network interface is cut, in the process's network namespace."""

    def __post_init__(self) -> None:
        """Check what the kind needs."""
        if self.kind not in KINDS or self.file not in FILES or min(self.rank, self.step) < 0 or self.writes < 1:
            raise ConfigError(f"there is no such fault as {self.kind!r} of {self.file!r}", needed=_FORMS)
        if self.seconds is not None and not 0 <= self.seconds < 1e6:
            raise ConfigError(f"a fault lasts {self.seconds} s", needed="0 to 999999 seconds")
        if self.kind == "cut" and not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"the network interface is {self.device!r}", needed="its name, as `ip link` shows it")

    def __str__(self) -> str:
        """The text that `parse` reads."""
        details = {
            "full": [str(self.writes)] if self.writes != 1 else [],
            "torn": [self.file],
            "rot": [self.file],
            "cut": [self.device],
        }.get(self.kind, [])
        if self.kind in ("slow", "stop", "cut") and self.seconds is not None:
            details.append(f"{self.seconds:.6f}".rstrip("0").rstrip("."))
        return ":".join([f"{self.kind}:{self.rank}@{self.step}", *details])


def parse(text: str) -> Fault:
    """Read a fault as the command line has it.

    Args:
        text: `kill:1@5`, `exit:1@5`, `stop:1@5` for ever or `stop:1@5:0.5` for half a second, `slow:1@5:0.5`,
            `full:1@5:3` for three writes, `torn:1@5:chunk`, `rot:1@5:manifest`, `cut:1@5:eth0:2`.

    Returns:
        The fault.

    Raises:
        ConfigError: it is none.
    """
    match = _START.fullmatch(text)
    if match is None or match[1] not in KINDS:
        raise ConfigError(f"the fault is {text!r}", needed=_FORMS)
    kind, rank, step, rest = match.groups()
    details = [] if rest is None else rest.split(":")
    device = details.pop(0) if kind == "cut" and details else ""
    seconds, writes, file = None, 1, "manifest"
    if details and kind in ("slow", "stop", "cut") and re.fullmatch(_SECONDS, details[0]):
        seconds = float(details.pop(0))
    elif details and kind == "full" and re.fullmatch(r"[1-9]\d{0,5}", details[0]):
        writes = int(details.pop(0))
    elif details and kind in ("torn", "rot") and details[0] in FILES:
        file = details.pop(0)
    if details:
        raise ConfigError(f"the fault is {text!r}", needed=_FORMS)
    return Fault(
        kind=cast(Kind, kind),
        rank=int(rank),
        step=int(step),
        seconds=seconds,
        writes=writes,
        file=file,
        device=device,
    )


def draw(
    seed: int,
    count: int,
    *,
    num_ranks: int,
    num_steps: int,
    kinds: Sequence[Kind] = KINDS,
    device: str = "",
    longest_s: float = 1.0,
) -> list[Fault]:
    """Draw faults, each kind as likely as any other.

    Args:
        seed: the same one gives the same faults.
        count: how many.
        num_ranks: processes they happen to.
        num_steps: steps they happen at, from 0.
        kinds: which there may be.
        device: network interface that is cut.
        longest_s: most seconds one lasts. Every other stop is for ever; a cut never is, since nobody would mend it.

    Returns:
        The faults, in the order of their steps.

    Raises:
        ConfigError: no fault can be drawn so.
    """
    if count < 0 or min(num_ranks, num_steps) < 1 or not kinds or not set(kinds) <= set(KINDS):
        raise ConfigError(
            f"{count} faults of {', '.join(kinds) or 'no kind'} in {num_steps} steps of {num_ranks} ranks",
            needed="a step and a rank, and kinds of " + ", ".join(KINDS),
        )
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        kind = chance.choice(kinds)
        seconds: float | None = round(chance.uniform(0.05, 1.0) * longest_s, 3)
        if kind not in ("slow", "stop", "cut") or (kind == "stop" and chance.random() < 0.5):
            seconds = None
        found.append(
            Fault(
                kind=kind,
                rank=chance.randrange(num_ranks),
                step=chance.randrange(num_steps),
                seconds=seconds,
                writes=chance.randint(1, 3) if kind == "full" else 1,
                file=chance.choice(FILES) if kind in ("torn", "rot") else "manifest",
                device=device if kind == "cut" else "",
            )
        )
    return sorted(found, key=lambda fault: fault.step)


def strike(faults: Sequence[Fault], *, rank: int, step: int, start: int) -> None:
    """Let the faults of this rank and step happen, at the first start only.

    Args:
        faults: all of them.
        rank: this process.
        step: the step that begins.
        start: how often the training was restarted; faults strike at 0, so that the training gets past them.

    Raises:
        ConfigError: one needs to know the files of a checkpoint (`train.injection.Injector`), or cannot happen here.
    """
    for fault in faults:
        if not start and (fault.rank, fault.step) == (rank, step):
            happen(fault)


def happen(fault: Fault) -> None:
    """Let a fault happen to this process, which may not return from it.

    Args:
        fault: of a kind that needs no files.

    Raises:
        ConfigError: it is of another kind, or the interface cannot be cut.
    """
    if fault.kind == "slow":
        time.sleep(1.0 if fault.seconds is None else fault.seconds)
    elif fault.kind == "exit":
        os._exit(3)
    elif fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "stop":
        _stop(fault.seconds)
    elif fault.kind == "cut":
        _cut(fault.device, fault.seconds)
    else:
        raise ConfigError(f"{fault} needs the files of a checkpoint", remedy="let an Injector strike")


def _stop(seconds: float | None) -> None:
    """Stop this process; somebody in its group, who ends with it, lets it go on."""
    waker = None
    if seconds is not None:
        script = 'sleep "$1"; kill -CONT "$2"'
        waker = subprocess.Popen(["sh", "-c", script, "sh", f"{seconds:.6f}", str(os.getpid())])
    os.kill(os.getpid(), signal.SIGSTOP)
    if waker is not None:
        waker.wait()


def _cut(device: str, seconds: float | None) -> None:
    """Take an interface down; somebody who outlives this process brings it up again."""
    try:
        run = subprocess.run(
            ["ip", "link", "set", "dev", device, "down"], capture_output=True, text=True, check=False, timeout=30
        )
    except OSError as error:
        raise ConfigError(
            f"the interface {device} cannot be cut ({error.strerror})", needed="the program `ip`"
        ) from None
    if run.returncode != 0:
        raise ConfigError(
            f"the interface {device} cannot be cut ({run.stderr.strip()})",
            needed="root, and an interface of this network namespace",
        )
    if seconds is not None:
        script = 'sleep "$1"; ip link set dev "$2" up'
        subprocess.Popen(["sh", "-c", script, "sh", f"{seconds:.6f}", device], start_new_session=True)
