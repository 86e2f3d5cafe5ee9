"""`ModelReplica`: one model with its whole application, as an actor of a Ray Serve deployment.

A request comes as plain data and goes through the application as it would behind a socket. What the application sends
comes back as it is sent; pieces that are ready together go together, since each costs a message.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray import serve

from dseek.serve.app import create_app
from dseek.serve.doorman import Message
from dseek.serve.fleet import Passed
from dseek.serve.service import Service


class ModelReplica:
    """What Ray Serve makes one of for each replica; no request is given to it before its constructor has ended.

    Args:
        make_service: loads the model, on this replica's node.
    """

    def __init__(self, make_service: Callable[[], Service]) -> None:
        context = serve.get_replica_context()
        self._number = int(context.rank.rank)
        self._id = context.replica_tag
        self._node = ray.get_runtime_context().get_node_id()
        self._service = make_service()
        self._app = create_app(self._service)
        # Ray Serve may call this inside an event loop, in which nothing could be waited for.
        with ThreadPoolExecutor(1) as beside:
            beside.submit(asyncio.run, self._service.warm_up()).result()

    async def answer(self, request: Passed, hashes: Sequence[bytes] = ()) -> AsyncIterator[Any]:
        """Answer one request; cancelling it ends what is being done for it.

        Args:
            request: what was asked.
            hashes: for the request router alone.

        Yields:
            First the replica's number, the status and the headers; then pieces of the body.
        """
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        answering = asyncio.create_task(self._run(request, sent))
        try:
            start = await sent.get()
            if start is None:
                await answering  # raises what went wrong
                return
            yield self._number, start["status"], list(start["headers"])
            while (message := await sent.get()) is not None:
                piece = message.get("body", b"")
                while not sent.empty() and (further := sent.get_nowait()) is not None:
                    piece += further.get("body", b"")
                    message = further
                if piece:
                    yield piece
                if not message.get("more_body", False):
                    return
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    async def get(self, path: str) -> tuple[int, int, bytes]:
        """Answer a GET as a whole.

        Args:
            path: of the request.

        Returns:
            The replica's number, the status and the body.
        """
        request = Passed(method="GET", target=path.encode(), headers=[], body=b"", hashes=[])
        pieces = self.answer(request)
        number, status, _ = await anext(pieces)
        return number, status, b"".join([piece async for piece in pieces])

    async def describe(self) -> dict[str, Any]:
        """Tell who this is and what it has to do."""
        return {
            "number": self._number,
            "id": self._id,
            "busy": self._app.num_busy,
            "node": f"{socket.gethostname()}/{self._node[:8]}",
            "pid": os.getpid(),
            "threads": self._service.llm.plan.num_threads,
        }

    async def check_health(self) -> None:
        """Raise where the engine has stopped; Ray Serve then replaces the replica.

        Raises:
            RuntimeError: it has.
        """
        error = self._service.engine.stats().error
        if error is not None:
            raise RuntimeError(error)

    async def _run(self, request: Passed, sent: asyncio.Queue[Message | None]) -> None:
        """Run the application on a request; None in `sent` says that nothing more comes."""
        path, _, query = request.target.partition(b"?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": "http",
            "path": _unquoted(path),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": [*request.headers, (b"host", b"localhost")],
            "client": None,
            "server": None,
        }
        asked: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

        async def receive() -> Message:
            if asked:
                return asked.pop()
            await asyncio.Event().wait()  # who leaves cancels the task
            raise AssertionError

        async def send(message: Message) -> None:
            sent.put_nowait(message)

        try:
            await self._app(scope, receive, send)
        finally:
            sent.put_nowait(None)


def _unquoted(path: bytes) -> str:
    """A path as applications see it."""
    from urllib.parse import unquote_to_bytes

    return unquote_to_bytes(path).decode("utf-8", "replace")
