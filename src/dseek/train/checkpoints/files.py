"""The few things checkpoints do to a file system, each in one place, and the faults that a test can have there.

Every file is written under a temporary name, flushed to the disk and renamed, and then its folder is flushed: whoever
reads sees all of it or none. A fault is a value, `Fault(at=17, kind="kill")`: the operation of that number fails so,
and for a kill or a torn file everything after it does too, as if the process had ended there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TEMPORARY_SUFFIX = ".part"
"""Of files that are being written; whoever finds one later may delete it."""


class InjectedCrash(BaseException):
    """The end of a process that a `Fault` pretends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What goes wrong, and when."""

    at: int
    """Number of the operation, from 0."""
    kind: Literal["kill", "torn", "full"]
    """kill: nothing from here on; torn: half of this write reaches the disk under its final name, then nothing; full:
    this operation alone fails for want of space."""


class Files:
    """Writes files whole or not at all; safe to use from several threads."""

    def __init__(self, fault: Fault | None = None) -> None:
        """Work properly, up to a `fault`."""
        self._fault = fault
        self._lock = threading.Lock()
        self._is_dead = False
        self.num_operations = 0

    def _step(self) -> bool:
        """Count one operation; True where it must write half and end."""
        with self._lock:
            index = self.num_operations
            self.num_operations += 1
            if self._is_dead:
                raise InjectedCrash
            if self._fault is None or index != self._fault.at:
                return False
            if self._fault.kind == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._is_dead = True
            if self._fault.kind == "kill":
                raise InjectedCrash
            return True

    def write(self, path: Path, content: bytes | memoryview) -> None:
        """Write a file whole or not at all.

        Args:
            path: its final name; missing folders are made.
            content: all of it.

        Raises:
            OSError: it could not be written; nothing is left behind.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}{TEMPORARY_SUFFIX}")
        is_torn = self._step()
        try:
            with temporary.open("wb") as file:
                file.write(content[: len(content) // 2] if is_torn else content)
                file.flush()
                if not is_torn:
                    self._step()
                os.fsync(file.fileno())
            if not is_torn:
                self._step()
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        if is_torn:
            raise InjectedCrash
        self.flush_folder(path.parent)

    def flush_folder(self, folder: Path) -> None:
        """Make renames in a `folder` durable."""
        self._step()
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def remove(self, path: Path) -> None:
        """Delete the file `path`, if it is there."""
        self._step()
        path.unlink(missing_ok=True)

    def remove_folder(self, folder: Path) -> None:
        """Delete a `folder` of files, if it is there."""
        if folder.is_dir():
            for path in folder.iterdir():
                self.remove(path)
            self._step()
            folder.rmdir()


@contextmanager
def locked(folder: Path, *, alone: bool) -> Iterator[bool]:
    """Hold a folder's lock.

    Args:
        folder: that holds the checkpoints.
        alone: for who deletes chunks; not waited for. Otherwise shared, waited for.

    Yields:
        Whether it is held. The system lets go of it when the process ends, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        except BlockingIOError:
            yield False
            return
        yield True
