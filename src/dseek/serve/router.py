"""`Router`: one address for several replicas of a model.

It looks at a request's prompt and at how busy the replicas are, passes the request on, and passes back what comes,
piece by piece. A replica that cannot be reached costs a second try elsewhere; what has begun is never repeated. Keys,
limits and request ids are the doorman's, in front of the router.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from dseek.core.logs import get_logger
from dseek.serve.affinity import Affinity, beginning, block_hashes
from dseek.serve.doorman import Receive, Send
from dseek.serve.errors import ApiError, JsonResponse
from dseek.serve.replica_metrics import merged_metrics
from dseek.serve.replicas import Replica, Replicas

logger = get_logger("dseek.serve")

DROPPED = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"host",
        b"content-length",
        b"authorization",
        b"date",
        b"expect",
    }
)
"""Headers that are not passed on: those of one connection, and the key, which is the router's."""

SUMMED = (
    "running",
    "waiting",
    "num_pages",
    "free_pages",
    "cached_pages",
    "tokens_s",
    "steps",
    "prefill_rows",
    "decode_rows",
    "generated_tokens",
    "saved_tokens",
    "preemptions",
    "drafted_tokens",
    "accepted_tokens",
)
"""Figures of `/v1/dseek/status` that add up over replicas."""


class Router:
    """An ASGI application.

    Args:
        replicas: started with the application, ended with it.
        affinity: chooses among them.
        is_draining: tells whether the server is shutting down.
    """

    def __init__(self, replicas: Replicas, affinity: Affinity, is_draining: Callable[[], bool]) -> None:
        self._replicas = replicas
        self._affinity = affinity
        self._is_draining = is_draining

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request, or start and stop with the server; see the ASGI specification.

        Args:
            scope: the request's line and headers.
            receive: gives the body.
            send: takes the response.
        """
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        path = scope["path"]
        scope["route"] = _Route("proxied" if path.startswith("/v1/") else path if path in _OWN else "proxied")
        if path in _OWN:
            await (await getattr(self, _OWN[path])())(scope, receive, send)
            return
        body = (await receive()).get("body", b"")
        await self._pass_on(scope, body, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        """Start and end the replicas with the server."""
        await receive()
        self._replicas.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._replicas.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _pass_on(self, scope: MutableMapping[str, Any], body: bytes, send: Send) -> None:
        """Give a request to a replica; to another one where the first cannot be reached."""
        hashes = block_hashes(beginning(body)) if scope["method"] == "POST" else []
        tried: set[int] = set()
        while True:
            candidates = {
                replica.number: replica.num_busy for replica in self._replicas.ready() if replica.number not in tried
            }
            if not candidates:
                raise ApiError(
                    503, "no replica is ready; try again later", code="not_ready", headers={"retry-after": "1"}
                )
            replica = self._replicas.all[self._affinity.choose(hashes, candidates)]
            tried.add(replica.number)
            try:
                async with _exchange(replica, scope, body) as response:
                    await _relay(response, send)
                return
            except httpx.ConnectError:
                logger.warning("replica %d cannot be reached", replica.number)
                replica.is_ready = False

    async def _health(self) -> JsonResponse:
        return JsonResponse({"status": "ok", "replicas": len(self._replicas.all)})

    async def _ready(self) -> JsonResponse:
        count = len(self._replicas.ready())
        if self._is_draining() or not count:
            raise ApiError(503, "not ready", code="not_ready", headers={"retry-after": "1"})
        return JsonResponse({"status": "ready", "replicas": count})

    async def _status(self) -> JsonResponse:
        asked = [await _json(replica, "/v1/dseek/status") for replica in self._replicas.ready()]
        found = [status for status in asked if status]
        if not found:
            raise ApiError(503, "no replica is ready", code="not_ready", headers={"retry-after": "1"})
        total = {name: sum(status[name] for status in found) for name in SUMMED}
        replicas = [
            {
                "number": replica.number,
                "ready": replica.is_ready,
                "busy": replica.num_busy,
                "starts": replica.num_starts,
            }
            for replica in self._replicas.all
        ]
        return JsonResponse({**found[0], **total, "replicas": replicas, "prefix_hits": self._affinity.num_hits})

    async def _metrics(self) -> Any:
        texts = {replica.number: await _text(replica, "/metrics") for replica in self._replicas.ready()}
        return merged_metrics(texts, self._replicas.all)


_OWN = {"/health": "_health", "/ready": "_ready", "/v1/dseek/status": "_status", "/metrics": "_metrics"}
"""Paths that the router answers itself, and by what."""


class _Route:
    """Stands for a route in metrics."""

    def __init__(self, path: str) -> None:
        self.path = path


@asynccontextmanager
async def _exchange(replica: Replica, scope: MutableMapping[str, Any], body: bytes) -> AsyncIterator[httpx.Response]:
    """Send a request to a replica and receive the head of its response; leaving early closes the connection."""
    query = scope["query_string"]
    target = scope.get("raw_path", scope["path"].encode()) + (b"?" + query if query else b"")
    headers = [(name, value) for name, value in scope["headers"] if name not in DROPPED and name != b"x-request-id"]
    headers.append((b"x-request-id", scope["state"]["request_id"].encode("ascii")))
    url = replica.client.base_url.copy_with(raw_path=target if target.startswith(b"/") else b"/")
    request = replica.client.build_request(scope["method"], url, headers=headers, content=body)
    replica.num_busy += 1
    try:
        response = await replica.client.send(request, stream=True)
        try:
            yield response
        finally:
            await response.aclose()
    finally:
        replica.num_busy -= 1


async def _relay(response: httpx.Response, send: Send) -> None:
    """Pass a response back, piece by piece."""
    ours = (*DROPPED, b"x-request-id")
    headers = [(name.lower(), value) for name, value in response.headers.raw if name.lower() not in ours]
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    try:
        async for piece in response.aiter_raw():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    except httpx.HTTPError as error:
        logger.error("a replica failed while it answered: %s", error)
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            told = ApiError(502, "the replica failed while it answered", code="replica_failed").body()
            piece = b"data: " + JsonResponse(told).body + b"\n\ndata: [DONE]\n\n"
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _text(replica: Replica, path: str) -> str:
    """Get a text from a replica; empty where it does not answer."""
    try:
        return (await replica.client.get(path, timeout=5.0)).text
    except httpx.HTTPError:
        return ""


async def _json(replica: Replica, path: str) -> dict[str, Any] | None:
    """Get an object from a replica, or None."""
    try:
        response = await replica.client.get(path, timeout=5.0)
        return dict(response.json()) if response.status_code == 200 else None
    except (httpx.HTTPError, ValueError):
        return None
