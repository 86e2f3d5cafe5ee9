"""The transport between hosts: one pair of TCP connections between every two ranks.

One connection of a pair carries collectives, the other messages, so that neither waits for the other. Whoever connects
shows the group's token first. Each part of a collective is preceded by what it belongs to, so that ranks that call
different things find out instead of taking each other's bytes.

Reductions send every rank its share, reduce it there in the order of the ranks, and send the results around: the same
bits as over shared memory. It says nothing about the speed of RDMA, which it does not use.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

import torch

from dseek.parallel.transport import reference
from dseek.parallel.transport.base import Finished, Transport
from dseek.parallel.transport.tcp_messages import TcpMessages
from dseek.parallel.transport.work import GroupError, group_error

_HELLO = struct.Struct("<16sIB")
_FRAME = struct.Struct("<QB7xQ")
_COLLECTIVE, _MESSAGES = 0, 1
_OPERATIONS = ("barrier", "all_reduce", "reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all")
ADDRESSES = 1 << 7
"""Added to an operation's code in frames that say where peers may write, before the operation's own."""
_SMALL_BYTES = 32 << 10
_CHUNK_BYTES = 1 << 20
_HELLO_LIMIT_S = 10.0


class TcpTransport(Transport):
    """Ranks that are connected by sockets."""

    name = "TCP"

    def __init__(
        self, listener: socket.socket, rank: int, peers: Sequence[tuple[str, int]], token: bytes, deadline: float
    ) -> None:
        """Connect to all peers; all ranks do this together.

        Args:
            listener: where higher ranks connect to this one.
            rank: this process.
            peers: address and port of every rank's listener.
            token: 16 bytes that only the group knows.
            deadline: of `time.monotonic`, for all of them to be connected.

        Raises:
            GroupError: a peer did not come.
        """
        super().__init__(rank, len(peers))
        links = _connect(listener, rank, peers, token, deadline)
        self._links = {peer: link for (peer, kind), link in links.items() if kind == _COLLECTIVE}
        self._messages = self._make_messages({peer: link for (peer, kind), link in links.items() if kind == _MESSAGES})
        self._sequence = 0
        self._failure = ""

    def _make_messages(self, links: dict[int, socket.socket]) -> TcpMessages:
        return TcpMessages(self.rank, links)

    def barrier(self, timeout_s: float) -> None:
        nothing = torch.empty(0, dtype=torch.uint8)
        self._exchange("barrier", dict.fromkeys(self._links, nothing), dict.fromkeys(self._links, nothing), timeout_s)

    def all_reduce(self, x: torch.Tensor, reduction: str, timeout_s: float) -> None:
        if x.nbytes <= _SMALL_BYTES:
            received = {peer: torch.empty_like(x) for peer in self._links}
            self._exchange("all_reduce", dict.fromkeys(self._links, x), received, timeout_s)
            x.copy_(reference.reduce([received.get(peer, x) for peer in range(self.world_size)], reduction))
            return
        shares = list(x.tensor_split(self.world_size))
        self._reduce_share(shares, shares[self.rank], reduction, "all_reduce", timeout_s)
        own = shares[self.rank]
        self._exchange(
            "all_reduce", dict.fromkeys(self._links, own), {peer: shares[peer] for peer in self._links}, timeout_s
        )

    def reduce(self, x: torch.Tensor, reduction: str, root: int, timeout_s: float) -> None:
        if self.rank != root:
            self._exchange("reduce", {root: x}, {}, timeout_s)
            return
        received = {peer: torch.empty_like(x) for peer in self._links}
        self._exchange("reduce", {}, received, timeout_s)
        x.copy_(reference.reduce([received.get(peer, x) for peer in range(self.world_size)], reduction))

    def reduce_scatter(
        self, inputs: Sequence[torch.Tensor], out: torch.Tensor, reduction: str, timeout_s: float
    ) -> None:
        self._reduce_share(inputs, out, reduction, "reduce_scatter", timeout_s)

    def _reduce_share(
        self, shares: Sequence[torch.Tensor], out: torch.Tensor, reduction: str, operation: str, timeout_s: float
    ) -> None:
        """Give every rank its share, and reduce this rank's."""
        own = shares[self.rank]
        received = {peer: torch.empty_like(own) for peer in self._links}
        self._exchange(operation, {peer: shares[peer] for peer in self._links}, received, timeout_s)
        out.copy_(reference.reduce([received.get(peer, own) for peer in range(self.world_size)], reduction))

    def all_gather(self, x: torch.Tensor, outs: Sequence[torch.Tensor], timeout_s: float) -> None:
        self._exchange(
            "all_gather", dict.fromkeys(self._links, x), {peer: outs[peer] for peer in self._links}, timeout_s
        )
        _copy(outs[self.rank], x)

    def broadcast(self, x: torch.Tensor, root: int, timeout_s: float) -> None:
        if self.rank == root:
            self._exchange("broadcast", dict.fromkeys(self._links, x), {}, timeout_s)
        else:
            self._exchange("broadcast", {}, {root: x}, timeout_s)

    def all_to_all(self, inputs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], timeout_s: float) -> None:
        self._exchange(
            "all_to_all",
            {peer: inputs[peer] for peer in self._links},
            {peer: outs[peer] for peer in self._links},
            timeout_s,
        )
        _copy(outs[self.rank], inputs[self.rank])

    def send(self, x: torch.Tensor, rank: int, tag: int) -> int:
        return self._messages.send(_bytes(x), rank, tag)

    def receive(self, x: torch.Tensor, rank: int | None, tag: int) -> int:
        return self._messages.receive(_bytes(x), rank, tag)

    def progress(self, limit_s: float) -> list[Finished]:
        return self._messages.progress(limit_s)

    def set_message_timeout(self, timeout_s: float) -> None:
        self._messages.timeout_s = timeout_s

    def leave(self) -> None:
        for link in self._links.values():
            with contextlib.suppress(OSError):  # the peer may have been faster
                link.shutdown(socket.SHUT_RDWR)
        self._messages.leave()

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        self._messages.close()

    def _exchange(
        self, operation: str, given: dict[int, torch.Tensor], taken: dict[int, torch.Tensor], timeout_s: float
    ) -> None:
        """Send to some peers and receive from some at the same time; anything wrong breaks the transport."""
        if self._failure:
            raise group_error(f"an earlier operation of this group failed: {self._failure}")
        self._sequence += 1
        try:
            self._carry(_OPERATIONS.index(operation), given, taken, time.monotonic() + timeout_s)
        except BaseException as error:
            # Closing tells the peers, so that they do not wait for what will not come.
            self._failure = error.found if isinstance(error, GroupError) else type(error).__name__
            self.leave()
            raise

    def _carry(
        self, code: int, given: dict[int, torch.Tensor], taken: dict[int, torch.Tensor], deadline: float
    ) -> None:
        """Move one operation's bytes, by the sockets.

        Args:
            code: says which operation; peers must have the same one.
            given: what goes to each rank.
            taken: where what comes from each rank goes.
            deadline: of `time.monotonic`.

        Raises:
            GroupError: a peer died, left, is silent or calls something else.
        """
        sending = {
            peer: [memoryview(_FRAME.pack(self._sequence, code, x.nbytes)), _bytes(x)] for peer, x in given.items()
        }
        receiving = {peer: _Incoming(_bytes(x)) for peer, x in taken.items()}
        self._move(sending, receiving, (self._sequence, code), deadline)

    def _move(
        self,
        sending: dict[int, list[memoryview]],
        receiving: dict[int, _Incoming],
        expected: tuple[int, int],
        deadline: float,
    ) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in sending.keys() | receiving.keys():
                events = (selectors.EVENT_WRITE if peer in sending else 0) | (
                    selectors.EVENT_READ if peer in receiving else 0
                )
                selector.register(self._links[peer], events, peer)
            while sending or receiving:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise group_error(f"ranks {sorted(sending.keys() | receiving.keys())} did not answer in time")
                for key, events in selector.select(left_s):
                    peer, link = key.data, self._links[key.data]
                    if events & selectors.EVENT_WRITE and _push(link, peer, sending[peer]):
                        del sending[peer]
                    if events & selectors.EVENT_READ and receiving[peer].pull(link, peer, expected):
                        del receiving[peer]
                    wanted = (selectors.EVENT_WRITE if peer in sending else 0) | (
                        selectors.EVENT_READ if peer in receiving else 0
                    )
                    if wanted:
                        selector.modify(link, wanted, peer)
                    else:
                        selector.unregister(link)


