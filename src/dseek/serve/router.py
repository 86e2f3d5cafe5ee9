"""`Router`: one address for several replicas of a model.

It passes a request on to the replica that its fleet chooses, by its prompt and by how busy the replicas are, and passes
back what comes, piece by piece. A replica that is lost before its client has seen anything costs another try elsewhere;
after that the client is told. Keys, limits and request ids are the doorman's, in front of the router.
"""

from __future__ import annotations

import json
from collections.abc import Callable, MutableMapping
from typing import Any

from dseek.core.logs import get_logger
from dseek.serve.doorman import Receive, Send
from dseek.serve.errors import ApiError, JsonResponse
from dseek.serve.fleet import DROPPED, Answer, Fleet, Passed, ReplicaLostError
from dseek.serve.replica_metrics import merged_metrics

logger = get_logger("dseek.serve")

MAX_LOST = 3
"""Replicas that may be lost with a request in work before it is given up: it may be what they die of."""

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
        fleet: the replicas; started with the application, ended with it.
        is_draining: tells whether the server is shutting down.
    """

    def __init__(self, fleet: Fleet, is_draining: Callable[[], bool]) -> None:
        self._fleet = fleet
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
        await self._pass_on(Passed.from_scope(scope, body), send)

    async def _live(self, receive: Receive, send: Send) -> None:
        """Start and end the replicas with the server."""
        await receive()
        self._fleet.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._fleet.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _pass_on(self, request: Passed, send: Send) -> None:
        """Give a request to a replica; to another one where that is lost and the client has seen nothing."""
        avoid: set[str] = set()
        num_lost = 0
        while True:
            relay = _Relay(send)
            try:
                async with self._fleet.exchange(request, avoid) as answer:
                    await relay.pass_back(answer)
                return
            except ReplicaLostError as error:
                logger.warning("%s", error)
                if relay.begun:
                    await relay.break_off()
                    return
                avoid.add(error.replica)
                num_lost += error.in_work
            if num_lost >= MAX_LOST:
                raise ApiError(
                    502, f"{num_lost} replicas were lost while they worked on this request", code="replica_failed"
                )

    async def _health(self) -> JsonResponse:
        return JsonResponse({"status": "ok", "replicas": len(self._fleet.figures())})

    async def _ready(self) -> JsonResponse:
        count = self._fleet.num_ready()
        if self._is_draining() or not count:
            raise ApiError(503, "not ready", code="not_ready", headers={"retry-after": "1"})
        return JsonResponse({"status": "ready", "replicas": count})

    async def _status(self) -> JsonResponse:
        found = [json.loads(text) for text in (await self._fleet.ask("/v1/dseek/status")).values()]
        if not found:
            raise ApiError(503, "no replica is ready", code="not_ready", headers={"retry-after": "1"})
        total = {name: sum(status[name] for status in found) for name in SUMMED}
        replicas = [
            {
                "number": int(replica.name),
                "ready": replica.ready,
                "busy": replica.busy,
                "starts": replica.starts,
                **replica.details,
            }
            for replica in self._fleet.figures()
        ]
        return JsonResponse({**found[0], **total, "replicas": replicas, "prefix_hits": self._fleet.num_hits()})

    async def _metrics(self) -> Any:
        texts = {name: text.decode() for name, text in (await self._fleet.ask("/metrics")).items()}
        return merged_metrics(texts, self._fleet.figures())


_OWN = {"/health": "_health", "/ready": "_ready", "/v1/dseek/status": "_status", "/metrics": "_metrics"}
"""Paths that the router answers itself, and by what."""


class _Route:
    """Stands for a route in metrics."""

    def __init__(self, path: str) -> None:
        self.path = path


class _Relay:
    """Passes one response back, and knows whether the client has seen any of it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def pass_back(self, answer: Answer) -> None:
        """Pass a stream back piece by piece, and anything else when it is whole."""
        headers = [(name, value) for name, value in answer.headers if name not in DROPPED]
        start = {"type": "http.response.start", "status": answer.status, "headers": headers}
        if dict(headers).get(b"content-type", b"").startswith(b"text/event-stream"):
            await self._write(start)
            async for piece in answer.pieces():
                await self._write({"type": "http.response.body", "body": piece, "more_body": True})
            body = b""
        else:
            body = b"".join([piece async for piece in answer.pieces()])
            await self._write(start)
        await self._write({"type": "http.response.body", "body": body, "more_body": False})

    async def break_off(self) -> None:
        """End a stream with an event that says why."""
        told = ApiError(502, "the replica failed while it answered", code="replica_failed").body()
        piece = b"data: " + JsonResponse(told).body + b"\n\ndata: [DONE]\n\n"
        await self._write({"type": "http.response.body", "body": piece, "more_body": True})
        await self._write({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, message: dict[str, Any]) -> None:
        self.begun = True
        await self._send(message)
