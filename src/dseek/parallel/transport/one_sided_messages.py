"""Messages between hosts that have RDMA: what is large is offered, and written where its receiver wants it.

A message from `LEAST_BYTES` on is announced over the socket (an offer); until somebody asks for it, it costs its
receiver nothing. Whoever does registers the memory and answers where it is (a place); the sender writes, and says so
over the socket (done). Order, tags and errors are those of `tcp_messages`; a message of another size than was asked for
is not written at all.
"""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

import torch

from dseek.parallel.transport.base import Finished
from dseek.parallel.transport.mooncake import Mooncake
from dseek.parallel.transport.tcp_messages import HEADER, Peer, Posted, TcpMessages
from dseek.parallel.transport.work import GroupError, group_error

LEAST_BYTES = 64 << 10
"""Smaller parts fit in what a socket takes at once; telling where they may go would cost a round trip."""
_KIND_SHIFT = 62
_OFFER, _PLACE, _DONE = 1, 2, 3
"""The two upper bits of a header's number of bytes; 0 is a message that follows."""
_BODY = struct.Struct("<QQ")
"""The sender's ticket and, of a place, the address; 0 refuses."""


@dataclass(frozen=True, slots=True)
class _Offer:
    """A message that nobody has asked for yet."""

    ticket: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Open:
    """A message whose memory is registered."""

    posted: Posted
    memory: torch.Tensor
    """What it is read from or written to: the message's own, or a stand-in."""


class OneSidedMessages(TcpMessages):
    """The messages of one rank."""

    def __init__(self, rank: int, links: dict[int, socket.socket], engine: Mooncake, sessions: list[str]) -> None:
        """Use connected `links`, one to each peer of `rank`, and the `engine`; `sessions` are there before any call."""
        super().__init__(rank, links)
        self._engine = engine
        self._sessions = sessions
        self._offered: dict[tuple[int, int], Posted] = {}
        self._placed: dict[tuple[int, int], _Open] = {}

    def _queue(self, posted: Posted, peer: Peer) -> None:
        if len(posted.content) < LEAST_BYTES:
            super()._queue(posted, peer)
            return
        assert posted.rank is not None
        self._offered[posted.rank, posted.ticket] = posted
        self._say(peer, _OFFER, posted.tag, len(posted.content), posted.ticket)

    def _say(
        self, peer: Peer, kind: int, tag: int, num_bytes: int, ticket: int, address: int = 0, then: Posted | None = None
    ) -> None:
        """Send a few words about a message."""
        header = HEADER.pack(tag, kind << _KIND_SHIFT | num_bytes)
        peer.sends.append((then, [memoryview(header + _BODY.pack(ticket, address))]))

    def _wants_to_read(self, rank: int, peer: Peer) -> bool:
        return super()._wants_to_read(rank, peer) or any(other == rank for other, _ in [*self._offered, *self._placed])

    def _begin(self, rank: int, peer: Peer) -> None:
        if _kind(peer):
            peer.receiver, peer.num_read = None, 0
            peer.content = memoryview(bytearray(_BODY.size))
        else:
            super()._begin(rank, peer)

    def _finish(self, rank: int, peer: Peer) -> None:
        kind = _kind(peer)
        if not kind:
            super()._finish(rank, peer)
            return
        tag, number = HEADER.unpack(peer.header)
        assert peer.content is not None
        ticket, address = _BODY.unpack(peer.content)
        peer.content, peer.header = None, bytearray()
        if kind == _OFFER:
            offer = _Offer(ticket, number & ~(3 << _KIND_SHIFT))
            receiver = self._take_receiver(rank, tag)
            if receiver is None:
                peer.aside.append((tag, offer))
            else:
                self._accept(receiver, rank, offer)
        elif kind == _PLACE and (rank, ticket) in self._offered:
            self._write_to(rank, peer, self._offered[rank, ticket], address)
        elif kind == _DONE and (rank, ticket) in self._placed:
            self._close(rank, self._placed.pop((rank, ticket)))
        else:
            raise group_error(f"rank {rank} speaks of a message {ticket} that is not under way")

    def _deliver(self, posted: Posted, rank: int, content: Any) -> None:
        if isinstance(content, _Offer):
            self._accept(posted, rank, content)
        else:
            super()._deliver(posted, rank, content)

    def _accept(self, posted: Posted, rank: int, offer: _Offer) -> None:
        """Say where a message may go, or that it is not what was asked for."""
        peer = self._peers[rank]
        if offer.num_bytes != len(posted.content):
            expected = f"where {len(posted.content)} were expected"
            error = f"rank {rank} sent {offer.num_bytes} bytes with tag {posted.tag} {expected}"
            self._refuse(posted, rank, offer, error)
            return
        try:
            memory = self._engine.reach(torch.frombuffer(posted.content, dtype=torch.uint8), is_read=False)
        except GroupError as reason:
            self._refuse(posted, rank, offer, reason.found)
            return
        self._placed[rank, offer.ticket] = _Open(posted, memory)
        self._say(peer, _PLACE, posted.tag, 0, offer.ticket, memory.data_ptr())

    def _refuse(self, posted: Posted, rank: int, offer: _Offer, error: str) -> None:
        """End a receiver with an error; the sender is done, as it is where sockets carry what nobody can use."""
        self._finished.append(Finished(posted.ticket, rank, error))
        self._say(self._peers[rank], _PLACE, posted.tag, 0, offer.ticket)

    def _write_to(self, rank: int, peer: Peer, posted: Posted, address: int) -> None:
        """Write a message where its receiver wants it."""
        if not address:
            del self._offered[rank, posted.ticket]
            self._finished.append(Finished(posted.ticket, self._rank, ""))
            return
        with self._engine.reachable(torch.frombuffer(posted.content, dtype=torch.uint8), is_read=True) as memory:
            deadline = time.monotonic() + self.timeout_s
            self._engine.write_all({rank: (self._sessions[rank], memory, address)}, deadline)
        del self._offered[rank, posted.ticket]  # until here its failure is the connection's
        self._say(peer, _DONE, posted.tag, 0, posted.ticket, then=posted)

    def _close(self, rank: int, done: _Open) -> None:
        """Let go of the memory of a message that has arrived."""
        self._engine.release(done.memory)
        own = torch.frombuffer(done.posted.content, dtype=torch.uint8)
        if own.data_ptr() != done.memory.data_ptr():
            own.copy_(done.memory)
        self._finished.append(Finished(done.posted.ticket, rank, ""))

    def _under_way(self, rank: int, peer: Peer) -> list[Posted]:
        offered = [posted for (other, _), posted in self._offered.items() if other == rank]
        placed = [one.posted for (other, _), one in self._placed.items() if other == rank]
        return super()._under_way(rank, peer) + offered + placed

    def _forget(self, rank: int, peer: Peer) -> None:
        super()._forget(rank, peer)
        self._offered = {key: posted for key, posted in self._offered.items() if key[0] != rank}
        for key in [key for key in self._placed if key[0] == rank]:
            self._engine.release(self._placed.pop(key).memory)


def _kind(peer: Peer) -> int:
    number: int = HEADER.unpack(peer.header)[1]
    return number >> _KIND_SHIFT
