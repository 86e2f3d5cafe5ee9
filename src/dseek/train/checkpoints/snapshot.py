"""A state copied aside in memory, so that training goes on while it is written.

Two buffers take turns, each allocated once: a step waits only where both are still being written.
"""

from __future__ import annotations

import queue
import zlib
from dataclasses import dataclass
from typing import Any

import torch

from dseek.core.errors import ConfigError
from dseek.train.checkpoints.reading import private_name
from dseek.train.checkpoints.tree import Leaf, Node, leaf_of, take_apart

NUM_BUFFERS = 2
_ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """One tensor's bytes in a snapshot."""

    name: str
    """Key in the part."""
    leaf: Leaf
    """What it is."""
    content: memoryview
    """Its memory in the buffer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """What one rank writes of a state, copied."""

    structure: Node
    """Of the state."""
    private: Node
    """Of what belongs to this rank alone."""
    tensors: tuple[Held, ...]
    """What this rank writes."""
    buffer: torch.Tensor
    """Holds them; goes back when they are written."""


class SnapshotBuffers:
    """The buffers of one rank."""

    def __init__(self) -> None:
        """Start with empty buffers."""
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for _ in range(NUM_BUFFERS):
            self._free.put(torch.empty(0, dtype=torch.uint8))

    def take(self, state: object, private: object, rank: int, world_size: int) -> Snapshot:
        """Copy what this rank is to write.

        Args:
            state: the nest that all ranks hold, whole or sharded.
            private: a nest of this rank's own.
            rank: this process.
            world_size: all of them. A tensor that all hold is written by one, chosen by its name.

        Returns:
            The snapshot; nothing in it changes with the state.

        Raises:
            ConfigError: the state holds what a checkpoint cannot.
        """
        structure, tensors = take_apart(state)
        own_structure, own_tensors = take_apart(private)
        leaves = [(name, leaf_of(name, tensor)) for name, tensor in tensors.items()]
        leaves = [(name, leaf) for name, leaf in leaves if _is_written_by(leaf, rank, world_size)]
        for name, tensor in own_tensors.items():
            leaf = leaf_of(name, tensor)
            if not leaf.is_replica:
                raise ConfigError(f"{name} is a DTensor", needed="plain tensors in what belongs to one rank")
            leaves.append((private_name(name), leaf))
        sizes = [-(-leaf.local.nbytes // _ALIGNMENT) * _ALIGNMENT for _, leaf in leaves]
        buffer = self._free.get()
        if buffer.numel() < sum(sizes):
            buffer = torch.empty(sum(sizes), dtype=torch.uint8)
        array: Any = buffer.numpy()
        whole = memoryview(array)
        held, first = [], 0
        for (name, leaf), size in zip(leaves, sizes, strict=True):
            num_bytes = leaf.local.nbytes
            if num_bytes:
                place = buffer[first : first + num_bytes].view(leaf.local.dtype).view(leaf.local.shape)
                place.copy_(leaf.local)
            held.append(Held(name=name, leaf=leaf, content=whole[first : first + num_bytes]))
            first += size
        return Snapshot(structure=structure, private=own_structure, tensors=tuple(held), buffer=buffer)

    def give_back(self, snapshot: Snapshot) -> None:
        """Reuse the buffer of a `snapshot` that is written."""
        self._free.put(snapshot.buffer)


def _is_written_by(leaf: Leaf, rank: int, world_size: int) -> bool:
    if leaf.is_replica:
        return zlib.crc32(leaf.name.encode()) % world_size == rank
    return leaf.local.numel() > 0
