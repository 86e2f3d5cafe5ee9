"""The two JSON files of a checkpoint, read as if somebody hostile had written them.

`step/NNNNNNNNNN/part-RRRR.json` is what rank R holds: the state's structure and, for each tensor it wrote, dtype, whole
shape and shards with their chunks. `step/NNNNNNNNNN/manifest.json` names the parts with their checksums. It is written
last: a checkpoint without one does not exist.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dseek.core.errors import FileFormatError
from dseek.train.checkpoints.chunks import MAX_CHUNK_BYTES, digest_of, is_digest
from dseek.train.checkpoints.tree import DTYPES, Node

MANIFEST = "manifest.json"
"""Name of the file whose presence makes a checkpoint."""

MAX_JSON_BYTES = 512 << 20
"""Longest file that is read."""

_MAX_RANKS = 1 << 16
_MAX_DIMS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A box of a tensor, and the chunks of its memory in C order."""

    offset: tuple[int, ...]
    """Of its first element."""
    shape: tuple[int, ...]
    """Of the box."""
    chunks: tuple[str, ...]
    """All but the last hold `MAX_CHUNK_BYTES`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedTensor:
    """What one part knows of a tensor."""

    dtype: str
    """A key of `tree.DTYPES`."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    shards: tuple[Shard, ...]
    """The boxes that this rank wrote."""

    def shard_bytes(self, shard: Shard) -> int:
        """Bytes of a `shard`."""
        return math.prod(shard.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one rank wrote."""

    step: int
    """Training step."""
    run: str
    """Which start of the training wrote it."""
    rank: int
    """Who wrote it."""
    world_size: int
    """Of how many."""
    structure: Node
    """Of the state; the same on all ranks."""
    private: Node
    """Structure of what belongs to this rank alone."""
    tensors: Mapping[str, SavedTensor]
    """Tensors of both, by name; those of `private` start with `private`."""

    def to_bytes(self) -> bytes:
        """The file's content."""
        fields = {
            "format": "dseek-checkpoint-part",
            "version": 1,
            "step": self.step,
            "run": self.run,
            "rank": self.rank,
            "world_size": self.world_size,
            "structure": self.structure,
            "private": self.private,
            "tensors": {
                name: {
                    "dtype": tensor.dtype,
                    "shape": tensor.shape,
                    "shards": [
                        {"offset": shard.offset, "shape": shard.shape, "chunks": shard.chunks}
                        for shard in tensor.shards
                    ],
                }
                for name, tensor in self.tensors.items()
            },
        }
        return json.dumps(fields, separators=(",", ":")).encode()

    @property
    def chunks(self) -> dict[str, int]:
        """Length of every chunk, by its name."""
        found = {}
        for tensor in self.tensors.values():
            for shard in tensor.shards:
                num_bytes = tensor.shard_bytes(shard)
                for index, digest in enumerate(shard.chunks):
                    found[digest] = min(MAX_CHUNK_BYTES, num_bytes - index * MAX_CHUNK_BYTES)
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What makes a checkpoint complete."""

    step: int
    """Training step."""
    run: str
    """Which start of the training wrote it."""
    created_s: float
    """Seconds since 1970."""
    num_bytes: int
    """Of all tensors."""
    new_bytes: int
    """Written for this checkpoint, by all ranks."""
    parts: tuple[str, ...]
    """Checksum of each rank's part."""

    def to_bytes(self) -> bytes:
        """The file's content."""
        return json.dumps(
            {
                "format": "dseek-checkpoint",
                "version": 1,
                "step": self.step,
                "run": self.run,
                "created_s": self.created_s,
                "num_bytes": self.num_bytes,
                "new_bytes": self.new_bytes,
                "parts": self.parts,
            }
        ).encode()


def part_name(rank: int) -> str:
    """Name the file of a rank's part.

    Args:
        rank: who writes it.
    """
    return f"part-{rank:04d}.json"


def read_manifest(path: Path) -> Manifest:
    """Read the file that completes a checkpoint.

    Args:
        path: the file.

    Returns:
        The manifest.

    Raises:
        FileFormatError: it cannot be read or is not one.
    """
    fields = _fields(_content(path), path, "dseek-checkpoint")
    parts = fields.get("parts")
    if not isinstance(parts, list) or not 1 <= len(parts) <= _MAX_RANKS or not all(map(is_digest, parts)):
        _refuse(path, "parts")
    created_s = fields.get("created_s")
    if not isinstance(created_s, (int, float)) or not math.isfinite(created_s):
        _refuse(path, "created_s")
    return Manifest(
        step=_count(fields, "step", path),
        run=_text(fields, "run", path),
        created_s=float(created_s),
        num_bytes=_count(fields, "num_bytes", path),
        new_bytes=_count(fields, "new_bytes", path),
        parts=tuple(parts),
    )


def read_part(path: Path, digest: str | None = None) -> Part:
    """Read what a rank wrote.

    Args:
        path: the file.
        digest: checksum that the manifest has of it; None for a checkpoint that is not complete.

    Returns:
        The part.

    Raises:
        FileFormatError: it cannot be read, is not one, or is not the one that the manifest means.
    """
    content = _content(path)
    if digest is not None and digest_of(content) != digest:
        raise FileFormatError(f"{path} is damaged: it has another checksum than the manifest says")
    fields = _fields(content, path, "dseek-checkpoint-part")
    tensors = fields.get("tensors")
    if not isinstance(tensors, dict):
        _refuse(path, "tensors")
    world_size = _count(fields, "world_size", path)
    if not 1 <= world_size <= _MAX_RANKS or not 0 <= _count(fields, "rank", path) < world_size:
        _refuse(path, "world_size")
    structure, private = fields.get("structure"), fields.get("private")
    if not isinstance(structure, dict) or not isinstance(private, dict):
        _refuse(path, "structure")
    return Part(
        step=_count(fields, "step", path),
        run=_text(fields, "run", path),
        rank=_count(fields, "rank", path),
        world_size=world_size,
        structure=structure,
        private=private,
        tensors={name: _tensor(entry, path, name) for name, entry in tensors.items()},
    )


def _tensor(entry: object, path: Path, name: str) -> SavedTensor:
    if not isinstance(entry, dict) or entry.get("dtype") not in DTYPES or not isinstance(entry.get("shards"), list):
        _refuse(path, name)
    shape = _sizes(entry.get("shape"), path, name)
    tensor = SavedTensor(dtype=entry["dtype"], shape=shape, shards=())
    shards = []
    for one in entry["shards"]:
        if not isinstance(one, dict) or not isinstance(one.get("chunks"), list):
            _refuse(path, name)
        shard = Shard(
            offset=_sizes(one.get("offset"), path, name),
            shape=_sizes(one.get("shape"), path, name),
            chunks=tuple(one["chunks"]),
        )
        fits = len(shard.shape) == len(shape) == len(shard.offset) and all(
            start + size <= whole for start, size, whole in zip(shard.offset, shard.shape, shape, strict=True)
        )
        num_chunks = -(-tensor.shard_bytes(shard) // MAX_CHUNK_BYTES) if fits else -1
        if num_chunks != len(shard.chunks) or not all(map(is_digest, shard.chunks)):
            _refuse(path, name)
        shards.append(shard)
    return SavedTensor(dtype=tensor.dtype, shape=shape, shards=tuple(shards))


def _sizes(value: object, path: Path, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _MAX_DIMS:
        _refuse(path, name)
    if not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 1 << 48 for one in value):
        _refuse(path, name)
    if math.prod(value) >= 1 << 48:
        _refuse(path, name)
    return tuple(value)


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise FileFormatError(f"{path} is longer than {MAX_JSON_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read ({error.strerror})") from error


def _fields(content: bytes, path: Path, kind: str) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is damaged: it is not JSON ({type(error).__name__})") from error
    if not isinstance(fields, dict) or fields.get("format") != kind or fields.get("version") != 1:
        raise FileFormatError(f"{path} is not a file of format {kind}, version 1")
    return fields


def _count(fields: dict[str, Any], key: str, path: Path) -> int:
    value = fields.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        _refuse(path, key)
    return value


def _text(fields: dict[str, Any], key: str, path: Path) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or len(value) > 200:
        _refuse(path, key)
    return value


def _refuse(path: Path, key: str) -> NoReturn:
    raise FileFormatError(f"{path} is damaged: {key} is missing or wrong")
