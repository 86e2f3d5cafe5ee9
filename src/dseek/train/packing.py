"""`PackedRows`: rows of exactly T tokens from a stream of documents, from any place that a `RowState` names.

Nothing but positions is kept between rows: the state says where the document lies that the next row begins with, and
how many of its tokens are used up. Going on reads that document again and encodes it again, so a kept state is five
numbers whatever the documents' length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from dseek.core.logs import get_logger
from dseek.train.documents import Corpus, Position, no_documents
from dseek.train.encoding import IGNORED, Encoded, Encoder

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowState:
    """Where the next row begins."""

    position: Position = field(default_factory=Position)
    """The piece it begins with."""
    used_tokens: int = 0
    """Tokens of that piece that earlier rows hold."""


@dataclass(frozen=True, slots=True)
class Row:
    """T tokens."""

    token_ids: list[int]
    """Ids."""
    labels: list[int]
    """What is to be predicted at the position before: the id itself, or `IGNORED`."""
    documents: list[int]
    """Number of the document in its row; padding counts as one more."""
    after: RowState
    """Where the next row begins."""

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted; the first of a row never is."""
        return sum(label != IGNORED for label in self.labels[1:])


class PackedRows:
    """Cuts a stream of documents into rows.

    Args:
        corpus: the documents.
        encoder: encodes them.
        max_length: tokens of a row, T.
        packing: auto, wrapped or whole (see `DataConfig.packing`).
        separate: documents are learned apart, so the first token of each is not predicted.
    """

    def __init__(self, corpus: Corpus, encoder: Encoder, *, max_length: int, packing: str, separate: bool) -> None:
        self._corpus, self._encoder = corpus, encoder
        self._max_length, self._packing, self._separate = max_length, packing, separate
        self._warned = False

    def start(self, epoch: int = 0) -> RowState:
        """Give the state at the beginning of an epoch.

        Args:
            epoch: its number.
        """
        return RowState(position=self._corpus.start(epoch))

    def rows(self, state: RowState, *, repeat: bool) -> Iterator[Row]:
        """Give rows from a place on.

        Args:
            state: where to begin.
            repeat: begin the next epoch when one ends, without end; else the last row is filled up with padding.

        Yields:
            Rows.

        Raises:
            ConfigError: a document is not what it should be, or there is none at all.
        """
        row = _Filling(self._max_length, self._encoder.pad_id)
        position, used = state.position, state.used_tokens
        found_any = used > 0
        while True:
            piece = self._corpus.read(position)
            if piece is None:
                if not found_any and repeat:
                    raise no_documents(self._corpus.paths)
                if not repeat:
                    if not row.is_empty:
                        yield row.close(RowState(position=position))
                    return
                position, used, found_any = self._corpus.start(position.epoch + 1), 0, False
                continue
            encoded = self._encoder.encode(piece)
            found_any = found_any or bool(encoded.token_ids)
            new_document = piece.begins and used == 0
            if self._is_whole(encoded):
                encoded = self._shortened(encoded, piece.place)
                if len(encoded.token_ids) > row.room and not row.is_empty:
                    yield row.close(RowState(position=position))
                    row = _Filling(self._max_length, self._encoder.pad_id)
            assert piece.after is not None
            while used < len(encoded.token_ids):
                used += row.take(encoded, used, begins=new_document and self._separate)
                new_document = False
                if not row.room:
                    done = used == len(encoded.token_ids)
                    yield row.close(
                        RowState(position=piece.after) if done else RowState(position=position, used_tokens=used)
                    )
                    row = _Filling(self._max_length, self._encoder.pad_id)
            position, used = piece.after, 0

    def _is_whole(self, encoded: Encoded) -> bool:
        return self._packing == "whole" or (self._packing == "auto" and encoded.is_conversation)

    def _shortened(self, encoded: Encoded, place: str) -> Encoded:
        if len(encoded.token_ids) <= self._max_length:
            return encoded
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s has %d tokens: it and other documents longer than data.max_length (%d) lose their ends",
                place,
                len(encoded.token_ids),
                self._max_length,
            )
        kept = self._max_length
        return Encoded(encoded.token_ids[:kept], encoded.labels[:kept], encoded.is_conversation)


class _Filling:
    """A row that is being filled."""

    def __init__(self, max_length: int, pad_id: int) -> None:
        self._max_length, self._pad_id = max_length, pad_id
        self.token_ids: list[int] = []
        self.labels: list[int] = []
        self.documents: list[int] = []

    @property
    def is_empty(self) -> bool:
        return not self.token_ids

    @property
    def room(self) -> int:
        return self._max_length - len(self.token_ids)

    def take(self, encoded: Encoded, used: int, *, begins: bool) -> int:
        """Take what there is room for; says how much that was."""
        taken = min(self.room, len(encoded.token_ids) - used)
        labels = encoded.labels[used : used + taken]
        if begins:
            labels[0] = IGNORED
        document = self.documents[-1] + begins if self.documents else 0
        self.token_ids += encoded.token_ids[used : used + taken]
        self.labels += labels
        self.documents += [document] * taken
        return taken

    def close(self, after: RowState) -> Row:
        """Fill the rest with padding."""
        if self.room:
            document = self.documents[-1] + 1
            padding = self.room
            self.token_ids += [self._pad_id] * padding
            self.labels += [IGNORED] * padding
            self.documents += [document] * padding
        return Row(self.token_ids, self.labels, self.documents, after)
