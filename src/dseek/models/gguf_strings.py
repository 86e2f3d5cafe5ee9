"""Arrays of strings in GGUF metadata (vocabulary and merges), found and decoded in bulk.

Such an array is a row of (length as 64-bit integer, bytes) records, and a vocabulary holds 50,000 of them and more:
walking them one by one in Python would take longer than everything else that opening a file does. The lengths are
nearly always below 65,536 and the texts free of NUL bytes, so the six zero bytes that end each length mark the
records; numpy finds them all at once, and the chain of lengths is then checked link by link. Whatever does not fit
falls back to walking.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from dseek.core.errors import FileFormatError

_LENGTH_BYTES = 8
_WINDOW_BYTES = 1 << 16
"""Bytes searched at a time."""
_SMALL_ARRAY = 64
"""Below this many strings walking is as fast."""


class StringArray(Sequence[str]):
    """Strings that stay undecoded until they are asked for.

    Args:
        raw: uint8, the records of the array.
        starts: int64 [num_strings], where each record's length field starts in `raw`.
        source: what to call the array in messages.
    """

    __slots__ = ("_raw", "_source", "_starts")

    def __init__(self, raw: np.ndarray, starts: np.ndarray, source: str) -> None:
        self._raw = raw
        self._starts = starts
        self._source = source

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = int(self._starts[index])
        end = int(self._starts[index + 1]) if index + 1 < len(self) else len(self._raw)
        return self._decode(self._raw[start + _LENGTH_BYTES : end].tobytes())

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_list())

    def to_list(self) -> list[str]:
        """Decode all strings.

        Returns:
            The strings in order.

        Raises:
            FileFormatError: one of them is not UTF-8.
        """
        if not len(self):
            return []
        strings = self._decode(self._joined().tobytes()).split("\0")[1:]
        if len(strings) != len(self):  # a NUL inside a string
            return [self[i] for i in range(len(self))]
        return strings

    def to_pairs(self) -> list[tuple[str, str]]:
        """Decode strings of the form "left right", as BPE merges are stored.

        Returns:
            The pairs in order.

        Raises:
            FileFormatError: a string is not UTF-8, or has not exactly one space.
        """
        if not len(self):
            return []
        joined = self._joined()
        separators = joined[(joined == 0) | (joined == 0x20)]
        if len(separators) != 2 * len(self) or separators[::2].any() or not separators[1::2].all():
            raise FileFormatError(
                f"{self._source} has an entry that is not two parts",
                needed="entries of two parts with one space between",
            )
        parts = iter(self._decode(joined.tobytes()).replace("\0", " ").split(" "))
        next(parts)  # what comes before the first NUL: nothing
        return list(zip(parts, parts, strict=True))

    def _joined(self) -> np.ndarray:
        """The bytes of all strings, a NUL before each."""
        keep = np.ones(len(self._raw), dtype=bool)
        for offset in range(_LENGTH_BYTES - 1):
            keep[self._starts + offset] = False
        marked = self._raw.copy()
        marked[self._starts + (_LENGTH_BYTES - 1)] = 0
        return marked[keep]

    def _decode(self, data: bytes) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{self._source} is not UTF-8 ({error.reason})") from None


def read_string_array(buffer: mmap.mmap, start: int, count: int, source: str) -> tuple[StringArray, int]:
    """Find the strings of an array.

    Args:
        buffer: the mapped file.
        start: offset of the first string's length.
        count: number of strings; the caller has checked that 8 bytes each fit in the file.
        source: what to call the array in messages.

    Returns:
        The array, and the offset after it.

    Raises:
        FileFormatError: the strings run over the end of the file.
    """
    starts = _find_marked(buffer, start, count) if count > _SMALL_ARRAY else None
    if starts is None:
        starts = _walk(buffer, start, count, source)
    if not count:
        return StringArray(np.empty(0, dtype=np.uint8), starts, source), start
    last = start + int(starts[-1])
    end = last + _LENGTH_BYTES + struct.unpack_from("<Q", buffer, last)[0]
    return StringArray(np.frombuffer(buffer[start:end], dtype=np.uint8), starts, source), end


def _find_marked(buffer: mmap.mmap, start: int, count: int) -> np.ndarray | None:
    """Find the records by their zero bytes; None where the array is not of the usual kind.

    Returns:
        int64 [count], starts relative to `start`.
    """
    whole = np.frombuffer(buffer, dtype=np.uint8)
    found: list[np.ndarray] = []
    num_missing, next_start = count, 0
    # Window by window: temporaries stay in the processor's cache, and the search ends where the chain does.
    for first in range(start, len(buffer) - _LENGTH_BYTES + 1, _WINDOW_BYTES):
        window = whole[first : first + _WINDOW_BYTES + _LENGTH_BYTES]
        places = np.flatnonzero(_marked_places(window)[:_WINDOW_BYTES])[:num_missing]
        lengths = window[places].astype(np.int64) + 256 * window[places + 1].astype(np.int64)
        starts = places + (first - start)
        ends = starts + _LENGTH_BYTES + lengths
        if not len(starts) or starts[0] != next_start or not np.array_equal(ends[:-1], starts[1:]):
            return None
        found.append(starts)
        num_missing, next_start = num_missing - len(starts), int(ends[-1])
        if not num_missing:
            return np.concatenate(found) if start + next_start <= len(buffer) else None
    return None


def _marked_places(window: np.ndarray) -> np.ndarray:
    """Tell for each byte whether a length below 65,536 may start there.

    Args:
        window: uint8 [num_bytes], at least 8.

    Returns:
        bool [num_bytes - 7].
    """
    zero = window == 0
    num_places = len(window) - _LENGTH_BYTES + 1
    # Six zeros in a row from byte 2 of the length on, as pairs at 2, 4 and 6.
    pair = zero[:-1] & zero[1:]
    marked: np.ndarray = pair[2 : 2 + num_places] & pair[4 : 4 + num_places]
    marked &= pair[6 : 6 + num_places]
    # A length below 256 marks the place before it too: the last of a run is the true one.
    marked[:-1] &= ~marked[1:]
    return marked


def _walk(buffer: mmap.mmap, start: int, count: int, source: str) -> np.ndarray:
    """Find the records one after the other: always right, slower."""
    starts = np.empty(count, dtype=np.int64)
    position = start
    read_length = struct.Struct("<Q").unpack_from
    last_length = len(buffer) - _LENGTH_BYTES
    for index in range(count):
        if position > last_length:
            raise FileFormatError(f"{source} runs over the end of the file", remedy="download the file again")
        starts[index] = position - start
        position += _LENGTH_BYTES + read_length(buffer, position)[0]
    if position > len(buffer):
        raise FileFormatError(f"{source} runs over the end of the file", remedy="download the file again")
    return starts
