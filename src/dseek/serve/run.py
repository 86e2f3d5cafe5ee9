"""Runs an application under uvicorn: loopback by default, patient with answers, impatient with slow headers.

After SIGTERM or Ctrl-C no new connection is taken, requests on open ones are answered 503, and what runs has `drain_s`
to end; a second signal ends at once. Then the process exits with status 0.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dseek.core.errors import ConfigError
from dseek.core.logs import get_logger
from dseek.serve.config import ServeConfig

logger = get_logger("dseek.serve")

MAX_HEADER_BYTES = 32 * 1024
"""Longest request line with headers."""

BACKLOG = 2048


def bind(config: ServeConfig) -> socket.socket:
    """Take the address before anything slow is done.

    Args:
        config: says where.

    Returns:
        A bound socket.

    Raises:
        ConfigError: it is taken, not ours, or not to be found.
    """
    place = config.uds or f"{config.host} port {config.port}"
    made: socket.socket | None = None
    try:
        if config.uds is not None:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            _remove_stale(config.uds)
            made.bind(config.uds)
            return made
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        return made
    except OSError as error:
        if made is not None:
            made.close()
        raise ConfigError(
            f"the server cannot listen on {place}: {error.strerror or error}",
            remedy="take another --port (0 takes a free one) or --host",
        ) from None


def _remove_stale(path: str) -> None:
    """Remove the socket that a server left which is no more; anything else at the path stays."""
    if not Path(path).is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink(missing_ok=True)


def url_of(bound: socket.socket) -> str:
    """Say where a bound socket is reached.

    Args:
        bound: from `bind`.
    """
    if bound.family == socket.AF_UNIX:
        return f"unix:{bound.getsockname()}"
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    app: Any,
    config: ServeConfig,
    bound: socket.socket,
    *,
    on_drain: Callable[[], None] = lambda: None,
    on_ready: Callable[[], None] = lambda: None,
) -> int:
    """Serve until a signal.

    Args:
        app: an ASGI application.
        config: timeouts.
        bound: from `bind`; closed at the end.
        on_drain: called at the first signal, in the event loop's thread.
        on_ready: called when connections are taken.

    Returns:
        The exit status: 0 where every answer could end, 1 where some were cut off.
    """
    settings = uvicorn.Config(
        app,
        http=_protocol(config.header_timeout_s),
        loop="asyncio",  # whatever else another package has brought
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=max(1, round(config.keep_alive_s)),
        timeout_graceful_shutdown=max(1, round(config.drain_s)),
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        backlog=BACKLOG,
    )
    server = _Server(settings, on_drain, on_ready)
    try:
        server.run(sockets=[bound])
    except SystemExit as error:  # uvicorn's way to say that the application did not start
        print(f"dseek: error: the server did not start (status {error.code})", file=sys.stderr)
        return 1
    return 1 if server.cut_off else 0


class _Server(uvicorn.Server):
    """uvicorn's server, which tells when it drains and ends with our exit status instead of the signal's."""

    def __init__(self, config: uvicorn.Config, on_drain: Callable[[], None], on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_drain = on_drain
        self._on_ready = on_ready
        self.cut_off = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        name = signal.Signals(sig).name
        if self.should_exit:
            self.force_exit = True
            logger.warning("%s again: ending at once", name)
            return
        self.should_exit = True
        self._on_drain()
        logger.info("%s: draining", name)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn then leaves the application open
            await self.lifespan.shutdown()
        self.cut_off = bool(self.server_state.tasks)


def _protocol(header_timeout_s: float) -> type[H11Protocol]:
    """Make uvicorn's protocol with a limit on the time for a request's line and headers.

    The clock starts with the connection, and again with the first bytes of every further request on it. Idle time
    between requests is the keep-alive limit's.
    """

    class Protocol(H11Protocol):
        _header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(cast(asyncio.Transport, transport))
            self._start_timer()

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            idle = before is None or before.response_complete
            if idle and self._header_timer is None:
                self._start_timer()
            super().data_received(data)
            if self.cycle is not before:
                self._stop_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def _start_timer(self) -> None:
            self._header_timer = self.loop.call_later(header_timeout_s, self._too_slow)

        def _stop_timer(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _too_slow(self) -> None:
            self._header_timer = None
            if not self.transport.is_closing():
                self.transport.abort()

    return Protocol
