"""The transport between processes of one host: a segment that all have mapped, worked on by csrc/transport*.cpp.

The segment is made once and used for everything. A tensor in ordinary memory goes through it in blocks that stay in the
cache: all-reduce copies a rank's block in once (less its own share), reduces, and copies the others' shares out. Memory
from `empty_shared` is mapped by all ranks, so that there is nothing to copy: all-reduce reads every rank's tensor and
writes every rank's result where they are, a broadcast is one copy from the giver's memory.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dseek.parallel.transport import native
from dseek.parallel.transport.base import Finished, Transport

MAX_SLOT_BYTES = 1 << 20
"""Largest block: beside copying so much, meeting is cheap."""

SLOTS_BYTES = 12 << 20
"""What the slots of all ranks may take together, so that they stay in the last cache."""

_NUM_SLOTS = 3
_LEAST_SLOT_BYTES = 16 << 10

_ANY_RANK = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentPlace:
    """Where the other ranks find the segment."""

    pid: int
    """The process that made it."""
    descriptor: int
    """Its file there."""
    slot_bytes: int
    """Size of a block."""


def slot_bytes(world_size: int) -> int:
    """Choose the size of a block.

    Args:
        world_size: ranks of the group.

    Returns:
        Bytes, a power of two.
    """
    most = min(SLOTS_BYTES // (_NUM_SLOTS * world_size), MAX_SLOT_BYTES)
    return max(1 << (most.bit_length() - 1), _LEAST_SLOT_BYTES)


def make_segment(world_size: int, token: bytes) -> tuple[SegmentPlace, int]:
    """Make an empty segment, an anonymous file that lives as long as somebody has it open or mapped.

    Args:
        world_size: ranks that will use it.
        token: names the group, for whoever looks into /proc.

    Returns:
        Its place, and the descriptor to close when all ranks have mapped it.
    """
    module = native.module()
    assert module is not None
    descriptor = os.memfd_create(f"dseek-{token.hex()[:8]}")
    os.ftruncate(descriptor, module.segment_bytes(world_size, slot_bytes(world_size)))
    return SegmentPlace(pid=os.getpid(), descriptor=descriptor, slot_bytes=slot_bytes(world_size)), descriptor


class SharedMemoryTransport(Transport):
    """The ranks of one host over one segment."""

    name = "shared memory"

    def __init__(self, place: SegmentPlace, rank: int, pids: Sequence[int], token: bytes) -> None:
        """Map the segment.

        Args:
            place: where it is.
            rank: this process.
            pids: the processes of all ranks.
            token: what rank 0 has written into it.

        Raises:
            OSError: the segment or a process is not there, or this process may not open it.
            RuntimeError: it is another segment.
        """
        super().__init__(rank, len(pids))
        module = native.module()
        assert module is not None
        # A process descriptor, unlike a number, can never come to mean another process.
        self._peers = [-1 if peer == rank else os.pidfd_open(pid) for peer, pid in enumerate(pids)]
        self._pids = list(pids)
        descriptor = os.open(f"/proc/{place.pid}/fd/{place.descriptor}", os.O_RDWR | os.O_CLOEXEC)
        try:
            self._segment: Any = module.Segment(
                descriptor, rank, len(pids), place.slot_bytes, int.from_bytes(token[:8], "little"), self._peers
            )
        finally:
            os.close(descriptor)
        self._messages: Any = module.Messages(self._segment)
        self._regions: list[list[torch.Tensor]] = []

    def barrier(self, timeout_s: float) -> None:
        self._segment.barrier(timeout_s, _is_main_thread())

    def all_reduce(self, x: torch.Tensor, reduction: str, timeout_s: float) -> None:
        element, operation = native.ELEMENTS[x.dtype], native.REDUCTIONS[reduction]
        self._segment.all_reduce(x.data_ptr(), x.numel(), element, operation, timeout_s, _is_main_thread())

    def reduce(self, x: torch.Tensor, reduction: str, root: int, timeout_s: float) -> None:
        element, operation = native.ELEMENTS[x.dtype], native.REDUCTIONS[reduction]
        self._segment.reduce(x.data_ptr(), x.numel(), element, operation, root, timeout_s, _is_main_thread())

    def reduce_scatter(
        self, inputs: Sequence[torch.Tensor], out: torch.Tensor, reduction: str, timeout_s: float
    ) -> None:
        element, operation = native.ELEMENTS[out.dtype], native.REDUCTIONS[reduction]
        self._segment.reduce_scatter(
            _addresses(inputs), out.data_ptr(), out.numel(), element, operation, timeout_s, _is_main_thread()
        )

    def all_gather(self, x: torch.Tensor, outs: Sequence[torch.Tensor], timeout_s: float) -> None:
        self._segment.all_gather(x.data_ptr(), _addresses(outs), _sizes(outs), timeout_s, _is_main_thread())

    def broadcast(self, x: torch.Tensor, root: int, timeout_s: float) -> None:
        self._segment.broadcast(x.data_ptr(), x.nbytes, root, timeout_s, _is_main_thread())

    def all_to_all(self, inputs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], timeout_s: float) -> None:
        self._segment.all_to_all(
            _addresses(inputs), _sizes(inputs), _addresses(outs), _sizes(outs), timeout_s, _is_main_thread()
        )

    def send(self, x: torch.Tensor, rank: int, tag: int) -> int:
        return int(self._messages.send(x.data_ptr(), x.nbytes, rank, tag))

    def receive(self, x: torch.Tensor, rank: int | None, tag: int) -> int:
        return int(self._messages.receive(x.data_ptr(), x.nbytes, _ANY_RANK if rank is None else rank, tag))

    def progress(self, limit_s: float) -> list[Finished]:
        return [Finished(*entry) for entry in self._messages.progress(limit_s)]

    def empty_shared(self, num_bytes: int, timeout_s: float) -> torch.Tensor | None:
        num_mapped = max(-(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE, mmap.PAGESIZE)
        descriptor = os.memfd_create("dseek-shared")
        try:
            os.ftruncate(descriptor, num_mapped)
            own = torch.tensor([descriptor, num_bytes], dtype=torch.int64)
            everyone = torch.empty(self.world_size, 2, dtype=torch.int64)
            self.all_gather(own, list(everyone), timeout_s)
            if len(set(everyone[:, 1].tolist())) > 1:
                raise RuntimeError(f"the ranks allocate different sizes: {everyone[:, 1].tolist()} bytes")
            maps = []
            for pid, peer_descriptor in zip(self._pids, everyone[:, 0].tolist(), strict=True):
                peer = os.open(f"/proc/{pid}/fd/{peer_descriptor}", os.O_RDWR | os.O_CLOEXEC)
                maps.append(mmap.mmap(peer, num_mapped))
                os.close(peer)
            self.barrier(timeout_s)
        finally:
            os.close(descriptor)
        tensors = [torch.frombuffer(one, dtype=torch.uint8) for one in maps]
        self._segment.add_region([tensor.data_ptr() for tensor in tensors], num_mapped)
        self._regions.append(tensors)
        return tensors[self.rank][:num_bytes]

    def hand_over(self, x: torch.Tensor, root: int, timeout_s: float) -> torch.Tensor:
        places = torch.empty(self.world_size, 3, dtype=torch.int64)
        self.all_gather(torch.tensor([*self._place_of(x), x.nbytes]), list(places), timeout_s)
        region, offset, num_bytes = places[root].tolist()
        if len(set(places[:, 2].tolist())) > 1:
            raise RuntimeError(f"the ranks hand over different sizes: {places[:, 2].tolist()} bytes")
        if region < 0:
            return super().hand_over(x, root, timeout_s)
        memory = self._regions[region][root][offset : offset + num_bytes]
        return x if self.rank == root else memory.view(x.dtype).view(x.shape)

    def _place_of(self, x: torch.Tensor) -> tuple[int, int]:
        """Index of the region that holds a tensor and its offset there in bytes; (-1, 0) where none does."""
        for index, region in enumerate(self._regions):
            offset = x.data_ptr() - region[self.rank].data_ptr()
            if 0 <= offset and offset + x.nbytes <= region[self.rank].nbytes:
                return index, offset
        return -1, 0

    def set_message_timeout(self, timeout_s: float) -> None:
        self._segment.message_timeout_s = timeout_s

    def leave(self) -> None:
        self._segment.leave()

    def close(self) -> None:
        for peer in self._peers:
            if peer >= 0:
                os.close(peer)


def _addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _sizes(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [tensor.nbytes for tensor in tensors]


def _is_main_thread() -> bool:
    """Whether Python's signal handlers run in this thread, so that Ctrl-C can end a wait in it."""
    return threading.current_thread() is threading.main_thread()
