"""`RayFleet`: replicas that are actors of a Ray Serve deployment, reached through its handle.

Ray Serve replaces a replica that dies and gives requests to those that live, chosen by `AffinityRequestRouter`. This
object says which ones live, and turns what Ray raises into what the router understands.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence, Set
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException

from dseek.core.logs import get_logger
from dseek.serve.errors import ApiError
from dseek.serve.fleet import Headers, Passed, ReplicaFigures, ReplicaLostError
from dseek.serve.on_ray.request_router import AffinityRequestRouter

logger = get_logger("dseek.serve")

WATCH_S = 0.5
"""Time between two questions to all replicas who they are."""

ASK_S = 5.0
"""Time for their answers."""


class RayFleet:
    """A `Fleet`.

    Args:
        handle: of the deployment.
        count: replicas that there should be.
        timeout_s: longest time until a response begins, including the wait for a replica.
        on_close: called at the end, beside the event loop.
    """

    def __init__(
        self, handle: Any, *, count: int, timeout_s: float, on_close: Callable[[], None] = lambda: None
    ) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)
        self._timeout_s = timeout_s
        self._on_close = on_close
        self._told: dict[int, dict[str, Any]] = {}
        self._ids: dict[int, set[str]] = {number: set() for number in range(count)}
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch the replicas; see `Fleet`."""
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """End; see `Fleet`."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await asyncio.to_thread(self._on_close)

    def num_ready(self) -> int:
        """Count those that answered the last question."""
        return len(self._told)

    def num_hits(self) -> int:
        """Count requests that went where their beginning was known."""
        return AffinityRequestRouter.num_hits

    def figures(self) -> Sequence[ReplicaFigures]:
        """Tell what is known of each."""
        found = []
        for number, ids in sorted(self._ids.items()):
            told = self._told.get(number, {})
            found.append(
                ReplicaFigures(
                    name=str(number),
                    ready=number in self._told,
                    busy=told.get("busy", 0),
                    starts=len(ids),
                    details={name: told.get(name) for name in ("id", "node", "pid", "threads")},
                )
            )
        return found

    async def ask(self, path: str) -> dict[str, bytes]:
        """Get the same of every replica; see `Fleet`.

        Args:
            path: of a GET.

        Returns:
            The bodies, by the replica's name.
        """
        return {str(number): body for number, status, body in await self._all("get", path) if status == 200}

    @asynccontextmanager
    async def exchange(self, request: Passed, avoid: Set[str]) -> AsyncIterator[_Received]:
        """Give a request to a replica; see `Fleet`.

        Args:
            request: what is passed on.
            avoid: not looked at: Ray Serve gives nothing to a replica that it knows to be dead.

        Yields:
            The response.

        Raises:
            ReplicaLostError: the replica is lost.
            ApiError: none is ready. A request that was lost with one waits for another.
        """
        if not self._told and not avoid:
            raise ApiError(503, "no replica is ready; try again later", code="not_ready", headers={"retry-after": "1"})
        response = self._streaming.answer.remote(request, hashes=request.hashes)
        try:
            with _translated("(chosen by Ray Serve)"):
                async with asyncio.timeout(self._timeout_s):
                    number, status, headers = await anext(response)
            yield _Received(str(number), status, headers, response)
        finally:
            response.cancel()

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every replica; what fails is left out."""
        try:
            response = self._handle.broadcast(method, *arguments)
            answers = await response.results_async(timeout_s=ASK_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("the replicas cannot be asked: %s", error)
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def _watch(self) -> None:
        """Keep what is known of the replicas up to date."""
        while True:
            told = {int(answer["number"]): answer for answer in await self._all("describe")}
            for number, answer in told.items():
                if answer["id"] not in self._ids.setdefault(number, set()):
                    self._ids[number].add(answer["id"])
                    logger.info("replica %d is ready (process %d on %s)", number, answer["pid"], answer["node"])
            for number in self._told.keys() - told.keys():
                logger.error("replica %d is lost; Ray Serve replaces it", number)
            self._told = told
            await asyncio.sleep(WATCH_S)


class _Received:
    """An `Answer` over a deployment handle."""

    def __init__(self, replica: str, status: int, headers: Headers, response: Any) -> None:
        self._replica = replica
        self.status = status
        self.headers = headers
        self._response = response

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes."""
        with _translated(self._replica):
            async for piece in self._response:
                yield piece


@contextmanager
def _translated(replica: str) -> Iterator[None]:
    """Turn what Ray raises where an actor has died, or its node cannot be reached, into `ReplicaLostError`."""
    try:
        yield
    except RayActorError:
        raise ReplicaLostError(replica, in_work=True) from None