class _Incoming:
    """A part of a collective that arrives: its frame, then its bytes."""

    def __init__(self, target: memoryview) -> None:
        self._target = target
        self._frame = bytearray(_FRAME.size)
        self._num_read = 0

    def pull(self, link: socket.socket, peer: int, expected: tuple[int, int]) -> bool:
        """Take what has come; True when all has."""
        if self._num_read < _FRAME.size:
            self._num_read += read_some(link, memoryview(self._frame)[self._num_read :], peer)
            if self._num_read == _FRAME.size:
                self._check(peer, expected)
        else:
            done = self._num_read - _FRAME.size
            self._num_read += read_some(link, self._target[done : done + _CHUNK_BYTES], peer)
        return self._num_read == _FRAME.size + len(self._target)

    def _check(self, peer: int, expected: tuple[int, int]) -> None:
        sequence, code, num_bytes = _FRAME.unpack(self._frame)
        if (sequence, code) != expected or num_bytes != len(self._target):
            raise group_error(
                f"rank {peer} calls {_named(code)} number {sequence} with {num_bytes} bytes, this rank "
                f"{_named(expected[1])} number {expected[0]} with {len(self._target)}"
            )


def _named(code: int) -> str:
    """The operation of a frame."""
    known = code & ~ADDRESSES
    name = _OPERATIONS[known] if known < len(_OPERATIONS) else f"operation {known}"
    return f"{name} (where to write)" if code & ADDRESSES else name


