"""Content-addressed chunks: what has not changed since an earlier checkpoint is not written again.

A chunk is up to `MAX_CHUNK_BYTES` of a tensor's memory under the name of its BLAKE2b-256, so equal content has one
file, whichever tensor, rank or step it belongs to, and every reading is checked by the name. It is compressed where a
trial on the tensor's first new chunk saves enough: by zstd, the elements' first bytes together, then their second ones,
since exponents resemble each other and mantissas do not. That needs the package `zstandard`; without it chunks are
written as they are.

A file is: magic `DSKC`, MUST be first; u8 version 1; u8 encoding, 0 raw, 1 zstd; u8 element width of the grouping; u8
zero; u64 little-endian length of the content; then the content, encoded.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dseek.core.errors import ConfigError, FileFormatError
from dseek.train.checkpoints.files import Files

MAX_CHUNK_BYTES = 1 << 20
"""Content of one chunk."""

MIN_SAVING = 0.1
"""Least share of a tensor's first chunk that compression must save to be worth its time."""

_LEVEL = 1
_HEADER = struct.Struct("<4sBBBBQ")
_MAGIC = b"DSKC"
_RAW, _ZSTD = 0, 1
_WIDTHS = (1, 2, 4, 8)


def digest_of(content: memoryview | bytes) -> str:
    """Name a chunk by its content.

    Args:
        content: the bytes.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def is_digest(text: object) -> bool:
    """Tell whether something can be the name of a chunk.

    Args:
        text: anything.
    """
    return isinstance(text, str) and len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)


def zstd() -> ModuleType | None:
    """The package `zstandard`, if it is installed."""
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        return None


class ChunkStore:
    """The chunks of one folder."""

    def __init__(self, folder: Path, files: Files) -> None:
        """Keep chunks below `folder`, written by `files`."""
        self.folder = folder
        self._files = files
        self._checked: set[str] = set()

    def path(self, digest: str) -> Path:
        """Where the chunk `digest` is, or would be."""
        return self.folder / digest[:2] / digest

    def put(self, content: memoryview, digest: str, width: int, *, compress: bool) -> int:
        """Write a chunk unless it is there already.

        Args:
            content: at most `MAX_CHUNK_BYTES`.
            digest: of the content.
            width: bytes of an element.
            compress: whether to try.

        Returns:
            Bytes written; 0 where it was there.

        Raises:
            OSError: it could not be written.
        """
        path = self.path(digest)
        if path.is_file():
            if digest in self._checked:
                return 0
            # From before this process: what a failing disk left of it is written again.
            with contextlib.suppress(FileFormatError):
                self.get(digest, len(content))
                self._checked.add(digest)
                return 0
        encoded = encode(content, width, compress=compress)
        self._files.write(path, encoded)
        self._checked.add(digest)
        return len(encoded)

    def get(self, digest: str, num_bytes: int) -> bytes:
        """Read a chunk and check it.

        Args:
            digest: its name.
            num_bytes: length it must have.

        Returns:
            The content.

        Raises:
            FileFormatError: it is missing, damaged or of another length.
            ConfigError: it is compressed and `zstandard` is not installed.
        """
        path = self.path(digest)
        try:
            size = path.stat().st_size
            if size > _HEADER.size + 2 * MAX_CHUNK_BYTES:
                raise FileFormatError(f"the chunk {path} has {size} bytes", needed="no more than two chunks' worth")
            stored = path.read_bytes()
        except OSError as error:
            raise FileFormatError(f"the chunk {path} cannot be read ({error.strerror})") from error
        content = decode(stored, num_bytes, str(path))
        if digest_of(content) != digest:
            raise FileFormatError(f"the chunk {path} is damaged: its content has another checksum than its name")
        return content

    def digests(self) -> set[str]:
        """Names of all chunks that are there."""
        if not self.folder.is_dir():
            return set()
        return {
            entry.name
            for part in self.folder.iterdir()
            if part.is_dir()
            for entry in os.scandir(part)
            if is_digest(entry.name)
        }


def saves_enough(content: memoryview, width: int) -> bool:
    """Try on a tensor's first chunk whether compression pays.

    Args:
        content: the chunk.
        width: bytes of an element.
    """
    return zstd() is not None and len(encode(content, width, compress=True)) < (1 - MIN_SAVING) * len(content)


def encode(content: memoryview, width: int, *, compress: bool) -> bytes:
    """Make the file of a chunk.

    Args:
        content: the chunk.
        width: bytes of an element, 1, 2, 4 or 8.
        compress: whether to try; what grows stays as it is.

    Returns:
        The file's bytes.
    """
    module = zstd() if compress else None
    if module is not None and len(content) >= 64:
        grouped = width if len(content) % width == 0 else 1
        planes = np.ascontiguousarray(np.frombuffer(content, np.uint8).reshape(-1, grouped).T)
        packed = module.ZstdCompressor(level=_LEVEL).compress(planes.tobytes())
        if len(packed) < len(content):
            return _HEADER.pack(_MAGIC, 1, _ZSTD, grouped, 0, len(content)) + bytes(packed)
    return _HEADER.pack(_MAGIC, 1, _RAW, 1, 0, len(content)) + bytes(content)


def decode(stored: bytes, num_bytes: int, name: str) -> bytes:
    """Undo `encode`, trusting nothing.

    Args:
        stored: a file's bytes.
        num_bytes: length that the content must have.
        name: of the file, for messages.

    Returns:
        The content.

    Raises:
        FileFormatError: it is not such a file.
        ConfigError: it is compressed and `zstandard` is not installed.
    """
    if len(stored) < _HEADER.size:
        raise FileFormatError(f"the chunk {name} is cut short at {len(stored)} bytes")
    magic, version, encoding, width, zero, length = _HEADER.unpack_from(stored)
    if magic != _MAGIC or version != 1 or encoding not in (_RAW, _ZSTD) or width not in _WIDTHS or zero:
        raise FileFormatError(f"the chunk {name} does not start as one", needed="magic DSKC, version 1")
    if length != num_bytes or length > MAX_CHUNK_BYTES or length % width:
        raise FileFormatError(f"the chunk {name} holds {length} bytes", needed=f"{num_bytes}")
    content: Any = memoryview(stored)[_HEADER.size :]
    if encoding == _ZSTD:
        module = zstd()
        if module is None:
            raise ConfigError(f"the chunk {name} is compressed", remedy="pip install zstandard")
        try:
            content = module.ZstdDecompressor().decompress(content, max_output_size=length)
        except module.ZstdError as error:
            raise FileFormatError(f"the chunk {name} is damaged ({error})") from error
        if len(content) != length:
            raise FileFormatError(f"the chunk {name} is damaged: it unpacks to {len(content)} bytes")
        content = np.ascontiguousarray(np.frombuffer(content, np.uint8).reshape(width, -1).T).tobytes()
    if len(content) != length:
        raise FileFormatError(f"the chunk {name} is cut short: {len(content)} of {length} bytes")
    return bytes(content)
