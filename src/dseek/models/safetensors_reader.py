"""Reads the header of a safetensors file and maps its tensors; trusts nothing in it.

The format is an 8-byte length, a JSON object that says each tensor's dtype, shape and byte range, then the bytes. This
reader checks what the format demands: the ranges MUST fit shape and dtype, MUST NOT overlap, and MUST cover the data
without holes; names MUST be unique. A file that breaks one of these ends in `FileFormatError`.

Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dseek.core.errors import FileFormatError, UnsupportedModelError
from dseek.models.config_values import shorten
from dseek.models.mapped import map_file, release

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit, so that a header of nonsense cannot fill the memory."""
MAX_TENSORS = 1 << 17
"""The largest sharded models have some 100,000 tensors in all."""
MAX_DIMENSIONS = 8
"""No weight has more than four."""

_LENGTH_BYTES = 8
_FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_INTEGER_BYTES = {"I8": 1, "I32": 4, "I64": 8}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies in its file.

    Args:
        name: name in the file.
        shape: its shape.
        encoding: dtype as the file spells it; those that are run here are keys of `dseek.ops.tensor.BLOCK_SIZES`.
        offset: first byte in the file.
        num_bytes: its size.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    offset: int
    num_bytes: int


class SafetensorsFile:
    """A safetensors file whose header has been read and checked.

    Args:
        path: the file.
        integers: whether int8, int32 and int64 are read too; whoever asks for them says what they mean.

    Raises:
        FileFormatError: it is truncated, inconsistent or over a limit.
        UnsupportedModelError: a tensor has a dtype that is not read here.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, *, integers: bool = False) -> None:
        self.path = path
        self._item_bytes = _FLOAT_BYTES | (_INTEGER_BYTES if integers else {})
        self._map = map_file(path)
        self._size = len(self._map)
        header, data_start = self._read_header()
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._error("__metadata__ is no object of strings")
        self.metadata: Mapping[str, str] = metadata
        """Free text that the writer left."""
        if len(header) > MAX_TENSORS:
            raise self._error(f"the header names {len(header)} tensors", f"at most {MAX_TENSORS}")
        self.tensors: Mapping[str, StoredTensor] = {
            name: self._read_entry(name, entry, data_start) for name, entry in header.items()
        }
        """Tensors by name."""
        self._check_places(data_start)

    def data(self, name: str) -> np.ndarray:
        """Return the bytes of a tensor.

        Args:
            name: a key of `tensors`.

        Returns:
            uint8 [num_bytes], a view of the mapped file.
        """
        tensor = self.tensors[name]
        return np.frombuffer(self._map, dtype=np.uint8, count=tensor.num_bytes, offset=tensor.offset)

    def release(self) -> None:
        """Let the system drop the pages read so far."""
        release(self._map)

    def close(self) -> None:
        """Let go of the file; it stays mapped while a view of it lives."""
        try:
            self._map.close()
        except BufferError:
            # A tensor's view is still in use: the mapping goes with the last one.
            return

    def _error(self, found: str, needed: str | None = None) -> FileFormatError:
        return FileFormatError(f"{self.path}: {found}", needed=needed, remedy="download the file again")

    def _read_header(self) -> tuple[dict[str, Any], int]:
        if self._size < _LENGTH_BYTES:
            raise self._error(f"is {self._size} bytes long", "a safetensors file")
        length = int.from_bytes(self._map[:_LENGTH_BYTES], "little")
        data_start = _LENGTH_BYTES + length
        if length > MAX_HEADER_BYTES or data_start > self._size:
            raise self._error(
                f"the header claims {length} bytes, the file has {self._size}",
                f"a safetensors file (header of at most {MAX_HEADER_BYTES} bytes)",
            )
        text = self._map[_LENGTH_BYTES:data_start]
        if not text.startswith(b"{"):
            raise self._error(f"the header starts with {text[:8]!r}", "a JSON object")
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=self._unique)
        except (ValueError, RecursionError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise self._error(f"the header is no JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._error("the header is no JSON object")
        return header, data_start

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Build an object of the header, refusing a name that appears twice."""
        result = dict(pairs)
        if len(result) != len(pairs):
            raise self._error("a name appears twice in the header")
        return result

    def _read_entry(self, name: str, entry: Any, data_start: int) -> StoredTensor:
        """Check one tensor's entry on its own."""
        what = f"tensor {shorten(name)}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._error(f"{what} is described by {shorten(entry)}", "dtype, shape and data_offsets")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
            raise self._error(f"{what} has the shape {shorten(shape)}", "a list of sizes")
        if not _are_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= self._size - data_start:
            raise self._error(f"{what} has the data_offsets {shorten(offsets)}", "a byte range inside the file")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in self._item_bytes:
            raise UnsupportedModelError(
                f"{self.path}: {what} has the dtype {shorten(entry['dtype'])}",
                needed="one of " + ", ".join(self._item_bytes),
                remedy="use a checkpoint whose weights are not quantised",
            )
        encoding = entry["dtype"]
        num_bytes = self._item_bytes[encoding]
        for size in shape:
            num_bytes *= size
            if num_bytes > self._size:
                break
        if num_bytes != offsets[1] - offsets[0]:
            raise self._error(
                f"{what} ({encoding} {shorten(shape)}) has {offsets[1] - offsets[0]} bytes",
                "as many as its shape takes",
            )
        return StoredTensor(name, tuple(shape), encoding, data_start + offsets[0], num_bytes)

    def _check_places(self, data_start: int) -> None:
        """Check that the tensors cover the data: no overlap, no hole, nothing behind."""
        position = data_start
        for tensor in sorted(self.tensors.values(), key=lambda tensor: (tensor.offset, tensor.num_bytes)):
            if tensor.offset != position:
                kind = "overlaps the one before" if tensor.offset < position else "leaves a hole before it"
                raise self._error(f"tensor {shorten(tensor.name)} {kind}", "tensors one after the other")
            position = tensor.offset + tensor.num_bytes
        if position != self._size:
            raise self._error(f"the tensors end at byte {position}, the file at {self._size}", "the same")


def _are_counts(values: Any) -> bool:
    """Tell whether a JSON value is a list of whole numbers, none negative."""
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values
    )
