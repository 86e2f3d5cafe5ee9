"""The lease by which a supervised process shows that it makes progress, not only that it exists.

It is a file that the supervisor made and named in DSEEK_LEASE; `renew` counts in it. A process that hangs or was
stopped does not renew, and is taken for lost when its time is over.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from dseek.core import environment
from dseek.core.errors import PeerError

_COUNT = struct.Struct("<QQ")


class Lease:
    """This process's side of its lease; without a supervisor it does nothing."""

    def __init__(self, path: Path | None = None) -> None:
        """Hold the lease at `path`, by default the one in DSEEK_LEASE."""
        found = path or environment.get("DSEEK_LEASE")
        self._handle = -1 if found is None else os.open(found, os.O_WRONLY | os.O_CLOEXEC)
        self._parent = os.getppid()
        self._num_renewals = 0

    def renew(self, step: int) -> None:
        """Say that this process has reached `step`; call it once a step.

        Args:
            step: of the training.

        Raises:
            PeerError: the supervisor has ended, so nobody would restart or stop this process.
        """
        if self._handle < 0:
            return
        if os.getppid() != self._parent:
            raise PeerError("the supervisor of this process has ended", remedy="start the training again under one")
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
        return 0, 0
    renewals, step = _COUNT.unpack_from(content)
    return renewals, step
