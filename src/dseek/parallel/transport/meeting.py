"""How the ranks of a group find out where they are, and which transport they take.

Every rank tells the group's store its host, process and port. Ranks that all run on one host, with the kernels, share a
memory segment: rank 0 makes an anonymous file (memfd), the others open it through /proc. No name of it exists anywhere,
so whatever kills the processes, nothing is left behind. Ranks that all have a device for RDMA, and the engine that
drives it, write into each other's memory. Any other group talks over TCP.

A host is known by its boot id together with the process and network namespaces: containers of one machine that cannot
see each other's processes count as different hosts.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store

from dseek.core import environment
from dseek.core.errors import ConfigError
from dseek.core.logs import get_logger
from dseek.parallel.transport import mooncake, native
from dseek.parallel.transport.base import Transport
from dseek.parallel.transport.work import group_error

MAX_SHARED_RANKS = 64
"""Most ranks of one segment (kMostRanks of csrc/transport.h)."""

_LOOK_S = 0.2
_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Presence:
    """What a rank tells its peers of itself."""

    host: str
    """Equal where processes can share memory."""
    pid: int
    """Process number on that host."""
    has_kernels: bool
    """Whether the native kernels are there."""
    wanted: str
    """DSEEK_TRANSPORT."""
    has_rdma: bool
    """Whether the host has a device for RDMA."""
    has_engine: bool
    """Whether Mooncake's transfer engine is there; not looked for where nobody would use it."""
    address: str
    """Where it listens."""
    port: int
    """The port there."""


