"""Log-probabilities of a prompt's own tokens, for `echo` with `logprobs` (what lm-evaluation-harness asks for).

The text is computed piece by piece on the engine's thread, so answers that run go on between two pieces. Its pages are
taken for the time; where none are free, it waits for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dseek.core.errors import RequestError
from dseek.engine.logprobs import TokenLogprobs, token_logprobs
from dseek.serve.errors import ApiError
from dseek.serve.service import Service

if TYPE_CHECKING:
    from dseek.engine.engine import Engine

RETRY_S = 0.05
"""Time between two attempts to get pages."""


async def prompt_logprobs(service: Service, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs | int]:
    """Score a prompt.

    Args:
        service: the model.
        token_ids: the prompt, at least one id.
        num_top: likeliest tokens to list beside each.

    Returns:
        One entry a token; the first one is its bare id, since nothing predicts it.

    Raises:
        RequestError: an id is out of range, or the text is too long for the cache.
        TimeoutError: no pages were free in time.
    """
    entries: list[TokenLogprobs | int] = [token_ids[0]]
    if len(token_ids) == 1:
        return entries
    if max(token_ids) >= service.llm.shape.vocab_size:
        raise ApiError(400, f"a token id is out of range; needed: below {service.llm.shape.vocab_size}", param="prompt")
    pieces = _Pieces(token_ids, num_top)
    try:
        async with asyncio.timeout(service.config.request_timeout_s):
            while (found := await _next(service, pieces)) is not None:
                entries.extend(found)
    finally:
        # The pages go back on the engine's thread, even where this task was cancelled.
        service.engine.call(pieces.close)
    return entries


async def _next(service: Service, pieces: _Pieces) -> list[TokenLogprobs] | None:
    """Compute the next piece; wait while the first one finds no pages."""
    while True:
        try:
            return await service.on_engine(pieces.next)
        except RequestError:
            stats = service.engine.stats()
            if pieces.begun or not (stats.running or stats.waiting):
                raise
        await asyncio.sleep(RETRY_S)


class _Pieces:
    """The scores of one text; used on the engine's thread."""

    def __init__(self, token_ids: Sequence[int], num_top: int) -> None:
        self._token_ids = list(token_ids)
        self._num_top = num_top
        self._logits: Iterator[tuple[int, np.ndarray]] | None = None
        self.begun = False

    def next(self, engine: Engine) -> list[TokenLogprobs] | None:
        if self._logits is None:
            self._logits = engine.logits(self._token_ids[:-1])
        try:
            start, logits_TV = next(self._logits)
        except StopIteration:
            return None
        except BaseException:
            self._logits = None
            raise
        self.begun = True
        targets = self._token_ids[start + 1 : start + 1 + len(logits_TV)]
        return [token_logprobs(row, target, self._num_top) for row, target in zip(logits_TV, targets, strict=True)]

    def close(self, engine: Engine) -> None:
        logits, self._logits = self._logits, None
        if logits is not None:
            logits.close()  # type: ignore[attr-defined]
