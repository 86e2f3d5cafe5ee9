"""`LocalFleet`: replicas that are processes of this machine, reached over Unix sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence, Set
from contextlib import asynccontextmanager

import httpx

from dseek.serve.affinity import Affinity
from dseek.serve.errors import ApiError
from dseek.serve.fleet import Headers, Passed, ReplicaFigures, ReplicaLostError
from dseek.serve.replicas import Replica, Replicas

ASK_S = 5.0
"""Time for an answer to `ask`."""


class LocalFleet:
    """A `Fleet`.

    Args:
        replicas: started and ended with the router.
        affinity: chooses among them.
    """

    def __init__(self, replicas: Replicas, affinity: Affinity[int]) -> None:
        self._replicas = replicas
        self._affinity = affinity

    def start(self) -> None:
        """Start all; see `Fleet`."""
        self._replicas.start()

    async def close(self) -> None:
        """End all; see `Fleet`."""
        await self._replicas.close()

    def num_ready(self) -> int:
        """Count those that take requests."""
        return len(self._replicas.ready())

    def num_hits(self) -> int:
        """Count requests that went where their beginning was known."""
        return self._affinity.num_hits

    def figures(self) -> Sequence[ReplicaFigures]:
        """Tell what is known of each."""
        return [
            ReplicaFigures(
                name=str(replica.number),
                ready=replica.is_ready,
                busy=replica.num_busy,
                starts=replica.num_starts,
                details={},
            )
            for replica in self._replicas.all
        ]

    async def ask(self, path: str) -> dict[str, bytes]:
        """Get the same of every replica; see `Fleet`.

        Args:
            path: of a GET.

        Returns:
            The bodies, by the replica's name.
        """
        found: dict[str, bytes] = {}
        for replica in self._replicas.ready():
            try:
                response = await replica.client.get(path, timeout=ASK_S)
            except httpx.HTTPError:
                continue
            if response.status_code == 200:
                found[str(replica.number)] = response.content
        return found

    @asynccontextmanager
    async def exchange(self, request: Passed, avoid: Set[str]) -> AsyncIterator[_Received]:
        """Give a request to a replica; see `Fleet`.

        Args:
            request: what is passed on.
            avoid: names of replicas that were lost with it.

        Yields:
            The response.

        Raises:
            ReplicaLostError: the replica is lost.
            ApiError: none is ready.
        """
        loads = {
            replica.number: replica.num_busy for replica in self._replicas.ready() if str(replica.number) not in avoid
        }
        if not loads:
            raise ApiError(503, "no replica is ready; try again later", code="not_ready", headers={"retry-after": "1"})
        replica = self._replicas.all[self._affinity.choose(request.hashes, loads)]
        name = str(replica.number)
        replica.num_busy += 1
        try:
            try:
                response = await replica.client.send(_request(replica, request), stream=True)
            except httpx.ConnectError:
                replica.is_ready = False
                raise ReplicaLostError(name, in_work=False) from None
            except httpx.HTTPError:
                raise ReplicaLostError(name, in_work=True) from None
            try:
                yield _Received(name, response)
            finally:
                await response.aclose()
        finally:
            replica.num_busy -= 1


class _Received:
    """An `Answer` over httpx."""

    def __init__(self, replica: str, response: httpx.Response) -> None:
        self._replica = replica
        self._response = response

    @property
    def status(self) -> int:
        """Of HTTP."""
        return self._response.status_code

    @property
    def headers(self) -> Headers:
        """Names in lower case."""
        return [(name.lower(), value) for name, value in self._response.headers.raw]

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes."""
        try:
            async for piece in self._response.aiter_raw():
                yield piece
        except httpx.HTTPError:
            raise ReplicaLostError(self._replica, in_work=True) from None


def _request(replica: Replica, passed: Passed) -> httpx.Request:
    """Write a request for httpx."""
    url = replica.client.base_url.copy_with(raw_path=passed.target)
    return replica.client.build_request(passed.method, url, headers=list(passed.headers), content=passed.body)
