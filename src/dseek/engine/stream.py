"""`Stream`: what one request produces, piece by piece, for a thread or an asyncio task to read.

The engine's thread pushes, one reader takes. Pieces that nobody has taken yet are joined, so a slow reader gets fewer
and larger ones and holds nobody up.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from dseek.engine.request import Request

if TYPE_CHECKING:
    from dseek.engine.logprobs import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Delta:
    """What an answer grew by."""

    text: str
    """Text that became final; may lag behind the tokens, and be empty."""
    token_ids: tuple[int, ...]
    """New tokens, the end token included."""
    logprobs: tuple[TokenLogprobs, ...] | None
    """One for each of the tokens where the request asks for them, else None."""
    finish_reason: str | None
    """stop, length or abort in the last piece, else None."""


class Stream:
    """The pieces of one answer; iterate over it, with `for` or `async for`, once.

    Leaving the loop, closing the stream or cancelling the task that reads it aborts the request.

    Args:
        request: filled by the engine's thread.
        abort: called with this object when the reader leaves early.
    """

    def __init__(self, request: Request, abort: Callable[[Stream], None]) -> None:
        self.request = request
        self._abort = abort
        self._arrived = threading.Condition()
        self._fresh: Delta | None = None
        self._ended = False
        self._wake: Callable[[], None] | None = None

    def push(self) -> int:
        """Take what the request has produced since the last call; for the engine's thread.

        Returns:
            How many new tokens there were.
        """
        token_ids, logprobs = self.request.take_tokens()
        text = self.request.take_text()
        with self._arrived:
            if self._ended:
                return len(token_ids)
            delta = Delta(text, token_ids, logprobs, self.request.finish_reason)
            self._fresh = delta if self._fresh is None else _joined(self._fresh, delta)
            self._ended = self.request.finished
            self._arrived.notify_all()
            wake, self._wake = self._wake, None
        if wake is not None:
            wake()
        return len(token_ids)

    def close(self) -> None:
        """Abort the request unless it has ended."""
        if not self._ended:
            self._abort(self)

    async def aclose(self) -> None:
        """Abort the request unless it has ended; does not wait."""
        self.close()

    async def next(self) -> Delta | None:
        """Wait for the next piece, in an asyncio loop.

        Returns:
            The piece, or None after the last.

        Raises:
            DseekError: the request failed.
        """
        while True:
            with self._arrived:
                found = self._take()
                if found is not None or self._ended:
                    return self._checked(found)
                loop = asyncio.get_running_loop()
                woken: asyncio.Future[None] = loop.create_future()
                self._wake = functools.partial(_wake_from_outside, loop, woken)
            await woken

    def __aiter__(self) -> AsyncGenerator[Delta]:
        return self._pieces_async()

    def __iter__(self) -> Generator[Delta]:
        try:
            while True:
                with self._arrived:
                    while self._fresh is None and not self._ended:
                        self._arrived.wait()
                    delta = self._checked(self._take())
                if delta is None:
                    return
                yield delta
        finally:
            self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def _pieces_async(self) -> AsyncGenerator[Delta]:
        try:
            while (delta := await self.next()) is not None:
                yield delta
        finally:
            self.close()

    def _take(self) -> Delta | None:
        """Take what is there; the lock is held."""
        fresh, self._fresh = self._fresh, None
        return fresh

    def _checked(self, delta: Delta | None) -> Delta | None:
        """Raise the request's error in the place of its last piece."""
        if self.request.error is not None and (delta is None or delta.finish_reason is not None):
            raise self.request.error
        return delta


def _joined(first: Delta, second: Delta) -> Delta:
    """Make one piece of two."""
    logprobs = None
    if first.logprobs is not None and second.logprobs is not None:
        logprobs = first.logprobs + second.logprobs
    return Delta(first.text + second.text, first.token_ids + second.token_ids, logprobs, second.finish_reason)


def _wake_from_outside(loop: asyncio.AbstractEventLoop, woken: asyncio.Future[None]) -> None:
    """Complete a future of a loop from another thread; a loop that has been closed has nobody waiting."""

    def complete() -> None:
        if not woken.done():
            woken.set_result(None)

    try:
        loop.call_soon_threadsafe(complete)
    except RuntimeError:
        return
