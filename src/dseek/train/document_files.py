"""The three kinds of files that documents are read from; each reads what begins at an offset and says where it ends.

Offsets are bytes in text and JSONL files and rows in parquet files. Limits bound what a hostile file can make us hold:
a line of JSON, a paragraph, a row group. What is no UTF-8 or no JSON is an error with the file's name and line, never
skipped in silence; empty lines and empty documents are skipped, since every tool leaves some.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dseek.core.errors import ConfigError

PIECE_BYTES = 1 << 20
"""A longer document is read in pieces that end with a line, if it has lines."""
MAX_UNIT_BYTES = 64 << 20
"""Longest line of JSON, or paragraph."""
MAX_ROW_GROUP_BYTES = 4 << 30
"""Largest row group of a parquet file, unpacked."""
_SCAN_BYTES = 8 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Unit:
    """What was read at an offset."""

    content: Any
    """Text, or a list of messages."""
    begins: bool
    """A document begins with it."""
    ends: bool
    """The document ends with it."""
    after: int
    """Offset of what follows."""
    place: str
    """Where it is, for messages."""


class DocumentFile(ABC):
    """A file of documents. Reading keeps no state that matters: any offset may be read at any time.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def read(self, offset: int) -> Unit | None:
        """Read the next document that is not empty, or a piece of it.

        Args:
            offset: 0, or a `Unit.after`.

        Returns:
            It, or None at the end.

        Raises:
            ConfigError: the file holds what it must not.
        """

    @abstractmethod
    def index(self) -> tuple[np.ndarray, np.ndarray]:
        """Find all documents.

        Returns:
            Offsets, int64, and for each the number of its group: documents of a group are cheap to read after another.
        """


class _ByteFile(DocumentFile):
    """A file that is read by the byte."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None

    def _line(self, offset: int, what: str) -> bytes:
        """The line at an offset, with its end; empty at the file's end."""
        self._file.seek(offset)
        line = self._file.readline(MAX_UNIT_BYTES + 1)
        if len(line) > MAX_UNIT_BYTES:
            raise ConfigError(
                f"{self.path}, line {self._line_number(offset)}: {what} has more than {MAX_UNIT_BYTES >> 20} MiB",
                needed="shorter ones",
            )
        return line

    def _line_number(self, offset: int) -> int:
        """Number of the line at an offset, counted only when somebody has to be told."""
        self._file.seek(0)
        number, left = 1, offset
        while left > 0 and (block := self._file.read(min(left, _SCAN_BYTES))):
            number += block.count(b"\n")
            left -= len(block)
        return number

    def _text(self, data: bytes, offset: int) -> str:
        if offset == 0:
            data = data.removeprefix(_BYTE_ORDER_MARK)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = self._line_number(offset + error.start)
            raise ConfigError(
                f"{self.path}, line {line}: byte {data[error.start]:#04x} is not UTF-8",
                needed="text in UTF-8",
                remedy="convert the file (iconv -t UTF-8)",
            ) from None

    def _line_starts(self) -> np.ndarray:
        """Offsets of all lines."""
        starts = [np.zeros(1, dtype=np.int64)]
        position = 0
        self._file.seek(0)
        while block := self._file.read(_SCAN_BYTES):
            ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == 0x0A)
            starts.append(ends + (position + 1))
            position += len(block)
        found = np.concatenate(starts)
        return found[found < position]

    def _blank_lines(self, starts: np.ndarray) -> np.ndarray:
        """Which of the lines hold nothing but white space; only short ones are looked at."""
        self._file.seek(0, 2)
        lengths = np.diff(starts, append=self._file.tell())
        blank = np.zeros(len(starts), dtype=bool)
        for line in np.flatnonzero(lengths <= 64):
            self._file.seek(int(starts[line]))
            blank[line] = not self._file.read(int(lengths[line])).removeprefix(_BYTE_ORDER_MARK).strip()
        return blank