def read_some(link: socket.socket, target: memoryview, peer: int) -> int:
    """Read what a socket has.

    Args:
        link: ready to be read.
        target: filled from its start, not empty.
        peer: the rank at the other end.

    Returns:
        Bytes read, at least one unless nothing was ready.

    Raises:
        GroupError: the connection ended.
    """
    try:
        num_read = link.recv_into(target)
    except BlockingIOError:
        return 0
    except OSError as error:
        raise group_error(f"rank {peer} died or left ({error.strerror})") from error
    if num_read == 0:
        raise group_error(f"rank {peer} died or left")
    return num_read


def _push(link: socket.socket, peer: int, parts: list[memoryview]) -> bool:
    """Send what fits; True when all is sent."""
    try:
        num_sent = link.sendmsg([part[:_CHUNK_BYTES] for part in parts[:1]] if len(parts) == 1 else parts)
    except BlockingIOError:
        return False
    except OSError as error:
        raise group_error(f"rank {peer} died or left ({error.strerror})") from error
    while parts and num_sent >= len(parts[0]):
        num_sent -= len(parts.pop(0))
    if parts:
        parts[0] = parts[0][num_sent:]
    return not parts


def _connect(
    listener: socket.socket, rank: int, peers: Sequence[tuple[str, int]], token: bytes, deadline: float
) -> dict[tuple[int, int], socket.socket]:
    """Connect to all lower ranks, and accept all higher ones."""
    links: dict[tuple[int, int], socket.socket] = {}
    try:
        for peer in range(rank):
            for kind in (_COLLECTIVE, _MESSAGES):
                link = socket.create_connection(peers[peer], timeout=max(deadline - time.monotonic(), 0.01))
                link.sendall(_HELLO.pack(token, rank, kind))
                links[peer, kind] = link
        while len(links) < 2 * (len(peers) - 1):
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            link, _ = listener.accept()
            hello = _hello(link, token, deadline)
            if hello is None or hello in links or not rank < hello[0] < len(peers):
                link.close()
                continue
            links[hello] = link
    except OSError as error:
        for link in links.values():
            link.close()
        missing = [peer for peer in range(len(peers)) if peer != rank and (peer, _MESSAGES) not in links]
        raise group_error(f"no connection with ranks {missing} ({error})") from error
    for link in links.values():
        _prepare(link)
    return links


def _hello(link: socket.socket, token: bytes, deadline: float) -> tuple[int, int] | None:
    """Rank and kind of a connection whose other end knows the token, else None."""
    link.settimeout(min(max(deadline - time.monotonic(), 0.01), _HELLO_LIMIT_S))
    content = b""
    with contextlib.suppress(OSError):
        while len(content) < _HELLO.size:
            part = link.recv(_HELLO.size - len(content))
            if not part:
                break
            content += part
    if len(content) < _HELLO.size:
        return None
    shown, peer, kind = _HELLO.unpack(content)
    return (peer, kind) if shown == token and kind in (_COLLECTIVE, _MESSAGES) else None


def _prepare(link: socket.socket) -> None:
    """No waiting for more to send; a host that vanishes is noticed within some ten seconds."""
    link.setblocking(False)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 10_000)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _bytes(x: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    if x.numel() == 0:
        return memoryview(bytearray())
    array: Any = x.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _copy(out: torch.Tensor, x: torch.Tensor) -> None:
    if out.data_ptr() != x.data_ptr():
        out.copy_(x.view_as(out))
