"""Maps a weight file for reading, so that opening it costs nothing and packing reads each page once."""

from __future__ import annotations

import mmap
from pathlib import Path

from dseek.core.errors import FileFormatError


def map_file(path: Path) -> mmap.mmap:
    """Map a whole file read-only.

    Args:
        path: the file.

    Returns:
        The mapping; it outlives the file handle.

    Raises:
        FileFormatError: the file is empty or no regular file.
        OSError: it cannot be opened.
    """
    if not path.is_file():
        raise FileFormatError(f"{path} is not a regular file", needed="a weight file")
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise FileFormatError(f"{path} is empty", remedy="download the file again")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def release(mapping: mmap.mmap) -> None:
    """Let the system drop the pages of a mapping that have been read; they come back when they are read again.

    Args:
        mapping: from `map_file`.
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)
