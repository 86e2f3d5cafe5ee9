"""The lease by which a supervised process shows that it makes progress, not only that it exists.

It is a file that the supervisor made and named in DSEEK_LEASE; `renew` counts steps in it, `sign` what is done within a
step or before the first. A process that hangs or was stopped does neither, and is taken for lost when its time is over.
Behind the counts the supervisor of several hosts writes until when the process may go on: beyond that, others may have
taken its place.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from dseek.core import environment
from dseek.core.errors import PeerError

_COUNT = struct.Struct("<QQQ")
_DEADLINE = struct.Struct("<d")


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseState:
    """What a lease says."""

    signs: int = 0
    """How often the process showed that it goes on, renewals among them."""
    renewals: int = 0
    """How often it renewed: steps since it was started."""
    step: int = 0
    """The step of the last renewal."""


class Lease:
    """This process's side of its lease; without a supervisor it does nothing. Safe to use from several threads."""

    def __init__(self, path: Path | None = None) -> None:
        """Hold the lease at `path`, by default the one in DSEEK_LEASE."""
        found = path or environment.get("DSEEK_LEASE")
        self._handle = -1 if found is None else os.open(found, os.O_RDWR | os.O_CLOEXEC)
        self._parent = os.getppid()
        self._lock = threading.Lock()
        self._signs, self._renewals, self._step = 0, 0, 0

    def renew(self, step: int) -> None:
        """Say that this process has reached `step`; call it once a step.

        Args:
            step: of the training.

        Raises:
            PeerError: the supervisor has ended, so nobody would restart or stop this process; or it has been out of
                touch with the other hosts for so long that they may have gone on without this process.
        """
        if self._handle < 0:
            return
        if os.getppid() != self._parent:
            raise PeerError("the supervisor of this process has ended", remedy="start the training again under one")
        deadline = os.pread(self._handle, _DEADLINE.size, _COUNT.size)
        if len(deadline) == _DEADLINE.size and time.monotonic() > _DEADLINE.unpack(deadline)[0]:
            raise PeerError("this host is out of touch with the training's others, who may have gone on without it")
        with self._lock:
            self._renewals += 1
            self._step = step
        self.sign()

    def sign(self) -> None:
        """Say that this process goes on, in the middle of a step or of what comes before the first."""
        with self._lock:
            if self._handle >= 0:
                self._signs += 1
                os.pwrite(self._handle, _COUNT.pack(self._signs, self._renewals, self._step), 0)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            if self._handle >= 0:
                os.close(self._handle)
                self._handle = -1


def read_lease(path: Path) -> LeaseState:
    """Read a lease from outside.

    Args:
        path: the file.
    """
    content = path.read_bytes()
    if len(content) < _COUNT.size:
        return LeaseState()  # a deadline alone leaves zeros before it
    signs, renewals, step = _COUNT.unpack_from(content)
    return LeaseState(signs=signs, renewals=renewals, step=step)


def allow_until(path: Path, deadline_s: float) -> None:
    """Say from outside until when a lease may be renewed.

    Args:
        path: the file.
        deadline_s: by `time.monotonic`, which all processes of a host share.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(handle, _DEADLINE.pack(deadline_s), _COUNT.size)
    finally:
        os.close(handle)
