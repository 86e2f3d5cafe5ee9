"""`StepData`: one rank's batches of one step of the optimiser, the next step's made ready while this one computes.

Rows have numbers in one global order that no number of ranks changes: batch a of rank r in step s holds the rows
((s A + a) W + r) B to that plus B - 1, for A batches, W ranks and B rows. So every number of ranks learns from the same
rows in the same step, and a state kept by one serves another. Each rank reads and encodes the whole stream and keeps
its own rows; the encoder is some hundred times quicker than a step, so that only very many ranks would notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from dseek.train.encoding import IGNORED
from dseek.train.packing import PackedRows, Row, RowState


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows."""

    token_ids: torch.Tensor
    """int64 [B, T]."""
    labels: torch.Tensor
    """int64 [B, T]; `IGNORED` where nothing is predicted."""
    documents: torch.Tensor | None
    """int64 [B, T], the document each token belongs to; None where attention sees the whole row."""
    num_labels: int
    """Tokens that are predicted."""


@dataclass(frozen=True, slots=True)
class StepBatches:
    """What one rank computes in one step."""

    batches: list[Batch]
    """In order."""
    num_tokens: int
    """Tokens of this rank's rows."""
    num_labels: int
    """Predicted ones among them."""
    after: RowState
    """Where the next step's rows begin."""


class StepData:
    """Rows, batch by batch.

    Args:
        rows: the stream.
        state: where to begin.
        batch_size: rows of a batch, B.
        num_batches: batches of a step, A.
        rank: this process.
        world_size: processes, W.
        separate: tell documents apart.
    """

    def __init__(
        self,
        rows: PackedRows,
        state: RowState,
        *,
        batch_size: int,
        num_batches: int,
        rank: int,
        world_size: int,
        separate: bool,
    ) -> None:
        self._rows = rows.rows(state, repeat=True)
        self._batch_size, self._num_batches = batch_size, num_batches
        self._rank, self._world_size, self._separate = rank, world_size, separate
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dseek-data")
        self._next: Future[StepBatches] | None = None

    def next(self) -> StepBatches:
        """Give the batches of the next step.

        Raises:
            ConfigError: a document is not what it should be.
        """
        ready = self._next or self._worker.submit(self._read)
        self._next = None
        step = ready.result()
        self._next = self._worker.submit(self._read)
        return step

    def close(self) -> None:
        """Stop reading ahead."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _read(self) -> StepBatches:
        batches = []
        for _ in range(self._num_batches):
            for rank in range(self._world_size):
                rows = [next(self._rows) for _ in range(self._batch_size)]
                after = rows[-1].after
                if rank == self._rank:
                    batches.append(make_batch(rows, separate=self._separate))
        num_tokens = sum(batch.token_ids.numel() for batch in batches)
        return StepBatches(batches, num_tokens, sum(batch.num_labels for batch in batches), after)


def make_batch(rows: list[Row], *, separate: bool) -> Batch:
    """Put rows together.

    Args:
        rows: at least one, all of one length.
        separate: tell documents apart, where a row has several.
    """
    several = separate and any(_has_several(row) for row in rows)
    return Batch(
        torch.tensor([row.token_ids for row in rows]),
        torch.tensor([row.labels for row in rows]),
        torch.tensor([row.documents for row in rows]) if several else None,
        sum(row.num_labels for row in rows),
    )


def _has_several(row: Row) -> bool:
    """Whether documents of a row must not see each other; what follows the first one may, if nothing of it is learned.

    So a row of one document and padding is one text to attention, which looks back alone.
    """
    if row.documents[-1] != 1:
        return row.documents[-1] > 1
    return any(label != IGNORED for label in row.labels[row.documents.index(1) :])


def evaluation_batches(
    rows: PackedRows, *, batch_size: int, rank: int, world_size: int, separate: bool
) -> Iterator[Batch]:
    """Give this rank's batches of one pass over all rows; every rank gets as many, some of padding alone.

    Args:
        rows: the stream.
        batch_size: rows of a batch.
        rank: this process.
        world_size: processes.
        separate: tell documents apart.

    Yields:
        Batches.
    """
    waiting: list[Row] = []
    for row in rows.rows(rows.start(), repeat=False):
        waiting.append(row)
        if len(waiting) == batch_size * world_size:
            yield make_batch(waiting[rank * batch_size :][:batch_size], separate=separate)
            waiting = []
    if waiting:
        own = waiting[rank::world_size] or [_without_labels(waiting[0])]
        yield make_batch(own, separate=separate)


def _without_labels(row: Row) -> Row:
    return Row(row.token_ids, [IGNORED] * len(row.labels), row.documents, row.after)
