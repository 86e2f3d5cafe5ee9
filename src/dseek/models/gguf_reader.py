"""Reads the header of a GGUF file (versions 2 and 3) and maps its tensors; trusts nothing in it.

Nothing but the header is read: a tensor is a view of the mapped file. Every count, length and offset is checked
against the file's size before it is used, so a damaged or hostile file ends in `FileFormatError`. Not handled:
big-endian files and version 1. The file must not shrink while it is mapped (the system kills a process that reads
beyond its end).

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dseek.core.errors import FileFormatError, UnsupportedModelError
from dseek.models.config_values import shorten
from dseek.models.gguf_strings import read_string_array
from dseek.models.mapped import map_file, release
from dseek.ops.tensor import BLOCK_SIZES

MAX_METADATA_ENTRIES = 1 << 16
"""Real files have under 100; this bounds the work a header of nonsense can ask for."""
MAX_TENSORS = 1 << 16
"""The largest dense models have some 1,500."""
MAX_NAME_BYTES = 65_535
"""Longest key or tensor name; the specification's limit of a key."""
MAX_STRING_BYTES = 1 << 24
"""Longest single string; chat templates reach some 20 kB."""
MAX_ARRAY_LENGTH = 1 << 24
"""Longest array; the largest vocabularies have under 300,000 tokens and 700,000 merges."""
MAX_DIMENSIONS = 4
"""ggml's own limit."""
MAX_ALIGNMENT = 1 << 20
"""Real files use 32; beyond this a header could point anywhere."""
_LIST_LENGTH = 4096
"""Arrays up to this length become lists; longer ones stay numpy arrays or `StringArray`."""

ENCODINGS: dict[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    30: "BF16",
}
"""ggml type number to encoding, for the types that are read."""

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {
    kind: (struct.Struct(layout), np.dtype(dtype))
    for kind, layout, dtype in (
        (0, "<B", "u1"),
        (1, "<b", "i1"),
        (2, "<H", "<u2"),
        (3, "<h", "<i2"),
        (4, "<I", "<u4"),
        (5, "<i", "<i4"),
        (6, "<f", "<f4"),
        (_BOOL, "<B", "u1"),
        (10, "<Q", "<u8"),
        (11, "<q", "<i8"),
        (12, "<d", "<f8"),
    )
}
_U32, _U64 = _SCALARS[4][0], _SCALARS[10][0]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies in its file.

    Args:
        name: name in the file.
        shape: logical shape, output channels first.
        encoding: a key of `BLOCK_SIZES`.
        offset: first byte in the file.
        num_bytes: its size.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    offset: int
    num_bytes: int


class GgufFile:
    """A GGUF file whose header has been read and checked.

    Args:
        path: the file.

    Raises:
        FileFormatError: it is truncated, inconsistent or over a limit.
        UnsupportedModelError: a tensor has an encoding that is not read here.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = map_file(path)
        header = _HeaderReader(self._map, path)
        version, num_tensors, num_entries = header.preamble()
        self.version: int = version
        self.metadata: Mapping[str, Any] = header.metadata(num_entries)
        """Key to value: int, float, bool, str, list, numpy array or `StringArray`."""
        self.tensors: Mapping[str, StoredTensor] = header.tensors(
            num_tensors, self.metadata.get("general.alignment", 32)
        )
        """Tensors by name, in the file's order."""

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


