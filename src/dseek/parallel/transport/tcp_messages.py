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
from typing import Any

from dseek.parallel.transport.base import Finished
from dseek.parallel.transport.work import GroupError, group_error

HEADER = struct.Struct("<IQ")
"""Tag and number of bytes; a number of `MOST_BYTES` and more is not one of a message that follows."""
MOST_BYTES = 1 << 46
_CHUNK_BYTES = 1 << 20


@dataclass(slots=True)
class Posted:
    """A message that a rank sends or waits for."""

    ticket: int
    rank: int | None
    """The other rank; None: any."""
    tag: int
    content: memoryview
    """What is sent, or where it goes."""
    start_s: float
    """Of `time.monotonic`."""


@dataclass(slots=True)
class Peer:
    """The two directions of one connection."""

    link: socket.socket
    sends: deque[tuple[Posted | None, list[memoryview]]] = field(default_factory=deque)
    """What goes out, with the message that is finished then."""
    header: bytearray = field(default_factory=bytearray)
    """Of the message that comes in, as far as it came."""
    receiver: Posted | None = None
    """Who waits for it."""
    content: memoryview | None = None
    """Where it goes."""
    num_read: int = 0
    error: str = ""
    aside: list[tuple[int, Any]] = field(default_factory=list)
    """Tags and contents of messages that nobody has asked for."""


class TcpMessages:
    """The messages of one rank."""

    def __init__(self, rank: int, links: dict[int, socket.socket]) -> None:
        """Use connected, non-blocking `links`, one to each peer of `rank`."""
        self._rank = rank
        self._peers = {peer: Peer(link) for peer, link in links.items()}
        self._receives: list[Posted] = []
        self._finished: list[Finished] = []
        self._lock = threading.Lock()
        self._fresh: list[tuple[bool, Posted]] = []
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
            self._fresh.append((is_send, Posted(self._last_ticket, rank, tag, content, time.monotonic())))
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

    def _wants_to_read(self, rank: int, peer: Peer) -> bool:
        return peer.content is not None or any(posted.rank in (None, rank) for posted in self._receives)

    def _take_posted(self) -> None:
        with self._lock:
            fresh, self._fresh = self._fresh, []
        for is_send, posted in fresh:
            if is_send:
                assert posted.rank is not None
                self._queue(posted, self._peers[posted.rank])
            elif not self._deliver_aside(posted):
                self._receives.append(posted)

    def _queue(self, posted: Posted, peer: Peer) -> None:
        """Put a message among what goes out."""
        header = memoryview(HEADER.pack(posted.tag, len(posted.content)))
        peer.sends.append((posted, [header, posted.content]))

    def _deliver_aside(self, posted: Posted) -> bool:
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

    def _deliver(self, posted: Posted, rank: int, content: Any) -> None:
        """Give a receiver a message from aside."""
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

    def _write(self, peer: Peer) -> None:
        posted, parts = peer.sends[0]
        num_sent = peer.link.sendmsg([part[:_CHUNK_BYTES] for part in parts[:1]] if len(parts) == 1 else parts)
        while parts and num_sent >= len(parts[0]):
            num_sent -= len(parts.pop(0))
        if parts:
            parts[0] = parts[0][num_sent:]
        else:
            peer.sends.popleft()
            if posted is not None:
                self._finished.append(Finished(posted.ticket, self._rank, ""))

    def _read(self, rank: int, peer: Peer) -> None:
        if peer.content is None:
            part = peer.link.recv(HEADER.size - len(peer.header))
            if not part:
                raise group_error(f"rank {rank} died or left")
            peer.header += part
            if len(peer.header) < HEADER.size:
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

    def _begin(self, rank: int, peer: Peer) -> None:
        """Decide where a message that begins goes."""
        tag, num_bytes = HEADER.unpack(peer.header)
        if num_bytes >= MOST_BYTES:
            raise group_error(f"rank {rank} announces a message of {num_bytes} bytes")
        peer.receiver = self._take_receiver(rank, tag)
        peer.num_read = 0
        if peer.receiver is not None and len(peer.receiver.content) == num_bytes:
            peer.content = peer.receiver.content
        else:
            peer.content = memoryview(bytearray(num_bytes))

    def _finish(self, rank: int, peer: Peer) -> None:
        """Give a message that is there to who waits for it, or put it aside."""
        tag, _ = HEADER.unpack(peer.header)
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

    def _take_receiver(self, rank: int, tag: int) -> Posted | None:
        """Take away who waits for a message."""
        for index, posted in enumerate(self._receives):
            if posted.tag == tag and posted.rank in (None, rank):
                return self._receives.pop(index)
        return None

    def _give_up_lost(self) -> None:
        """End what waits for a rank whose connection is gone, or has waited too long."""
        too_old_s = time.monotonic() - self.timeout_s
        for rank, peer in self._peers.items():
            # A message that is half through cannot be taken back: the connection is of no more use.
            if not peer.error and any(posted.start_s < too_old_s for posted in self._under_way(rank, peer)):
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
            self._finished += [Finished(posted.ticket, rank, error) for posted in self._under_way(rank, peer)]
            self._forget(rank, peer)
        kept = []
        for posted in self._receives:
            error = next(iter(lost.values())) if posted.rank is None else lost.get(posted.rank, "")
            if error:
                self._finished.append(Finished(posted.ticket, -1 if posted.rank is None else posted.rank, error))
            else:
                kept.append(posted)
        self._receives = kept

    def _under_way(self, rank: int, peer: Peer) -> list[Posted]:
        """What has begun to go to or come from a rank, and fails with its connection."""
        sends = [posted for posted, _ in peer.sends if posted is not None]
        return sends + ([peer.receiver] if peer.receiver is not None else [])

    def _forget(self, rank: int, peer: Peer) -> None:
        """Drop that, when everybody has been told."""
        peer.sends.clear()
        peer.receiver = peer.content = None
