"""A batch cut into what each rank computes of it.

Long sequences are cut at block boundaries and a rank gets runs of blocks; every rank computes the short ones. A part
has enough rows, and asks for enough rows of logits, that the kernels treat it as they would treat the whole batch:
those for few rows round otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dseek.engine.batch import Batch
from dseek.parallel.sharding import BLOCK_TOKENS, BlockAssignment

MIN_ROWS = BLOCK_TOKENS
"""Least rows of a rank's part of a sequence."""

MANY_LOGIT_ROWS = 16
"""So many rows of logits, or more, are many to every kernel."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks in which the new rows of a sequence lie."""

    first_row: int
    """Row of the batch where the sequence starts."""
    first_position: int
    """Its position."""
    end_position: int
    """Position after the last row's."""

    @property
    def first_block(self) -> int:
        """Block of the first row, which may have begun in an earlier batch."""
        return self.first_position // BLOCK_TOKENS

    @property
    def num_blocks(self) -> int:
        """Blocks that have a row."""
        return -(-self.end_position // BLOCK_TOKENS) - self.first_block

    def rows(self, first: int, num_blocks: int) -> range:
        """Return the rows of a run of blocks.

        Args:
            first: place of its first block among these.
            num_blocks: its length.
        """
        start = (self.first_block + first) * BLOCK_TOKENS
        begin = max(start, self.first_position)
        end = min(start + num_blocks * BLOCK_TOKENS, self.end_position)
        offset = self.first_row - self.first_position
        return range(offset + begin, offset + end)


def blocks_of(batch: Batch, sequence: int) -> Blocks:
    """Find the blocks of one sequence of a batch.

    Args:
        batch: the batch.
        sequence: index of the sequence.
    """
    begin, end = int(batch.row_starts[sequence]), int(batch.row_starts[sequence + 1])
    first_position = int(batch.positions[begin])
    return Blocks(begin, first_position, first_position + end - begin)


def is_even_enough(blocks: Blocks, assignment: BlockAssignment) -> bool:
    """Say whether every rank gets at least `MIN_ROWS` rows.

    Args:
        blocks: of the sequence.
        assignment: their owners.
    """
    return all(sum(len(blocks.rows(block, 1)) for block in owned) >= MIN_ROWS for owned in assignment.blocks)


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank computes of a batch."""

    batch: Batch
    """Its rows, each run of blocks a sequence of its own."""
    logit_rows: np.ndarray
    """int64 [N], which of the whole batch's logits the rank computes, as indices into its `logit_rows`."""
    wanted: np.ndarray
    """int64 [N], where they are among the logits of the part, which may be more."""


def part_of(batch: Batch, assignments: Sequence[BlockAssignment | None], rank: int) -> Part:
    """Cut out what a rank computes.

    Args:
        batch: the whole batch.
        assignments: the owners of each sequence's blocks, or None where every rank computes all of it.
        rank: whose part.
    """
    runs: list[range] = []
    sequences: list[int] = []
    for sequence, assignment in enumerate(assignments):
        blocks = blocks_of(batch, sequence)
        owned = [range(blocks.num_blocks)] if assignment is None else _runs(assignment.blocks[rank])
        runs += [blocks.rows(run.start, len(run)) for run in owned]
        sequences += [sequence] * len(owned)
    rows = np.concatenate([np.arange(run.start, run.stop) for run in runs])

    own = np.isin(batch.logit_rows, rows)
    asked = np.searchsorted(rows, batch.logit_rows[own])
    missing = min(len(batch.logit_rows), MANY_LOGIT_ROWS) - len(asked)
    others = np.setdiff1d(np.arange(min(len(rows), 2 * MANY_LOGIT_ROWS)), asked)[: max(0, missing)]
    logit_rows = np.union1d(asked, others)
    part = Batch(
        batch.token_ids[rows],
        batch.positions[rows],
        np.cumsum([0, *map(len, runs)], dtype=np.int32),
        np.ascontiguousarray(batch.page_tables[sequences]),
        logit_rows.astype(np.int32),
    )
    return Part(part, np.flatnonzero(own), np.searchsorted(logit_rows, asked))


def owned_pages(batch: Batch, assignments: Sequence[BlockAssignment | None], rank: int) -> np.ndarray:
    """List the pages that a rank writes and the others need, int64 [N].

    Args:
        batch: the whole batch.
        assignments: as for `part_of`.
        rank: the rank.
    """
    pages = [np.empty(0, dtype=np.int64)]
    for sequence, assignment in enumerate(assignments):
        if assignment is not None:
            first = blocks_of(batch, sequence).first_block
            pages.append(batch.page_tables[sequence, [first + block for block in assignment.blocks[rank]]])
    return np.concatenate(pages).astype(np.int64)


def _runs(blocks: Sequence[int]) -> list[range]:
    """Join neighbouring blocks to runs."""
    cuts = [0, *(i for i in range(1, len(blocks)) if blocks[i] != blocks[i - 1] + 1), len(blocks)]
    return [range(blocks[a], blocks[b - 1] + 1) for a, b in itertools.pairwise(cuts)]
