"""Messages from rank to rank over TCP: any number under way, matched by sender and tag.

It does what csrc/transport_messages.cpp does over shared memory: messages of one pair keep their order; one that nobody
has asked for stays in the socket, unless the receiver waits for another tag from the same rank.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from dseek.parallel.transport.base import Finished
from dseek.parallel.transport.work import GroupError, group_error

_HEADER = struct.Struct("<IQ")
_CHUNK_BYTES = 1 << 20
_MOST_BYTES = 1 << 46


@dataclass(slots=True)
class _Posted:
    ticket: int
    rank: int | None
    tag: int
    content: memoryview
    start_s: float


@dataclass(slots=True)
class _Peer:
    """The two directions of one connection."""

    link: socket.socket
    sends: deque[tuple[_Posted, list[memoryview]]] = field(default_factory=deque)
    header: bytearray = field(default_factory=bytearray)
    receiver: _Posted | None = None
    content: memoryview | None = None
    num_read: int = 0
    error: str = ""
    aside: list[tuple[int, memoryview]] = field(default_factory=list)


class TcpMessages:
    """The messages of one rank."""

    def __init__(self, rank: int, links: dict[int, socket.socket]) -> None:
        """Use connected, non-blocking `links`, one to each peer of `rank`."""
        self._rank = rank
        self._peers = {peer: _Peer(link) for peer, link in links.items()}
        self._receives: list[_Posted] = []
        self._finished: list[Finished] = []
        self._lock = threading.Lock()
        self._fresh: list[tuple[bool, _Posted]] = []
        self._last_ticket = 0
        self.timeout_s = 1800.0
        self._bell, self._ring = os.pipe()
        os.set_blocking(self._bell, False)
        os.set_blocking(self._ring, False)

    def send(self, content: memoryview, rank: int, tag: int) -> int:
        """Start to send `content` to `rank` under `tag`; return a ticket."""
        return self._post(is_send=True, content=content, rank=rank, tag=tag)

    def receive(self, content: memoryview, rank: int | None, tag: int) -> int:
        """Start to receive into `content` from `rank` (None: any) under `tag`; return a ticket."""
        return self._post(is_send=False, content=content, rank=rank, tag=tag)

    def _post(self, *, is_send: bool, content: memoryview, rank: int | None, tag: int) -> int:
        with self._lock:
            self._last_ticket += 1
            self._fresh.append((is_send, _Posted(self._last_ticket, rank, tag, content, time.monotonic())))
            ticket = self._last_ticket
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._ring, b"x")
        return ticket

    def leave(self) -> None:
        """End all connections; what is under way fails."""
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # the peer may have been faster
                peer.link.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close everything."""
        for peer in self._peers.values():
            peer.link.close()
        for descriptor in (self._bell, self._ring):
            if descriptor >= 0:
                os.close(descriptor)
        self._bell = self._ring = -1

    def progress(self, limit_s: float) -> list[Finished]:
        """Move messages until some are finished, at most for `limit_s`.

        Args:
            limit_s: longest wait.

        Returns:
            What is finished.
        """
        deadline = time.monotonic() + limit_s
        self._take_posted()
        while not self._finished:
            with selectors.DefaultSelector() as selector:
                selector.register(self._bell, selectors.EVENT_READ, None)
                for rank, peer in self._peers.items():
                    events = (selectors.EVENT_WRITE if peer.sends else 0) | (
                        selectors.EVENT_READ if self._wants_to_read(rank, peer) else 0
                    )
                    if events and not peer.error:
                        selector.register(peer.link, events, rank)
                for key, events in selector.select(max(deadline - time.monotonic(), 0)):
                    if key.data is None:
                        os.read(self._bell, 4096)
                    else:
                        self._move(key.data, events)
            self._take_posted()
            self._give_up_lost()
            if time.monotonic() >= deadline:
                break
        finished, self._finished = self._finished, []
        return finished

    def _wants_to_read(self, rank: int, peer: _Peer) -> bool:
        return peer.content is not None or any(posted.rank in (None, rank) for posted in self._receives)

    def _take_posted(self) -> None:
        with self._lock:
            fresh, self._fresh = self._fresh, []
        for is_send, posted in fresh:
            if is_send:
                assert posted.rank is not None
                header = memoryview(_HEADER.pack(posted.tag, len(posted.content)))
                self._peers[posted.rank].sends.append((posted, [header, posted.content]))
            elif not self._deliver_aside(posted):
                self._receives.append(posted)

    def _deliver_aside(self, posted: _Posted) -> bool:
        """Give a receiver what was put aside for it."""
        for rank, peer in self._peers.items():
            if posted.rank not in (None, rank):
                continue
            for index, (tag, content) in enumerate(peer.aside):
                if tag == posted.tag:
                    del peer.aside[index]
                    self._deliver(posted, rank, content)
                    return True
        return False

    def _deliver(self, posted: _Posted, rank: int, content: memoryview) -> None:
        error = ""
        if len(content) == len(posted.content):
            posted.content[:] = content
        else:
            error = (
                f"rank {rank} sent {len(content)} bytes with tag {posted.tag} where {len(posted.content)} were expected"
            )
        self._finished.append(Finished(posted.ticket, rank, error))

    def _move(self, rank: int, events: int) -> None:
        peer = self._peers[rank]
        try:
            if events & selectors.EVENT_READ:
                self._read(rank, peer)
            if events & selectors.EVENT_WRITE:
                self._write(peer)
        except BlockingIOError:
            pass
        except (OSError, GroupError) as error:
            peer.error = error.found if isinstance(error, GroupError) else f"rank {rank} died or left"

    def _write(self, peer: _Peer) -> None:
        posted, parts = peer.sends[0]
        num_sent = peer.link.sendmsg([part[:_CHUNK_BYTES] for part in parts[:1]] if len(parts) == 1 else parts)
        while parts and num_sent >= len(parts[0]):
            num_sent -= len(parts.pop(0))
        if parts:
            parts[0] = parts[0][num_sent:]
        else:
            peer.sends.popleft()
            self._finished.append(Finished(posted.ticket, self._rank, ""))

    def _read(self, rank: int, peer: _Peer) -> None:
        if peer.content is None:
            part = peer.link.recv(_HEADER.size - len(peer.header))
            if not part:
                raise group_error(f"rank {rank} died or left")
            peer.header += part
            if len(peer.header) < _HEADER.size:
                return
            self._begin(rank, peer)
        else:
            target = peer.content[peer.num_read : peer.num_read + _CHUNK_BYTES]
            num_read = peer.link.recv_into(target)
            if num_read == 0:
                raise group_error(f"rank {rank} died or left")
            peer.num_read += num_read
        assert peer.content is not None
        if peer.num_read == len(peer.content):
            self._finish(rank, peer)

    def _begin(self, rank: int, peer: _Peer) -> None:
        """Decide where a message that begins goes."""
        tag, num_bytes = _HEADER.unpack(peer.header)
        if num_bytes > _MOST_BYTES:
            raise group_error(f"rank {rank} announces a message of {num_bytes} bytes")
        peer.receiver = self._take_receiver(rank, tag)
        peer.num_read = 0
        if peer.receiver is not None and len(peer.receiver.content) == num_bytes:
            peer.content = peer.receiver.content
        else:
            peer.content = memoryview(bytearray(num_bytes))

    def _finish(self, rank: int, peer: _Peer) -> None:
        tag, _ = _HEADER.unpack(peer.header)
        content, receiver = peer.content, peer.receiver
        assert content is not None
        peer.content, peer.receiver, peer.header = None, None, bytearray()
        if receiver is not None and content is receiver.content:
            self._finished.append(Finished(receiver.ticket, rank, ""))
            return
        receiver = receiver or self._take_receiver(rank, tag)
        if receiver is None:
            peer.aside.append((tag, content))
        else:
            self._deliver(receiver, rank, content)

    def _take_receiver(self, rank: int, tag: int) -> _Posted | None:
        for index, posted in enumerate(self._receives):
            if posted.tag == tag and posted.rank in (None, rank):
                return self._receives.pop(index)
        return None

    def _give_up_lost(self) -> None:
        """End what waits for a rank whose connection is gone, or has waited too long."""
        too_old_s = time.monotonic() - self.timeout_s
        for rank, peer in self._peers.items():
            # A message that is half through cannot be taken back: the connection is of no more use.
            waiting = [posted for posted, _ in peer.sends] + ([peer.receiver] if peer.receiver else [])
            if not peer.error and any(posted.start_s < too_old_s for posted in waiting):
                peer.error = f"rank {rank} did not take or send a message within {self.timeout_s:g} s"
        for posted in [one for one in self._receives if one.start_s < too_old_s]:
            source = "no rank" if posted.rank is None else f"rank {posted.rank} did not"
            error = f"{source} send a message with tag {posted.tag} within {self.timeout_s:g} s"
            self._finished.append(Finished(posted.ticket, -1 if posted.rank is None else posted.rank, error))
            self._receives.remove(posted)
        lost = {rank: peer.error for rank, peer in self._peers.items() if peer.error}
        if not lost:
            return
        for rank, error in lost.items():
            peer = self._peers[rank]
            self._finished += [Finished(posted.ticket, rank, error) for posted, _ in peer.sends]
            peer.sends.clear()
            if peer.receiver is not None:
                self._finished.append(Finished(peer.receiver.ticket, rank, error))
                peer.receiver = peer.content = None
        kept = []
        for posted in self._receives:
            error = next(iter(lost.values())) if posted.rank is None else lost.get(posted.rank, "")
            if error:
                self._finished.append(Finished(posted.ticket, -1 if posted.rank is None else posted.rank, error))
            else:
                kept.append(posted)
        self._receives = kept