class _HeaderReader:
    """Walks the header once, front to back."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self._buffer = buffer
        self._size = len(buffer)
        self._position = 0
        self._path = path

    def error(self, found: str, needed: str | None = None) -> FileFormatError:
        return FileFormatError(f"{self._path}: {found}", needed=needed, remedy="download or convert the file again")

    def number(self, layout: struct.Struct, what: str) -> Any:
        end = self._position + layout.size
        if end > self._size:
            raise self.error(f"ends inside {what}, at byte {self._size}")
        value = layout.unpack_from(self._buffer, self._position)[0]
        self._position = end
        return value

    def string(self, what: str, limit: int) -> str:
        length = self.number(_U64, what)
        if length > limit:
            raise self.error(f"{what} is {length} bytes long", needed=f"at most {limit}")
        end = self._position + length
        if end > self._size:
            raise self.error(f"ends inside {what}, at byte {self._size}")
        data = self._buffer[self._position : end]
        self._position = end
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8") from None

    def preamble(self) -> tuple[int, int, int]:
        """Read magic, version and counts."""
        if self._buffer[:4] != b"GGUF":
            raise self.error(f"starts with {self._buffer[:4]!r}", needed="a GGUF file, which starts with b'GGUF'")
        self._position = 4
        version = self.number(_U32, "the version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = "a big-endian file" if swapped in (2, 3) else f"GGUF version {version}"
            raise UnsupportedModelError(
                f"{self._path} is {kind}",
                needed="a little-endian GGUF file of version 2 or 3",
                remedy="convert it again",
            )
        num_tensors = self.number(_U64, "the number of tensors")
        num_entries = self.number(_U64, "the number of metadata entries")
        if num_tensors > MAX_TENSORS:
            raise self.error(f"claims {num_tensors} tensors", needed=f"at most {MAX_TENSORS}")
        if num_entries > MAX_METADATA_ENTRIES:
            raise self.error(f"claims {num_entries} metadata entries", needed=f"at most {MAX_METADATA_ENTRIES}")
        return version, num_tensors, num_entries

    def metadata(self, num_entries: int) -> dict[str, Any]:
        """Read the key-value pairs."""
        entries: dict[str, Any] = {}
        for index in range(num_entries):
            key = self.string(f"metadata key {index}", MAX_NAME_BYTES)
            if key in entries:
                raise self.error(f"metadata key {shorten(key)} appears twice")
            entries[key] = self._value(self.number(_U32, f"the type of {shorten(key)}"), key)
        return entries

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(f"the text of {shorten(key)}", MAX_STRING_BYTES)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise self.error(f"{shorten(key)} has the unknown type {kind}")
        value = self.number(_SCALARS[kind][0], shorten(key))
        if kind == _BOOL:
            if value > 1:
                raise self.error(f"{shorten(key)} is {value}", needed="a boolean, 0 or 1")
            return bool(value)
        return value

    def _array(self, key: str) -> Any:
        name = shorten(key)
        kind = self.number(_U32, f"the element type of {name}")
        length = self.number(_U64, f"the length of {name}")
        if length > MAX_ARRAY_LENGTH:
            raise self.error(f"{name} claims {length} elements", needed=f"at most {MAX_ARRAY_LENGTH}")
        if kind == _STRING:
            if length * 8 > self._size - self._position:
                raise self.error(f"{name} claims {length} strings, more than the file holds")
            source = f"{self._path}: {name}"
            strings, self._position = read_string_array(self._buffer, self._position, length, source)
            return strings.to_list() if length <= _LIST_LENGTH else strings
        if kind not in _SCALARS:
            raise self.error(
                f"{name} is an array of the type {kind}", needed="an array of numbers, booleans or strings"
            )
        dtype = _SCALARS[kind][1]
        num_bytes = length * dtype.itemsize
        if num_bytes > self._size - self._position:
            raise self.error(f"{name} claims {length} elements, more than the file holds")
        values = np.frombuffer(self._buffer[self._position : self._position + num_bytes], dtype=dtype)
        self._position += num_bytes
        if kind == _BOOL:
            if values.size and values.max() > 1:
                raise self.error(f"{name} has a boolean that is not 0 or 1")
            values = values.astype(bool)
        return values.tolist() if length <= _LIST_LENGTH else values

    def tensors(self, num_tensors: int, alignment: Any) -> dict[str, StoredTensor]:
        """Read the tensor table and check that the tensors lie inside the file, apart from each other."""
        if (
            not isinstance(alignment, int)
            or isinstance(alignment, bool)
            or not 1 <= alignment <= MAX_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise self.error(
                f"general.alignment is {shorten(alignment)}", needed=f"a power of two up to {MAX_ALIGNMENT}"
            )
        table: dict[str, StoredTensor] = {}
        for index in range(num_tensors):
            tensor = self._tensor(index, alignment)
            if tensor.name in table:
                raise self.error(f"tensor {shorten(tensor.name)} appears twice")
            table[tensor.name] = tensor
        data_start = -(-self._position // alignment) * alignment
        placed = {
            name: StoredTensor(name, tensor.shape, tensor.encoding, data_start + tensor.offset, tensor.num_bytes)
            for name, tensor in table.items()
        }
        self._check_places(placed)
        return placed

    def _tensor(self, index: int, alignment: int) -> StoredTensor:
        """Read one entry of the tensor table; its offset is still relative to the data."""
        name = self.string(f"the name of tensor {index}", MAX_NAME_BYTES)
        what = f"tensor {shorten(name)}"
        num_dimensions = self.number(_U32, what)
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self.error(f"{what} has {num_dimensions} dimensions", needed=f"1 to {MAX_DIMENSIONS}")
        sizes = [self.number(_U64, what) for _ in range(num_dimensions)]
        kind = self.number(_U32, what)
        offset = self.number(_U64, what)
        if kind not in ENCODINGS:
            raise UnsupportedModelError(
                f"{self._path}: {what} has the ggml type {kind}",
                needed="one of " + ", ".join(ENCODINGS.values()),
                remedy="use a file in another quantisation",
            )
        encoding = ENCODINGS[kind]
        block_elements, block_bytes = BLOCK_SIZES[encoding]
        num_elements = 1
        for size in sizes:
            num_elements *= size
        num_bytes = num_elements // block_elements * block_bytes
        if num_elements == 0 or num_bytes > self._size:
            raise self.error(f"{what} has the shape {sizes}", needed="sizes above zero that the file can hold")
        if sizes[0] % block_elements:
            raise self.error(f"{what} has rows of {sizes[0]}", needed=f"a multiple of {block_elements} for {encoding}")
        if offset % alignment:
            raise self.error(f"{what} starts at {offset}", needed=f"a multiple of {alignment}")
        return StoredTensor(name, tuple(reversed(sizes)), encoding, offset, num_bytes)

    def _check_places(self, tensors: Mapping[str, StoredTensor]) -> None:
        previous: StoredTensor | None = None
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset + tensor.num_bytes > self._size:
                raise self.error(
                    f"tensor {shorten(tensor.name)} ends at byte {tensor.offset + tensor.num_bytes}, "
                    f"the file at {self._size}",
                    needed="the whole file",
                )
            if previous is not None and tensor.offset < previous.offset + previous.num_bytes:
                raise self.error(f"tensors {shorten(previous.name)} and {shorten(tensor.name)} overlap")
            previous = tensor
