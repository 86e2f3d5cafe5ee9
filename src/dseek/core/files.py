"""Writing a file so that a reader never sees half of it, whatever happens in between."""

from __future__ import annotations

import os
from pathlib import Path


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary name beside it, fsync, rename.

    Args:
        path: where it goes; missing folders are made, an existing file is replaced.
        data: its contents.

    Raises:
        OSError: the folder cannot be made or written; the old file, if any, is as it was.
    """
    import tempfile  # only writing needs it, and what starts quickly mostly reads

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name[:64]}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _new_file_mode(target))
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all (see `atomic_write_bytes`).

    Args:
        path: where it goes.
        text: its contents.

    Raises:
        OSError: the folder cannot be made or written.
    """
    atomic_write_bytes(path, text.encode("utf-8"))


def _new_file_mode(target: Path) -> int:
    """Keep the mode of the file that is replaced; a new one is readable by all, as `open` would make it."""
    try:
        return target.stat().st_mode & 0o777
    except FileNotFoundError:
        return 0o644


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be opened (not on Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
