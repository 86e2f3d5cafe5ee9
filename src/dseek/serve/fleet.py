"""`Fleet`: the replicas behind a router, however they are reached: processes of this machine, or actors on Ray.

The router needs little of them: give one a request and read what it answers, ask all of them something, and know which
ones take work. A replica that is lost raises `ReplicaLostError`; whether the request may be sent again is the router's
to say, since only it knows what its client has seen.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, MutableMapping, Sequence, Set
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from dseek.serve.affinity import beginning, block_hashes

Headers = Sequence[tuple[bytes, bytes]]

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
        b"x-request-id",
    }
)
"""Headers that are not passed on: those of one connection, the key, which is the router's, and the id it sets."""


class ReplicaLostError(Exception):
    """A replica ended, or cannot be reached, before it had answered.

    Args:
        replica: its name.
        in_work: it had been given the request.
    """

    def __init__(self, replica: str, *, in_work: bool) -> None:
        super().__init__(f"replica {replica} was lost" if in_work else f"replica {replica} cannot be reached")
        self.replica = replica
        self.in_work = in_work


@dataclass(frozen=True, kw_only=True, slots=True)
class Passed:
    """A request as it is passed on."""

    method: str
    """Of HTTP."""
    target: bytes
    """Path and query."""
    headers: Headers
    """What the client sent, without `DROPPED`, and the request's id."""
    body: bytes
    """The whole body."""
    hashes: Sequence[bytes]
    """Of the prompt's beginning, where there is one."""

    @classmethod
    def from_scope(cls, scope: MutableMapping[str, Any], body: bytes) -> Passed:
        """Make one of what a server received.

        Args:
            scope: the request's line and headers, as ASGI has them, with an id in its state.
            body: the whole body.
        """
        query = scope["query_string"]
        target = scope.get("raw_path") or scope["path"].encode()
        headers = [(name, value) for name, value in scope["headers"] if name not in DROPPED]
        return cls(
            method=scope["method"],
            target=(target if target.startswith(b"/") else b"/") + (b"?" + query if query else b""),
            headers=[*headers, (b"x-request-id", scope["state"]["request_id"].encode("ascii"))],
            body=body,
            hashes=block_hashes(beginning(body)) if scope["method"] == "POST" else [],
        )


class Answer(Protocol):
    """A response as it comes back."""

    @property
    def status(self) -> int:
        """Of HTTP."""

    @property
    def headers(self) -> Headers:
        """Names in lower case."""

    def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body; raises `ReplicaLostError` where it breaks off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaFigures:
    """What is known of one replica."""

    name: str
    """Its number, from 0; the one that takes its place has it too."""
    ready: bool
    """It takes requests."""
    busy: int
    """Requests that it has in work."""
    starts: int
    """How often it was started."""
    details: Mapping[str, Any]
    """Where it runs, for `/v1/dseek/status`."""


class Fleet(Protocol):
    """All replicas. Called in the event loop of the router only."""

    def start(self) -> None:
        """Start, or begin to watch."""

    async def close(self) -> None:
        """End all that was started."""

    def num_ready(self) -> int:
        """Count the replicas that take requests."""

    def num_hits(self) -> int:
        """Count the requests that went where their beginning was known."""

    def figures(self) -> Sequence[ReplicaFigures]:
        """Tell what is known of each replica."""

    async def ask(self, path: str) -> dict[str, bytes]:
        """Get the same of every replica that is ready.

        Args:
            path: of a GET.

        Returns:
            The bodies of what was answered with 200, by the replica's name.
        """

    def exchange(self, request: Passed, avoid: Set[str]) -> AbstractAsyncContextManager[Answer]:
        """Give a request to a replica; leaving the context early cancels it there.

        Args:
            request: what is passed on.
            avoid: names of replicas that were lost with it.

        Returns:
            Enters when the response has begun, with it.

        Raises:
            ReplicaLostError: the replica is lost; before or after the response has begun.
            ApiError: none is ready.
        """