class TextFile(_ByteFile):
    """Plain text.

    Args:
        path: the file.
        sample_by: what one document is: document (the file), paragraph or line.
    """

    def __init__(self, path: Path, sample_by: str) -> None:
        super().__init__(path)
        self._sample_by = sample_by

    def read(self, offset: int) -> Unit | None:
        if self._sample_by == "document":
            return self._read_piece(offset)
        while line := self._line(offset, "a line"):
            if line.removeprefix(_BYTE_ORDER_MARK).strip():
                break
            offset += len(line)
        else:
            return None
        after = offset + len(line)
        if self._sample_by == "paragraph":
            lines = [line]
            while (line := self._line(after, "a line")).strip():
                lines.append(line)
                after += len(line)
                if after - offset > MAX_UNIT_BYTES:
                    raise ConfigError(
                        f"{self.path}, line {self._line_number(offset)}: a paragraph has more than "
                        f"{MAX_UNIT_BYTES >> 20} MiB",
                        needed="shorter ones",
                        remedy='set data.sample_by = "document"',
                    )
            line = b"".join(lines)
        text = self._text(line, offset).rstrip("\r\n")
        return Unit(text, True, True, after, f"{self.path}, byte {offset}")

    def _read_piece(self, offset: int) -> Unit | None:
        self._file.seek(offset)
        data = self._file.read(PIECE_BYTES)
        if not data or (offset == 0 and not data.removeprefix(_BYTE_ORDER_MARK).strip() and len(data) < PIECE_BYTES):
            return None
        ends = not self._file.read(1)
        if not ends:
            cut = data.rfind(b"\n") + 1
            if not cut:  # one endless line: cut it between two characters
                cut = len(data)
                while cut > len(data) - 4 and data[cut - 1] & 0xC0 == 0x80:
                    cut -= 1
                cut -= data[cut - 1] >= 0xC0
            data = data[:cut]
        text = self._text(data, offset)
        return Unit(text, offset == 0, ends, offset + len(data), f"{self.path}, byte {offset}")

    def index(self) -> tuple[np.ndarray, np.ndarray]:
        if self._sample_by == "document":
            starts = np.zeros(0 if self.read(0) is None else 1, dtype=np.int64)
        else:
            starts = self._line_starts()
            full = ~self._blank_lines(starts)
            if self._sample_by == "paragraph":
                full &= np.concatenate(([True], ~full[:-1]))
            starts = starts[full]
        return starts, np.zeros(len(starts), dtype=np.int64)


class JsonLinesFile(_ByteFile):
    """One JSON object a line, with a text or a conversation.

    Args:
        path: the file.
        text_column: key of a text.
        messages_column: key of a conversation.
    """

    def __init__(self, path: Path, text_column: str, messages_column: str) -> None:
        super().__init__(path)
        self._columns = text_column, messages_column

    def read(self, offset: int) -> Unit | None:
        while line := self._line(offset, "a line"):
            if line.removeprefix(_BYTE_ORDER_MARK).strip():
                content = self._content(line, offset)
                if content:
                    place = f"{self.path}, byte {offset}"
                    return Unit(content, True, True, offset + len(line), place)
            offset += len(line)
        return None

    def index(self) -> tuple[np.ndarray, np.ndarray]:
        starts = self._line_starts()
        starts = starts[~self._blank_lines(starts)]
        # Records with an empty text are found by reading alone; they would end an order too early.
        kept = [start for start in starts.tolist() if self._content(self._line(start, "a line"), start)]
        return np.array(kept, dtype=np.int64), np.zeros(len(kept), dtype=np.int64)

    def _content(self, line: bytes, offset: int) -> Any:
        text = self._text(line, offset)
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = str(error).replace("line 1 column", "column")
            raise ConfigError(
                f"{self.path}, line {self._line_number(offset)} is no JSON: {reason}", needed="one JSON object a line"
            ) from None
        if not isinstance(record, dict):
            raise ConfigError(
                f"{self.path}, line {self._line_number(offset)} holds a {type(record).__name__}",
                needed="a JSON object with " + " or ".join(map(repr, self._columns)),
            )
        return checked_content(record, self._columns, lambda: f"{self.path}, line {self._line_number(offset)}")


