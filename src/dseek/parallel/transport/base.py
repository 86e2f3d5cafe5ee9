"""What a transport is: collectives and messages between a fixed set of ranks, blocking, on contiguous memory.

`TransportGroup` knows PyTorch's conventions (lists, options, futures, threads) and no sockets; a transport knows how
bytes move and nothing of PyTorch's conventions. Which transport a group takes is decided in `meeting`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Finished(NamedTuple):
    """A message that is done with."""

    ticket: int
    """What `send` or `receive` returned."""
    source: int
    """The rank it came from; for a sent message, the sender."""
    error: str
    """Why it failed; empty if it did not."""


class Transport(ABC):
    """Moves tensors between ranks.

    Every rank calls the collectives in the same order, one at a time; messages are independent of them. Tensors are
    contiguous, on the CPU, flat where they are reduced, and may be changed as soon as the call returns. `timeout_s` is
    how long a rank waits for one that is alive and silent.

    A collective raises RuntimeError where a peer died, left, failed, is silent or calls something else; after that the
    transport is broken and every later call raises.
    """

    name: str
    """For messages and reports."""

    def __init__(self, rank: int, world_size: int) -> None:
        """Set who `rank` of `world_size` is."""
        self.rank = rank
        self.world_size = world_size

    @abstractmethod
    def barrier(self, timeout_s: float) -> None:
        """Return when all ranks have called this, waiting `timeout_s` at most."""

    @abstractmethod
    def all_reduce(self, x: torch.Tensor, reduction: str, timeout_s: float) -> None:
        """Replace `x` [N] on every rank by the `reduction` over all ranks, within `timeout_s`."""

    @abstractmethod
    def reduce(self, x: torch.Tensor, reduction: str, root: int, timeout_s: float) -> None:
        """Replace `x` [N] on rank `root` only by the `reduction` over all ranks, within `timeout_s`."""

    @abstractmethod
    def reduce_scatter(
        self, inputs: Sequence[torch.Tensor], out: torch.Tensor, reduction: str, timeout_s: float
    ) -> None:
        """Write into `out` [N] the `reduction` of what all ranks have in `inputs` for this rank, within `timeout_s`."""

    @abstractmethod
    def all_gather(self, x: torch.Tensor, outs: Sequence[torch.Tensor], timeout_s: float) -> None:
        """Copy every rank's `x` to its place in `outs`; sizes may differ by rank. Waits `timeout_s` at most."""

    @abstractmethod
    def broadcast(self, x: torch.Tensor, root: int, timeout_s: float) -> None:
        """Copy `x` of rank `root` to that of all others, within `timeout_s`."""

    @abstractmethod
    def all_to_all(self, inputs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], timeout_s: float) -> None:
        """Send inputs[r] to rank r, whose outs[this rank] has its size; empty ones are allowed.

        Args:
            inputs: one tensor a rank.
            outs: one tensor a rank.
            timeout_s: how long to wait for a silent peer.
        """

    @abstractmethod
    def send(self, x: torch.Tensor, rank: int, tag: int) -> int:
        """Start to send `x` to a `rank` under a `tag`; return its ticket; `x` must stay until it is finished."""

    @abstractmethod
    def receive(self, x: torch.Tensor, rank: int | None, tag: int) -> int:
        """Start to receive into `x` from a `rank` (None: whichever sends first) under a `tag`; return its ticket."""

    @abstractmethod
    def progress(self, limit_s: float) -> list[Finished]:
        """Move messages until some are finished, at most for `limit_s`; called by one thread."""

    def empty_shared(self, num_bytes: int, timeout_s: float) -> torch.Tensor | None:
        """Allocate memory that peers can read and write where it is; all ranks call this together.

        Args:
            num_bytes: the same on every rank.
            timeout_s: how long to wait for a silent peer.

        Returns:
            [num_bytes] of uint8, or None where the transport has no such memory.
        """
        return None

    def hand_over(self, x: torch.Tensor, root: int, timeout_s: float) -> torch.Tensor:
        """Give rank `root`'s tensor to all: where it lies if they can read it there, else in their own `x`.

        Args:
            x: contiguous, of one size on every rank; only the giver's is read.
            root: the giver.
            timeout_s: how long to wait for a silent peer.

        Returns:
            The giver's tensor, or `x` with its values.
        """
        self.broadcast(x, root, timeout_s)
        return x

    @abstractmethod
    def set_message_timeout(self, timeout_s: float) -> None:
        """Let messages of a silent peer fail after `timeout_s`."""

    @abstractmethod
    def leave(self) -> None:
        """Tell the peers that nothing more comes from this rank; what is under way here fails."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what was opened, when no thread uses it any more."""