def host_id() -> str:
    """Name the set of processes that this one can share memory with."""
    parts = []
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            parts.append(file.read().strip())
        parts += [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")]
    except OSError:
        return f"{socket.gethostname()}-{secrets.token_hex(8)}"
    return " ".join([*parts, str(os.getuid())])


def _network(host: str) -> tuple[str, ...]:
    """What of a `host_id` is equal where 127.0.0.1 leads from one process to the other: boot and network namespace."""
    parts = host.split()
    return (parts[0], *(part for part in parts if part.startswith("net:")))


def meet(store: Store, rank: int, world_size: int, timeout: timedelta) -> Transport:
    """Meet the other ranks and agree on a transport with them. All ranks of a group call this.

    Args:
        store: the group's own.
        rank: this process.
        world_size: all of them.
        timeout: how long to wait for the others.

    Returns:
        A transport on which all ranks are connected.

    Raises:
        GroupError: a rank did not come.
        ConfigError: DSEEK_TRANSPORT asks for shared memory or Mooncake where there can be none, or the ranks disagree.
    """
    from dseek.parallel.transport.one_sided import OneSidedTransport
    from dseek.parallel.transport.tcp import TcpTransport

    deadline = time.monotonic() + timeout.total_seconds()
    with listening() as listener:
        wanted, has_rdma = environment.get("DSEEK_TRANSPORT"), mooncake.has_rdma()
        own = Presence(
            host=host_id(),
            pid=os.getpid(),
            has_kernels=native.module() is not None,
            wanted=wanted,
            has_rdma=has_rdma,
            has_engine=(wanted == "mooncake" or (wanted == "auto" and has_rdma)) and mooncake.is_installed(),
            address=_own_address(),
            port=listener.getsockname()[1],
        )
        store.set(f"presence/{rank}", json.dumps(asdict(own)))
        if rank == 0:
            store.set("token", secrets.token_hex(16))
        everyone = [Presence(**_told(store, f"presence/{peer}", peer, deadline)) for peer in range(world_size)]
        token = bytes.fromhex(_text(store, "token", 0, deadline))
        if len({presence.wanted for presence in everyone}) > 1:
            raise ConfigError(
                "the ranks have different values of DSEEK_TRANSPORT: "
                + ", ".join(presence.wanted for presence in everyone)
            )
        if own.wanted in ("auto", "shared_memory"):
            shared = _share(store, rank, everyone, token, deadline)
            if shared is not None:
                return shared
        is_local = len({_network(presence.host) for presence in everyone}) == 1
        peers = [("127.0.0.1" if is_local else presence.address, presence.port) for presence in everyone]
        protocol = one_sided_protocol(everyone)
        if not protocol:
            return TcpTransport(listener, rank, peers, token, deadline)
        engine = mooncake.Mooncake(peers[rank][0], protocol)
        return OneSidedTransport(listener, rank, peers, token, deadline, engine)


def one_sided_protocol(everyone: list[Presence]) -> str:
    """Choose how ranks write into each other's memory; all of them come to the same result.

    Args:
        everyone: what each rank tells of itself.

    Returns:
        "rdma", "tcp", or "" where they talk over sockets alone.

    Raises:
        ConfigError: DSEEK_TRANSPORT asks for the engine and a rank does not have it.
    """
    without = [rank for rank, presence in enumerate(everyone) if not presence.has_engine]
    if everyone[0].wanted == "mooncake" and without:
        raise ConfigError(
            f"DSEEK_TRANSPORT is mooncake, but the ranks {without} cannot load Mooncake's transfer engine",
            needed=f"{mooncake.NEEDED}, on every host",
            remedy="install them, or set it to auto",
        )
    over_rdma = all(presence.has_rdma for presence in everyone)
    if everyone[0].wanted == "mooncake":
        return "rdma" if over_rdma else "tcp"
    return "rdma" if over_rdma and not without else ""


def _share(store: Store, rank: int, everyone: list[Presence], token: bytes, deadline: float) -> Transport | None:
    """Connect over shared memory, or find that it cannot be; all ranks come to the same result."""
    from dseek.parallel.transport.shared_memory import SegmentPlace, SharedMemoryTransport, make_segment

    reason = ""
    if len({presence.host for presence in everyone}) > 1:
        reason = "the ranks run on different hosts"
    elif not all(presence.has_kernels for presence in everyone):
        reason = "a rank has no native kernels"
    elif len(everyone) > MAX_SHARED_RANKS:
        reason = f"there are more than {MAX_SHARED_RANKS} ranks"
    transport = None
    if not reason:
        descriptor = -1
        if rank == 0:
            place, descriptor = make_segment(len(everyone), token)
            store.set("segment", json.dumps(asdict(place)))
        place = SegmentPlace(**_told(store, "segment", 0, deadline))
        failure = ""
        try:
            transport = SharedMemoryTransport(place, rank, [presence.pid for presence in everyone], token)
        except (OSError, RuntimeError) as error:
            failure = f"rank {rank}: {error}"
        store.set(f"mapped/{rank}", failure or "yes")
        answers = [_text(store, f"mapped/{peer}", peer, deadline) for peer in range(len(everyone))]
        if descriptor >= 0:
            os.close(descriptor)
        reason = next((answer for answer in answers if answer != "yes"), "")
    if not reason:
        return transport
    if everyone[rank].wanted == "shared_memory":
        raise ConfigError(
            f"DSEEK_TRANSPORT is shared_memory, but {reason}", remedy="set it to auto, which takes TCP here"
        )
    if rank == 0:
        _log.info("the process group talks over TCP: %s", reason)
    return None


@contextmanager
def listening() -> Iterator[socket.socket]:
    """Listen on a free port of every interface; whoever connects must know the group's token.

    Yields:
        The listening socket, closed on the way out.
    """
    with socket.create_server(("", 0), backlog=256) as listener:
        yield listener


def _own_address() -> str:
    """This host's address on the way to the rendezvous, or what its name stands for."""
    master = os.environ.get("MASTER_ADDR", "")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((master or socket.gethostname(), 9))  # a datagram socket sends nothing here
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _text(store: Store, key: str, peer: int, deadline: float) -> str:
    """What a rank has written to the store, waited for."""
    left_s = max(deadline - time.monotonic(), 0.01)
    try:
        store.wait([key], timedelta(seconds=left_s))
    except RuntimeError as error:
        raise group_error(f"rank {peer} did not join the group in time ({str(error).splitlines()[0]})") from error
    text: str = store.get(key).decode()
    return text


def _told(store: Store, key: str, peer: int, deadline: float) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(_text(store, key, peer, deadline))
    return fields