class ParquetFile(DocumentFile):
    """A column of texts or conversations in a parquet file, read by the row group.

    Args:
        path: the file.
        text_column: name of the column of texts.
        messages_column: name of the column of conversations.

    Raises:
        ConfigError: pyarrow is missing, or the file is no parquet or lacks both columns.
    """

    def __init__(self, path: Path, text_column: str, messages_column: str) -> None:
        super().__init__(path)
        try:
            import pyarrow.parquet
        except ImportError:
            raise ConfigError(
                f"{path} is a parquet file, and pyarrow is not installed", remedy="pip install 'dseek[train]'"
            ) from None
        self._columns = text_column, messages_column
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise ConfigError(f"{path} cannot be read as parquet: {error}") from None
        names = self._file.schema_arrow.names
        self._column = next((name for name in (messages_column, text_column) if name in names), None)
        if self._column is None:
            raise ConfigError(
                f"{path} has the columns {', '.join(names[:20])}", needed=" or ".join(map(repr, self._columns))
            )
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64))).astype(np.int64)
        self._group: tuple[int, list[Any]] | None = None

    def read(self, offset: int) -> Unit | None:
        while 0 <= offset < self._starts[-1]:
            group = int(np.searchsorted(self._starts, offset, side="right")) - 1
            value = self._rows(group)[offset - int(self._starts[group])]
            place = f"{self.path}, row {offset + 1}"
            content = checked_content({self._column: value}, self._columns, lambda place=place: place)
            offset += 1
            if content:
                return Unit(content, True, True, offset, place)
        return None

    def index(self) -> tuple[np.ndarray, np.ndarray]:
        rows, groups = [], []
        for group in range(len(self._starts) - 1):
            for row, value in enumerate(self._rows(group)):
                if value:
                    rows.append(int(self._starts[group]) + row)
                    groups.append(group)
        return np.array(rows, dtype=np.int64), np.array(groups, dtype=np.int64)

    def _rows(self, group: int) -> list[Any]:
        if self._group is None or self._group[0] != group:
            import pyarrow

            size = self._file.metadata.row_group(group).total_byte_size
            if size > MAX_ROW_GROUP_BYTES:
                raise ConfigError(
                    f"{self.path}: row group {group} has {size >> 20} MiB",
                    needed=f"at most {MAX_ROW_GROUP_BYTES >> 20} MiB",
                    remedy="write the file again with smaller row groups",
                )
            try:
                table = self._file.read_row_group(group, columns=[self._column])
                self._group = group, table.column(0).to_pylist()
            except (OSError, ValueError, IndexError, pyarrow.ArrowException) as error:
                raise ConfigError(f"{self.path}: row group {group} cannot be read: {error}") from None
        return self._group[1]


def checked_content(record: dict[Any, Any], columns: tuple[str, str], place: Any) -> Any:
    """Take the conversation or the text out of a record.

    Args:
        record: names to values.
        columns: names of text and conversation.
        place: called for where the record is, when something is wrong with it.

    Returns:
        A list of messages, or a text; either may be empty.

    Raises:
        ConfigError: neither is there, or it is of another type.
    """
    text_column, messages_column = columns
    if record.get(messages_column) is not None:
        messages = record[messages_column]
        right = isinstance(messages, list) and all(
            isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
        )
        if not right:
            raise ConfigError(f"{place()}: {messages_column!r} is no conversation", needed="a list of {role, content}")
        return messages
    if text_column not in record:
        raise ConfigError(
            f"{place()} has the keys {', '.join(map(str, list(record)[:20])) or 'of nothing'}",
            needed=f"{text_column!r} or {messages_column!r}",
            remedy="name them by data.text_column or data.messages_column",
        )
    text = record[text_column]
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"{place()}: {text_column!r} is a {type(text).__name__}", needed="a text")
    return text or ""
