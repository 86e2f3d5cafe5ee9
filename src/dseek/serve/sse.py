"""Server-sent events: a response that writes JSON chunks as they come, and `[DONE]` at the end.

An error after the first chunk cannot change the status any more, so it is sent as a chunk with `error`, as vLLM does.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dseek.serve.errors import as_api_error, dumps

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
"""The last one keeps nginx from holding pieces back."""


class EventStream(Response):
    """A streamed response.

    Args:
        chunks: plain values, one an event. The first one is awaited before the status is sent, so that an error before
            it is an error of the request.
    """

    def __init__(self, chunks: AsyncGenerator[dict[str, Any]]) -> None:
        super().__init__()
        self._chunks = chunks
        self._first: dict[str, Any] | None = None

    async def begin(self) -> EventStream:
        """Wait for the first chunk.

        Returns:
            This object, ready to be sent.

        Raises:
            Exception: whatever kept the chunk from being made.
        """
        try:
            self._first = await anext(self._chunks)
        except StopAsyncIteration:
            self._first = None
        except BaseException:
            await self._chunks.aclose()
            raise
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything; see the ASGI specification.

        Args:
            scope: not used.
            receive: not used.
            send: takes the response.
        """
        async with aclosing(self._chunks):
            await send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
            try:
                if self._first is not None:
                    await _event(send, dumps(self._first))
                async for chunk in self._chunks:
                    await _event(send, dumps(chunk))
            except Exception as error:
                await _event(send, dumps(as_api_error(error).body()))
            await _event(send, "[DONE]")
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _event(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode("ascii"), "more_body": True})
