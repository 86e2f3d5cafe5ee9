"""The ranks of a `torch.distributed` group and the few messages that are sent between them.

Every message has its place in a fixed schedule, so what a rank computes never depends on which message arrives first.
Tensors travel as bytes: any dtype, on any backend that moves bytes (gloo on the CPU). A rank that fails ends; its peers
then get the backend's error (a closed connection, or the group's own timeout) out of whichever call they are in.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist

from dseek.core.errors import ConfigError


class _Work(Protocol):
    """A message under way."""

    def wait(self) -> object: ...


class Ranks:
    """This process among its peers; alone where `torch.distributed` was not initialised."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Find this process in a group.

        Args:
            group: a process group that this process belongs to; None is the default group, or this process alone where
                there is none.

        Raises:
            ConfigError: the process does not belong to the group.
        """
        self._group = group
        self.rank, self.world_size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ConfigError("this process does not belong to the process group", needed="a group it is a member of")

    def all_gather(self, x: torch.Tensor, into: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Get everybody's tensor, in order of rank.

        Args:
            x: of the same shape and dtype on every rank.
            into: [world_size, ...], contiguous; what is received is written there. None takes new memory.

        Returns:
            One tensor a rank; this rank's own is `x` itself.
        """
        if self.world_size == 1 or x.numel() == 0:
            return [x] * self.world_size
        if into is None:
            into = x.new_empty((self.world_size, *x.shape))
        received = list(into.unbind(0))
        dist.all_gather([_bytes(tensor) for tensor in received], _bytes(x), group=self._group)
        received[self.rank] = x
        return received

    def broadcast(self, x: torch.Tensor, rank: int) -> None:
        """Give one rank's tensor to all.

        Args:
            x: of the same shape and dtype on every rank, contiguous; written on all ranks but the one that gives.
            rank: who gives.
        """
        if self.world_size > 1 and x.numel():
            dist.broadcast(_bytes(x), group=self._group, group_src=rank)

    def broadcast_text(self, text: str | None, rank: int = 0) -> str:
        """Give one rank's text to all.

        Args:
            text: what is given; None on the other ranks.
            rank: who gives.

        Returns:
            The text.
        """
        content = bytearray((text or "").encode())
        length = torch.tensor([len(content)])
        self.broadcast(length, rank)
        if self.rank != rank:
            content = bytearray(int(length))
        if content:
            self.broadcast(torch.frombuffer(content, dtype=torch.uint8), rank)
        return content.decode()

    def send(self, x: torch.Tensor, rank: int) -> _Work:
        """Start to send a tensor, which must not change until it was waited for.

        Args:
            x: what the receiver has an equal `receive` for, not empty, contiguous.
            rank: the receiver.
        """
        return _started(dist.isend(_bytes(x), group=self._group, group_dst=rank))

    def receive(self, x: torch.Tensor, rank: int) -> _Work:
        """Start to receive into a tensor, which holds nothing until it was waited for.

        Args:
            x: written, not empty, contiguous.
            rank: the sender.
        """
        return _started(dist.irecv(_bytes(x), group=self._group, group_src=rank))


def _started(work: _Work | None) -> _Work:
    assert work is not None, "only a member of the group has a Ranks of it"
    return work


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """The tensor's memory as bytes, [numel * itemsize]; a copy only where it was not contiguous."""
    return x.contiguous().view(-1).view(torch.uint8)
