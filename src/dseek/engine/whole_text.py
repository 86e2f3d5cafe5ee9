"""Whole texts through an engine, beside whatever else runs: the logits of every position, and embeddings.

A text is computed in pieces on pages of its own, which it takes at once and gives back at the end; requests that matter
least make room for it where they must. Between two pieces the engine may step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from dseek.core.errors import RequestError
from dseek.engine.batch import Batch
from dseek.engine.finite import first_bad_row, not_finite_error

if TYPE_CHECKING:
    from dseek.engine.engine import Engine

MAX_LOGIT_ROWS = 256
"""Rows of logits asked for at once (256 rows of 49,152 tokens are 50 MB)."""

Pooling = Literal["mean", "last"]


def pieces(
    engine: Engine, token_ids: Sequence[int], compute: Callable[[Batch], np.ndarray]
) -> Iterator[tuple[int, np.ndarray]]:
    """Compute every position of one text.

    Args:
        engine: whose pages and runner are used.
        token_ids: at least one id, at most the context.
        compute: `forward` or `hidden` of its runner.

    Yields:
        Index of the first position and float32 [n, width]; the array is valid until the next piece.

    Raises:
        RequestError: an id is out of range, the text is empty or too long, or other texts hold its pages.
        NotFiniteError: numbers are NaN or infinite.
    """
    ids = np.array(engine.check_token_ids(token_ids), dtype=np.int32)
    if len(ids) > engine.context_tokens:
        raise RequestError(f"the text has {len(ids)} tokens", needed=f"at most the context's {engine.context_tokens}")
    allocator = engine.allocator
    pages = engine.scheduler.take(allocator.pages_for(len(ids)))
    if pages is None:
        raise RequestError(
            f"only {allocator.num_free} cache pages are free",
            needed=f"{allocator.pages_for(len(ids))} for the text",
            remedy="wait until other texts are done",
        )
    page_tables = np.array([pages], dtype=np.int32)
    try:
        start = 0
        while start < len(ids):
            piece = ids[start : start + min(MAX_LOGIT_ROWS, engine.free_rows)]
            positions = np.arange(start, start + len(piece), dtype=np.int32)
            row_starts = np.array([0, len(piece)], dtype=np.int32)
            rows = compute(Batch(piece, positions, row_starts, page_tables, np.arange(len(piece), dtype=np.int32)))
            bad_row = first_bad_row(rows)
            if bad_row is not None:
                raise not_finite_error(ids[: start + bad_row + 1].tolist(), engine.traced_model)
            yield start, rows
            start += len(piece)
    finally:
        allocator.release(pages)


def embedding(
    engine: Engine, token_ids: Sequence[int], pooling: Pooling, normalise: bool
) -> Generator[None, None, np.ndarray]:
    """Embed a text.

    Args:
        engine: whose runner gives hidden states.
        token_ids: T ids, at most the context.
        pooling: mean of all positions' last hidden states (after the final norm), or that of the last position.
        normalise: divide by the length.

    Yields:
        Nothing, between two pieces.

    Returns:
        float32 [D], as the generator's return value.

    Raises:
        RequestError: another pooling, or see `pieces`.
        NotFiniteError: numbers are NaN or infinite.
    """
    if pooling not in ("mean", "last"):
        raise RequestError(f"pooling is {pooling!r}", needed="mean or last")
    total = np.zeros(0)
    for start, rows in pieces(engine, token_ids, engine.runner.hidden):
        if pooling == "last":
            total = rows[-1].astype(np.float64)
        else:
            total = rows.sum(axis=0, dtype=np.float64) + (total if start else 0.0)
        yield
    if pooling == "mean":
        total /= len(token_ids)
    if normalise:
        total /= max(float(np.linalg.norm(total)), 1e-12)
    return total.astype(np.float32)
