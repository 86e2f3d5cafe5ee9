"""The transport between hosts that have RDMA: what is large is written straight into the peer's memory.

Sockets carry what is small and whatever the ranks tell each other of an operation, as in `tcp`. A tensor from
`LEAST_BYTES` on goes by Mooncake's transfer engine without a copy in between: its receiver registers the memory and
says where it is, its sender registers its own, writes, and says that all has arrived. Messages do so, too
(`one_sided_messages`). Reductions and their bits are those of the TCP transport.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from dseek.parallel.transport.mooncake import Mooncake
from dseek.parallel.transport.one_sided_messages import LEAST_BYTES, OneSidedMessages
from dseek.parallel.transport.tcp import ADDRESSES, TcpTransport
from dseek.parallel.transport.tcp_messages import TcpMessages
from dseek.parallel.transport.work import group_error

_PLACE = struct.Struct("<QQ")
_SESSION_BYTES = 64


class OneSidedTransport(TcpTransport):
    """Ranks that write into each other's memory."""

    def __init__(
        self,
        listener: socket.socket,
        rank: int,
        peers: Sequence[tuple[str, int]],
        token: bytes,
        deadline: float,
        engine: Mooncake,
    ) -> None:
        """Connect to all peers; all ranks do this together.

        Args:
            listener: where higher ranks connect to this one.
            rank: this process.
            peers: address and port of every rank's listener.
            token: 16 bytes that only the group knows.
            deadline: of `time.monotonic`, for all of them to be connected.
            engine: of this rank.

        Raises:
            GroupError: a peer did not come.
        """
        self._engine = engine
        self._sessions: list[str] = []
        super().__init__(listener, rank, peers, token, deadline)
        self.name = f"Mooncake over {engine.protocol.upper()}"
        own = torch.frombuffer(bytearray(engine.session.encode().ljust(_SESSION_BYTES, b"\0")), dtype=torch.uint8)
        sessions = [torch.empty_like(own) for _ in peers]
        self.all_gather(own, sessions, deadline - time.monotonic())
        self._sequence = 0  # the group's own operations count from one
        self._sessions += [bytes(x.numpy()).rstrip(b"\0").decode() for x in sessions]

    def _make_messages(self, links: dict[int, socket.socket]) -> TcpMessages:
        return OneSidedMessages(self.rank, links, self._engine, self._sessions)

    def empty_shared(self, num_bytes: int, timeout_s: float) -> torch.Tensor | None:
        """Allocate memory that stays registered as long as the group lives, so that no operation registers it anew.

        Args:
            num_bytes: the same on every rank.
            timeout_s: how long to wait for a silent peer.

        Returns:
            [num_bytes] of uint8, this rank's own.
        """
        x = torch.empty(num_bytes, dtype=torch.uint8)
        self._engine.keep_reachable(x)
        self.barrier(timeout_s)
        return x

    def _carry(
        self, code: int, given: dict[int, torch.Tensor], taken: dict[int, torch.Tensor], deadline: float
    ) -> None:
        out = {peer: x for peer, x in given.items() if x.nbytes >= LEAST_BYTES}
        into = {peer: x for peer, x in taken.items() if x.nbytes >= LEAST_BYTES}
        nothing = torch.empty(0, dtype=torch.uint8)
        with ExitStack() as stack:
            if out or into:
                sent = {peer: stack.enter_context(self._engine.reachable(x, is_read=True)) for peer, x in out.items()}
                come = {peer: stack.enter_context(self._engine.reachable(x, is_read=False)) for peer, x in into.items()}
                places = {peer: _place(x.data_ptr(), x.nbytes) for peer, x in come.items()}
                told = {peer: _place(0, 0) for peer in out}
                super()._carry(code | ADDRESSES, places, told, deadline)
                writes = {peer: (self._sessions[peer], x, _address(told[peer], peer, x)) for peer, x in sent.items()}
                self._engine.write_all(writes, deadline)
            # What is small itself, and of what is large that it has arrived: memory may be used again only then.
            super()._carry(
                code,
                {peer: nothing if peer in out else x for peer, x in given.items()},
                {peer: nothing if peer in into else x for peer, x in taken.items()},
                deadline,
            )
            for peer, x in into.items():
                if come[peer] is not x:
                    x.copy_(come[peer])


def _place(address: int, num_bytes: int) -> torch.Tensor:
    """Memory that may be written to, as bytes."""
    return torch.frombuffer(bytearray(_PLACE.pack(address, num_bytes)), dtype=torch.uint8)


def _address(place: torch.Tensor, peer: int, x: torch.Tensor) -> int:
    """Where a peer wants a tensor."""
    address, num_bytes = _PLACE.unpack(bytes(place.numpy()))
    if num_bytes != x.nbytes:
        raise group_error(f"rank {peer} expects {num_bytes} bytes of this rank, which has {x.nbytes} for it")
    return int(address)
