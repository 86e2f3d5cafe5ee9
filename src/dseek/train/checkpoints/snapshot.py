"""A state copied aside in memory, so that training goes on while it is written.

There are two buffers, each allocated once: a step waits only where both are still being written, and the second is
allocated only where a snapshot comes while the one before is being written.
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
    """Its memory, in the buffer or in place."""


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
        # The last one given back is the first one taken, so that what suffices with one never allocates the other.
        self._free: queue.LifoQueue[torch.Tensor] = queue.LifoQueue()
        for _ in range(NUM_BUFFERS):
            self._free.put(torch.empty(0, dtype=torch.uint8))

    def take(self, state: object, private: object, rank: int, world_size: int, *, in_place: bool = False) -> Snapshot:
        """Copy what this rank is to write.

        Args:
            state: the nest that all ranks hold, whole or sharded.
            private: a nest of this rank's own.
            rank: this process.
            world_size: all of them. A tensor that all hold is written by one, chosen by its name.
            in_place: leave tensors where they lie in this host's memory, and copy those of a device alone.

        Returns:
            The snapshot; nothing in it changes with the state, unless it is `in_place`.

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
        stays = [in_place and leaf.local.device.type == "cpu" for _, leaf in leaves]
        sizes = [
            0 if stay else -(-leaf.local.nbytes // _ALIGNMENT) * _ALIGNMENT
            for stay, (_, leaf) in zip(stays, leaves, strict=True)
        ]
        buffer = self._free.get()
        if buffer.numel() < sum(sizes):
            buffer = torch.empty(sum(sizes), dtype=torch.uint8)
        array: Any = buffer.numpy()
        whole = memoryview(array)
        held, first = [], 0
        for (name, leaf), size, stay in zip(leaves, sizes, stays, strict=True):
            if stay:
                held.append(Held(name=name, leaf=leaf, content=_memory_of(leaf.local)))
                continue
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


def _memory_of(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _is_written_by(leaf: Leaf, rank: int, world_size: int) -> bool:
    if leaf.is_replica:
        return zlib.crc32(leaf.name.encode()) % world_size == rank
    return leaf.local.numel() > 0
