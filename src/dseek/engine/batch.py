"""`Batch`: the rows of one forward pass, prefill and decode mixed, as flat numpy arrays.

Axes: R rows (tokens computed in this step), S sequences, P pages of the longest sequence, L rows whose logits are
wanted. A sequence that is being prefilled brings many rows, one that is decoding brings one; a runner needs no other
distinction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dseek.engine.request import Request


@dataclass(slots=True)
class Batch:
    """What a runner computes in one call.

    The runner writes the keys and values of every row to the page and slot of its position
    (`page_tables[s, position // page_tokens]`, slot `position % page_tokens`) and then lets each row attend to
    positions 0 .. its own of the same sequence.
    """

    token_ids: np.ndarray
    """int32 [R], checked against the vocabulary before they come here."""
    positions: np.ndarray
    """int32 [R], position of each row in its sequence; contiguous and rising within a sequence."""
    row_starts: np.ndarray
    """int32 [S + 1]; rows of sequence s are `row_starts[s]` to `row_starts[s + 1]`."""
    page_tables: np.ndarray
    """int32 [S, P], page of each block of positions, padded with -1."""
    logit_rows: np.ndarray
    """int32 [L], rising row indices whose logits the caller wants; may be empty."""

    @property
    def num_rows(self) -> int:
        """Tokens computed in this step."""
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        """Sequences that have a row in this step."""
        return len(self.row_starts) - 1


def gather(requests: Sequence[Request]) -> Batch:
    """Collect the scheduled rows of requests.

    Args:
        requests: each with `num_scheduled` rows to compute after its `num_computed`. Where that leaves no token to
            compute, its drafts follow, and logits are asked for its last token and each draft.

    Returns:
        The batch, sequences in the order of the requests.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    row_starts = [0]
    logit_rows: list[int] = []
    for request in requests:
        start, end = request.num_computed, request.num_computed + request.num_scheduled
        if end - start == 1:
            token_ids.append(request.token_ids[start])
            positions.append(start)
        else:
            token_ids.extend(request.token_ids[start:end])
            positions.extend(range(start, end))
        if end == len(request.token_ids):
            logit_rows.append(len(token_ids) - 1)
            if request.drafts:
                logit_rows.extend(range(len(token_ids), len(token_ids) + len(request.drafts)))
                token_ids.extend(request.drafts)
                positions.extend(range(end, end + len(request.drafts)))
        row_starts.append(len(token_ids))
    width = max(len(request.pages) for request in requests)
    page_tables = np.full((len(requests), width), -1, dtype=np.int32)
    for row, request in zip(page_tables, requests, strict=True):
        row[: len(request.pages)] = request.page_table[: len(request.pages)]
    return Batch(
        np.array(token_ids, dtype=np.int32),
        np.array(positions, dtype=np.int32),
        np.array(row_starts, dtype=np.int32),
        page_tables,
        np.array(logit_rows, dtype=np.int32),
    )
