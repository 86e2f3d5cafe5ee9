"""`Corpus`: documents of text, JSONL and parquet files one after the other, from any place that a `Position` names.

Files are read as they are needed, never whole: a text file comes in pieces, JSONL by the line, parquet by row groups.
What is read is checked as somebody else's data: UTF-8, one JSON object a line, sizes within limits; an error names the
file and the line. A position is four numbers, so a training that was stopped goes on at the very same document.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dseek.core.errors import ConfigError
from dseek.train.document_files import DocumentFile, JsonLinesFile, ParquetFile, TextFile

if TYPE_CHECKING:
    from dseek.train.config import DataConfig

_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """A place in the stream of documents."""

    epoch: int = 0
    """Passes over all files that are done."""
    order_idx: int = 0
    """With a shuffled order: documents of the epoch that are done."""
    file_idx: int = 0
    """File of the next piece."""
    offset: int = 0
    """Its byte in a text or JSONL file, its row in a parquet file."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of a long one."""

    content: Any
    """The text (str), or the messages of a conversation (list)."""
    begins: bool
    """The document begins with it."""
    ends: bool
    """The document ends with it."""
    place: str
    """Where it was found, for messages."""
    after: Position | None
    """Position of what follows in this epoch; None where the epoch ends."""


class Corpus:
    """The documents of some files, in their order or shuffled anew in each epoch.

    Args:
        patterns: names of files; `*`, `?` and `[...]` stand for what they do in a shell.
        config: what the files are.
        seed: of the shuffled order.
        shuffle: draw an order for each epoch.

    Raises:
        ConfigError: a file is not there, cannot be read, or is of a kind that needs a package that is missing.
    """

    def __init__(self, patterns: tuple[str, ...], config: DataConfig, *, seed: int = 0, shuffle: bool = False) -> None:
        self.paths = find_files(patterns)
        self.files = [_open(path, config) for path in self.paths]
        self._seed, self._shuffle = seed, shuffle
        self._index: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self._order: tuple[int, np.ndarray] | None = None

    def start(self, epoch: int) -> Position:
        """Give the place where an epoch begins.

        Args:
            epoch: number of the epoch.

        Raises:
            ConfigError: there is no document at all.
        """
        return self._at(epoch, 0) if self._shuffle else Position(epoch=epoch)

    def read(self, position: Position) -> Piece | None:
        """Read what is at a place.

        Args:
            position: from `start`, from `Piece.after`, or a kept one.

        Returns:
            The piece, or None where the epoch has nothing more.

        Raises:
            ConfigError: the file changed under us, or holds what it must not.
        """
        if not 0 <= position.file_idx <= len(self.files):
            raise ConfigError(
                f"the position is in file {position.file_idx + 1}, and there are {len(self.files)}",
                needed="the files that the training was begun with",
            )
        if self._shuffle:
            return self._read_shuffled(position)
        for file_idx in range(position.file_idx, len(self.files)):
            unit = self.files[file_idx].read(position.offset if file_idx == position.file_idx else 0)
            if unit is not None:
                after = Position(epoch=position.epoch, file_idx=file_idx, offset=unit.after)
                return Piece(unit.content, unit.begins, unit.ends, unit.place, after)
        return None

    def _read_shuffled(self, position: Position) -> Piece | None:
        _, files, _ = self._documents()
        if position.order_idx >= len(files):
            return None
        unit = self.files[position.file_idx].read(position.offset)
        if unit is None:
            raise ConfigError(f"{self.paths[position.file_idx]} became shorter while it was read")
        if unit.ends:
            after = self._at(position.epoch, position.order_idx + 1)
        else:
            after = Position(
                epoch=position.epoch, order_idx=position.order_idx, file_idx=position.file_idx, offset=unit.after
            )
        return Piece(unit.content, unit.begins, unit.ends, unit.place, after)

    def _at(self, epoch: int, order_idx: int) -> Position:
        _, files, offsets = self._documents()
        if order_idx >= len(files):
            return Position(epoch=epoch, order_idx=order_idx)
        chosen = int(self._order_of(epoch)[order_idx])
        return Position(epoch=epoch, order_idx=order_idx, file_idx=int(files[chosen]), offset=int(offsets[chosen]))

    def _documents(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Groups, files and offsets of all documents, found once; those of a group are near each other on disk."""
        if self._index is None:
            found = [file.index() for file in self.files]
            offsets = np.concatenate([entries for entries, _ in found])
            files = np.repeat(np.arange(len(found), dtype=np.int64), [len(entries) for entries, _ in found])
            groups, first = [], 0
            for _, own in found:
                groups.append(own + first)
                first += int(own.max()) + 1 if len(own) else 0
            self._index = np.concatenate(groups), files, offsets
            if not len(offsets):
                raise no_documents(self.paths)
        return self._index

    def _order_of(self, epoch: int) -> np.ndarray:
        """The order of an epoch: groups in a drawn order, and within each its documents in a drawn one."""
        if self._order is None or self._order[0] != epoch:
            groups, _, _ = self._documents()
            random = np.random.default_rng([self._seed, epoch])
            drawn = random.permutation(len(groups))
            ranks = random.permutation(int(groups.max()) + 1)
            self._order = epoch, drawn[np.argsort(ranks[groups[drawn]], kind="stable")]
        return self._order[1]


def no_documents(paths: list[Path]) -> ConfigError:
    """Make the error about files without a document.

    Args:
        paths: the files.
    """
    return ConfigError(
        f"there is no text in {', '.join(map(str, paths[:4]))}{' ...' if len(paths) > 4 else ''}",
        needed="at least one document that is not empty",
    )


def find_files(patterns: tuple[str, ...]) -> list[Path]:
    """Find the files that patterns name.

    Args:
        patterns: names; `*`, `?`, `**` and `[...]` stand for what they do in a shell.

    Returns:
        The files, those of a pattern in order of name.

    Raises:
        ConfigError: a pattern names no file.
    """
    paths: list[Path] = []
    for pattern in patterns:
        expanded = str(Path(pattern).expanduser())
        found = [expanded] if Path(expanded).is_file() else sorted(glob.glob(expanded, recursive=True))
        files = [Path(name) for name in found if Path(name).is_file()]
        if not files:
            raise ConfigError(f"no file matches {pattern!r}", needed="text, JSONL or parquet files")
        paths += files
    return paths


def _open(path: Path, config: DataConfig) -> DocumentFile:
    kind = _SUFFIXES.get(path.suffix.lower(), "text") if config.format == "auto" else config.format
    if path.suffix.lower() in (".gz", ".zst", ".xz", ".bz2", ".zip"):
        raise ConfigError(f"{path} is compressed", needed="a plain file", remedy="unpack it first")
    if kind == "jsonl":
        return JsonLinesFile(path, config.text_column, config.messages_column)
    if kind == "parquet":
        return ParquetFile(path, config.text_column, config.messages_column)
    return TextFile(path, config.sample_by)
