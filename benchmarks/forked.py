"""Ranks of a training as forks of this process, which has imported PyTorch already: they start in a tenth of a second.

For rows that start hundreds. This process must have run nothing in parallel before; a fork has no threads but one.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

CLONE_NEWNET = 0x40000000
_POLL_S = 0.005


class Forked:
    """A fork, to whoever started it, as `subprocess.Popen` is."""

    def __init__(
        self, function: Callable[[], None], variables: Mapping[str, str], log: Path, namespace: str = ""
    ) -> None:
        """Call a function in a fork.

        Args:
            function: ends the process with status 0 where it returns, with 1 where it raises.
            variables: added to the fork's environment.
            log: takes its output, behind what is there.
            namespace: name of the network namespace that it lives in; empty for this one.
        """
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _live(function, variables, log, namespace)

    def poll(self) -> int | None:
        """Look whether it has ended; its status."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Args:
            timeout: seconds; None for ever.

        Returns:
            Its status.

        Raises:
            subprocess.TimeoutExpired: it has not come.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired("a fork", timeout or 0.0)
            time.sleep(_POLL_S)
        return status


def _live(function: Callable[[], None], variables: Mapping[str, str], log: Path, namespace: str) -> None:
    """Be the fork; does not return."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.update(variables)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        if namespace:
            _enter(namespace)
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Nothing of the process that was forked may be tidied up here: its threads, files and handlers are its own.
        os._exit(status)


def _enter(namespace: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if libc.setns(handle, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    os.close(handle)
