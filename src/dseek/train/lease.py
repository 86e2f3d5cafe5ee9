"""The lease by which a supervised process shows that it makes progress, not only that it exists.

It is a file that the supervisor made and named in DSEEK_LEASE; `renew` counts in it. A process that hangs or was
stopped does not renew, and is taken for lost when its time is over. Behind the count the supervisor of several hosts
writes until when the process may go on: beyond that, others may have taken its place.
"""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

from dseek.core import environment
from dseek.core.errors import PeerError

_COUNT = struct.Struct("<QQ")
_DEADLINE = struct.Struct("<d")


class Lease:
    """This process's side of its lease; without a supervisor it does nothing."""

    def __init__(self, path: Path | None = None) -> None:
        """Hold the lease at `path`, by default the one in DSEEK_LEASE."""
        found = path or environment.get("DSEEK_LEASE")
        self._handle = -1 if found is None else os.open(found, os.O_RDWR | os.O_CLOEXEC)
        self._parent = os.getppid()
        self._num_renewals = 0

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
        self._num_renewals += 1
        os.pwrite(self._handle, _COUNT.pack(self._num_renewals, step), 0)

    def close(self) -> None:
        """Let go of the file."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def read_lease(path: Path) -> tuple[int, int]:
    """Read a lease from outside.

    Args:
        path: the file.

    Returns:
        How often it was renewed, and the step of the last time.
    """
    content = path.read_bytes()
    if len(content) < _COUNT.size:
        return 0, 0  # a deadline alone leaves zeros before it
    renewals, step = _COUNT.unpack_from(content)
    return renewals, step


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
