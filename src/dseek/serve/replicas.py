"""`Replicas`: processes that serve the same model behind a router, watched and started anew when they die.

Each listens on a Unix socket in a folder that only this user may enter. A replica that fails is replaced, later and
later while it keeps failing. Their logs are theirs: they share this process' stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from dseek.core.logs import get_logger

logger = get_logger("dseek.serve")

WATCH_S = 0.25
"""Time between two looks at the processes."""

MAX_PAUSE_S = 30.0
"""Longest pause before a replica is started again."""

_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


class Replica:
    """One process, and how it is reached.

    Args:
        number: which one, from 0.
        command: starts it; `--uds PATH` is added.
        folder: for its socket.
    """

    def __init__(self, number: int, command: Sequence[str], folder: Path) -> None:
        self.number = number
        self._command = command
        self._path = folder / f"replica-{number}.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self._client: httpx.AsyncClient | None = None
        self.num_busy = 0
        """Requests that the router has given it and that have not ended."""
        self.is_ready = False
        """It answers, and is warm."""
        self.num_starts = 0

    @property
    def client(self) -> httpx.AsyncClient:
        """A client of this replica."""
        if self._client is None:
            transport = httpx.AsyncHTTPTransport(
                uds=str(self._path), limits=httpx.Limits(max_connections=None, max_keepalive_connections=32)
            )
            self._client = httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None)
        return self._client

    def start(self) -> None:
        """Start the process."""
        self._path.unlink(missing_ok=True)
        self.num_starts += 1
        library = ctypes.CDLL(None, use_errno=True)

        def die_with_parent() -> None:
            library.prctl(_DIE_WITH_PARENT, signal.SIGTERM)

        self._process = subprocess.Popen(
            [*self._command, "--uds", str(self._path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def exit_status(self) -> int | None:
        """Return how the process ended, or None while it runs."""
        return None if self._process is None else self._process.poll()

    async def ask_ready(self) -> bool:
        """Ask whether it is ready."""
        try:
            return (await self.client.get("/ready", timeout=2.0)).status_code == 200
        except httpx.HTTPError:
            return False

    async def close(self) -> None:
        """Drop connections; the next use makes new ones."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def terminate(self) -> None:
        """Ask the process to end."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def wait(self, timeout_s: float) -> None:
        """Wait for the end, and make sure of it.

        Args:
            timeout_s: time before it is killed.
        """
        if self._process is None:
            return
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            logger.warning("replica %d did not end and is killed", self.number)
            self._process.kill()
            self._process.wait()


class Replicas:
    """All replicas.

    Args:
        count: how many.
        command: starts one.
        drain_s: time for their answers at the end.
        on_restart: called with the number of a replica that has lost what it knew.
    """

    def __init__(
        self, count: int, command: Sequence[str], *, drain_s: float, on_restart: Callable[[int], None]
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dseek-serve-")
        os.chmod(self._folder.name, 0o700)
        self.all = [Replica(number, command, Path(self._folder.name)) for number in range(count)]
        self._drain_s = drain_s
        self._on_restart = on_restart
        self._watchers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start all, and watch them from now on; called in the event loop."""
        for replica in self.all:
            replica.start()
            self._watchers.append(asyncio.create_task(self._watch(replica)))

    def ready(self) -> list[Replica]:
        """Return those that may be given work."""
        return [replica for replica in self.all if replica.is_ready]

    async def close(self) -> None:
        """End all."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for replica in self.all:
            await replica.close()
            replica.terminate()
        for replica in self.all:
            await asyncio.to_thread(replica.wait, self._drain_s + 5)
        with contextlib.suppress(OSError):
            self._folder.cleanup()

    async def _watch(self, replica: Replica) -> None:
        """Notice when a replica is ready, and replace it when it has died."""
        pause_s = 0.5
        while True:
            status = replica.exit_status()
            if status is not None:
                replica.is_ready = False
                logger.error("replica %d ended with status %d; starting it again", replica.number, status)
                await replica.close()
                self._on_restart(replica.number)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
                replica.start()
            elif not replica.is_ready and await replica.ask_ready():
                replica.is_ready = True
                pause_s = 0.5
                logger.info("replica %d is ready", replica.number)
            await asyncio.sleep(WATCH_S)
