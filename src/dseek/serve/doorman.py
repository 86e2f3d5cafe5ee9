"""`Doorman`: what every request passes before and after the application: id, host, key, place, body, time, log.

A plain ASGI middleware, since it has to see a request before anything reads its body: the body is counted while it
arrives, and a client that leaves cancels what is being done for it, streamed or not. Not known here: what a request
asks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from dseek.core.logs import get_logger
from dseek.serve import json_logs
from dseek.serve.auth import KeyRing
from dseek.serve.config import LOOPBACK_HOSTS, ServeConfig
from dseek.serve.errors import ApiError, as_api_error
from dseek.serve.metrics import Metrics

logger = get_logger("dseek.serve")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/ready", "/"})
"""Paths that need no key."""

OPEN_PREFIX = "/page/"
"""Files of the web page, which hold nothing secret."""

UNCOUNTED = frozenset({"/health", "/ready", "/metrics", "/"})
"""Paths that take no place among the concurrent requests, so that a full server still answers them."""

CLIENT_LEFT = 499
"""Status in logs and metrics of a request whose client went away (nginx's number; it is never sent)."""

SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        (
            b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
            b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
    ),
)


class Doorman:
    """Wraps an application.

    Args:
        app: the application.
        config: limits and keys.
        metrics: counts requests.
        draining: tells whether the server is shutting down.
    """

    def __init__(
        self, app: Application, config: ServeConfig, metrics: Metrics, draining: Callable[[], bool] = lambda: False
    ) -> None:
        self._app = app
        self._config = config
        self._metrics = metrics
        self._keys = KeyRing(config.api_key_hashes)
        self._draining = draining
        self._num_busy = 0

    @property
    def num_busy(self) -> int:
        """Requests that hold a place."""
        return self._num_busy

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request; see the ASGI specification.

        Args:
            scope: the request's line and headers.
            receive: gives the body.
            send: takes the response.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Passing(scope, send)
        token = json_logs.request_id.set(request.id)
        self._metrics.request_began()
        takes_place = request.path not in UNCOUNTED and not request.path.startswith(OPEN_PREFIX)
        counted = False
        try:
            self._check(request)
            if takes_place:
                self._take_place()
                counted = True
            body = await self._read_body(scope, receive)
            await self._run(request, body, receive)
        except _ClientLeftError:
            request.status = CLIENT_LEFT
        except Exception as error:
            await request.answer(as_api_error(error))
        finally:
            self._num_busy -= counted
            self._metrics.request_ended(request.route, request.status)
            if request.path not in ("/health", "/ready", "/metrics"):
                logger.info("request", extra={"fields": request.record()})
            json_logs.request_id.reset(token)

    def _check(self, request: _Passing) -> None:
        """Refuse what can be refused before the body is read."""
        allowed = self._config.allowed_hosts or (tuple(LOOPBACK_HOSTS) if self._config.loopback else ())
        if allowed and self._config.uds is None and request.host not in allowed:
            raise ApiError(
                403, "this Host is not served here; --allow-host names those that are", code="host_not_allowed"
            )
        if request.path not in OPEN_PATHS and not request.path.startswith(OPEN_PREFIX):
            if not self._keys.admits(request.header(b"authorization")):
                raise ApiError(
                    401,
                    "no API key, or a wrong one; send it as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
            if self._draining() and request.path != "/metrics":
                raise ApiError(
                    503, "the server is shutting down", code="shutting_down", headers={"connection": "close"}
                )

    def _take_place(self) -> None:
        """Take a place among the concurrent requests."""
        if self._num_busy >= self._config.max_concurrent:
            raise ApiError(
                429,
                f"{self._num_busy} requests are in work, as many as the server allows; try again later",
                code="rate_limit_exceeded",
                headers={"retry-after": "1"},
            )
        self._num_busy += 1

    async def _read_body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        """Read a body, counting; whoever sends too much or too slowly is refused."""
        limit = self._config.max_body_bytes
        too_long = ApiError(
            413, f"the body is longer than {limit} bytes", code="body_too_large", headers={"connection": "close"}
        )
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
            raise too_long
        pieces, size = [], 0
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientLeftError
                    piece = message.get("body", b"")
                    size += len(piece)
                    if size > limit:
                        raise too_long
                    pieces.append(piece)
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            raise ApiError(
                408, "the body did not arrive in time", code="body_timeout", headers={"connection": "close"}
            ) from None

    async def _run(self, request: _Passing, body: bytes, receive: Receive) -> None:
        """Let the application answer; cancel it when the client leaves."""
        left = asyncio.Event()
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        answering = asyncio.ensure_future(self._app(request.scope, replay, request.send))
        watching = asyncio.ensure_future(watch())
        try:
            await asyncio.wait((answering, watching), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done() and not request.complete:
                request.status = CLIENT_LEFT
                left.set()
                answering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answering
        finally:
            for task in (answering, watching):
                task.cancel()
            await asyncio.gather(answering, watching, return_exceptions=True)


class _ClientLeftError(Exception):
    """The client went away before its body was whole."""


class _Passing:
    """One request on its way: its id, and what has been answered so far."""

    def __init__(self, scope: MutableMapping[str, Any], send: Send) -> None:
        self.scope = scope
        self._send = send
        self._headers = dict(scope["headers"])
        self.id = json_logs.clean_request_id(self.header(b"x-request-id"))
        self.path: str = scope["path"]
        self.status = CLIENT_LEFT
        self.complete = False
        self._started = False
        self._began_s = time.perf_counter()
        scope.setdefault("state", {})["arrival_s"] = self._began_s
        scope["state"]["request_id"] = self.id

    def header(self, name: bytes) -> str | None:
        """A header's value, or None."""
        value = self._headers.get(name)
        return None if value is None else value.decode("latin-1")

    @property
    def host(self) -> str:
        """The Host header without its port and brackets."""
        host = (self.header(b"host") or "").lower()
        if host.startswith("["):
            return host[1:].partition("]")[0]
        return host.partition(":")[0]

    @property
    def route(self) -> str:
        """Pattern of the route that answered; unknown where none did."""
        route = self.scope.get("route")
        return str(getattr(route, "path", "unknown"))

    async def send(self, message: Message) -> None:
        """Pass a message of the response on, with the headers that every response has."""
        if message["type"] == "http.response.start":
            self._started = True
            self.status = message["status"]
            names = {name.lower() for name, _ in message["headers"]}
            extra = [(name, value) for name, value in SECURITY_HEADERS if name not in names]
            message["headers"] = [*message["headers"], *extra, (b"x-request-id", self.id.encode("ascii"))]
        elif not message.get("more_body", False):
            self.complete = True
        await self._send(message)

    async def answer(self, error: ApiError) -> None:
        """Answer with an error, if nothing has been answered yet."""
        if not self._started:
            await error.response()(self.scope, _nothing, self.send)

    def record(self) -> dict[str, Any]:
        """What the log says of the request."""
        client = self.scope.get("client")
        return {
            "method": self.scope["method"],
            "path": self.path[:200],
            "status": self.status,
            "seconds": round(time.perf_counter() - self._began_s, 4),
            "client": client[0] if client else None,
        }


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
