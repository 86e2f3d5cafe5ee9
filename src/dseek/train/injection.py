"""Lets faults happen in a training, each once, however often the training starts again.

A restarted training comes to the same steps again. So that it gets past a fault, the fault is entered in a ledger, a
folder that outlives the process, before it strikes. Faults of the disk are met by the checkpoint writer that is given
`Injector.files`; everything else happens in `strike`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from dseek.core.errors import ConfigError, FileFormatError
from dseek.train import faults
from dseek.train.checkpoints import complete_steps
from dseek.train.checkpoints.chunks import ChunkStore
from dseek.train.checkpoints.files import Files
from dseek.train.checkpoints.manifest import MANIFEST, part_name, read_part
from dseek.train.checkpoints.reading import step_folder


class FullDisk(Files):
    """Writes files as `Files` does, but for those that a full disk refuses."""

    def __init__(self) -> None:
        """Have room at first."""
        super().__init__()
        self._left = 0
        self._counting = threading.Lock()

    def fill(self, writes: int) -> None:
        """Refuse the next `writes`."""
        with self._counting:
            self._left += writes

    def write(self, path: Path, content: bytes | memoryview) -> None:
        """Write a file, or fail as a full disk does.

        Args:
            path: its final name.
            content: all of it.

        Raises:
            OSError: ENOSPC, nothing is left behind.
        """
        with self._counting:
            is_full = self._left > 0
            self._left -= is_full
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        super().write(path, content)


class Injector:
    """The faults of one process of a training."""

    def __init__(
        self, given: Sequence[faults.Fault], *, rank: int, ledger: Path, checkpoints: Path | None = None
    ) -> None:
        """Prepare to strike.

        Args:
            given: all faults; those of other ranks are passed over.
            rank: this process.
            ledger: a folder, the same at every start, that knows which faults there were. Made where it is missing.
            checkpoints: the folder whose files are torn or rot.

        Raises:
            ConfigError: files are to fail, and nothing says where they are.
        """
        if checkpoints is None and any(fault.kind in ("torn", "rot") for fault in given):
            raise ConfigError("a checkpoint's file is to be damaged", needed="the folder of the checkpoints")
        self.files = FullDisk()
        self._given = given
        self._rank = rank
        self._ledger = ledger
        self._checkpoints = checkpoints

    def strike(self, step: int) -> None:
        """Let the faults of a step happen that have not yet; call it at the start of every step.

        Args:
            step: the step that begins.

        Raises:
            ConfigError: an interface cannot be cut.
        """
        for index, fault in enumerate(self._given):
            if (fault.rank, fault.step) != (self._rank, step) or not self._enter(index, fault):
                continue
            if fault.kind == "full":
                self.files.fill(fault.writes)
            elif fault.kind in ("torn", "rot"):
                assert self._checkpoints is not None
                damage(self._checkpoints, fault)
                if fault.kind == "torn":
                    os.kill(os.getpid(), signal.SIGKILL)
            else:
                faults.happen(fault)

    def _enter(self, index: int, fault: faults.Fault) -> bool:
        """Enter a fault in the ledger; False where it is there already."""
        self._ledger.mkdir(parents=True, exist_ok=True)
        try:
            with (self._ledger / f"{index:06d}").open("x") as file:
                file.write(str(fault))
        except FileExistsError:
            return False
        return True


def struck(ledger: Path) -> list[str]:
    """List the faults that have happened.

    Args:
        ledger: the folder.

    Returns:
        Their texts, in the order in which they were given.
    """
    return [path.read_text() for path in sorted(ledger.iterdir())] if ledger.is_dir() else []


def damage(folder: Path, fault: faults.Fault) -> Path | None:
    """Cut a file of the newest checkpoint in half (torn), or flip a bit in its middle (rot).

    Which chunk or part it is depends on the fault's step, so that it is always the same one.

    Args:
        folder: that holds the checkpoints.
        fault: torn or rot, of a manifest, part or chunk.

    Returns:
        The file; None where there is no checkpoint, or a writer has just deleted it.
    """
    steps = complete_steps(folder)
    if not steps:
        return None
    target = step_folder(folder, steps[-1])
    if fault.file == "manifest":
        path = target / MANIFEST
    elif fault.file == "part":
        path = target / part_name(fault.step % max(len(list(target.glob("part-*.json"))), 1))
    else:
        chunks = _chunks(target)
        if not chunks:
            return None
        path = ChunkStore(folder / "chunks", Files()).path(chunks[fault.step % len(chunks)])
    try:
        with path.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            if fault.kind == "torn":
                file.truncate(size // 2)
            elif size:
                file.seek(size // 2)
                (middle,) = file.read(1)
                file.seek(size // 2)
                file.write(bytes([middle ^ 1 << fault.step % 8]))
    except FileNotFoundError:
        return None
    return path


def _chunks(target: Path) -> list[str]:
    """Names of the chunks of a checkpoint, as far as its parts can be read."""
    found: set[str] = set()
    for path in target.glob("part-*.json"):
        with contextlib.suppress(FileFormatError):
            found |= set(read_part(path).chunks)
    return sorted(found)
