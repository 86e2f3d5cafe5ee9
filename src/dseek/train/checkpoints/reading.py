"""A complete checkpoint: its tensors, whole or any box of them, checked as they are read.

A box is put together from whichever shards cover it, so that a state saved by four ranks is read by two, by one, or by
four again. A chunk that is missing or damaged is taken from the second folder, if there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dseek.core.errors import FileFormatError
from dseek.core.logs import get_logger
from dseek.train.checkpoints.chunks import MAX_CHUNK_BYTES, ChunkStore
from dseek.train.checkpoints.files import Files
from dseek.train.checkpoints.manifest import MANIFEST, Part, SavedTensor, Shard, part_name, read_manifest, read_part
from dseek.train.checkpoints.tree import DTYPES, leaf_of, put_together, take_apart

_log = get_logger(__name__)


class Checkpoint:
    """One complete checkpoint, open for reading."""

    def __init__(self, folder: Path, step: int, remote: Path | None = None) -> None:
        """Read manifest and parts.

        Args:
            folder: that holds the checkpoints.
            step: which.
            remote: a second folder with the same.

        Raises:
            FileFormatError: it is not complete, or damaged.
        """
        self.root, self.folder = folder, step_folder(folder, step)
        self.manifest = read_manifest(self.folder / MANIFEST)
        if self.manifest.step != step:
            raise FileFormatError(f"{self.folder / MANIFEST} is of step {self.manifest.step}")
        self.parts: list[Part] = []
        for rank, digest in enumerate(self.manifest.parts):
            path = self.folder / part_name(rank)
            part = read_part(path, digest)
            if (part.step, part.rank, part.world_size) != (step, rank, len(self.manifest.parts)):
                raise FileFormatError(f"{path} belongs to another checkpoint")
            self.parts.append(part)
        self._stores = [ChunkStore(root / "chunks", Files()) for root in (folder, remote) if root is not None]
        self._tensors: dict[str, list[SavedTensor]] = {}
        for part in self.parts:
            for name, tensor in part.tensors.items():
                if name.startswith(_PRIVATE_PREFIX):
                    continue
                known = self._tensors.setdefault(name, [])
                if known and (known[0].dtype, known[0].shape) != (tensor.dtype, tensor.shape):
                    raise FileFormatError(f"two ranks saved {name} with different shapes or dtypes")
                known.append(tensor)

    @property
    def step(self) -> int:
        """The training step."""
        return self.manifest.step

    @property
    def names(self) -> list[str]:
        """Names of the state's tensors: their paths, as JSON."""
        return list(self._tensors)

    def tensor(self, name: str) -> torch.Tensor:
        """Read a whole tensor.

        Args:
            name: one of `names`.

        Returns:
            The tensor, on the CPU.

        Raises:
            FileFormatError: there is none, or a part of it is missing or damaged.
        """
        shape = self._saved(name)[0].shape
        return self.box(name, (0,) * len(shape), shape)

    def box(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """Read a box of a tensor.

        Args:
            name: one of `names`.
            offset: of its first element.
            shape: its sizes.

        Returns:
            [*shape], on the CPU.

        Raises:
            FileFormatError: there is no such tensor, or a part of the box is missing or damaged.
        """
        return self._box(name, self._saved(name), offset, shape)

    def _box(
        self, name: str, saved: Sequence[SavedTensor], offset: Sequence[int], shape: Sequence[int]
    ) -> torch.Tensor:
        out = torch.empty(tuple(shape), dtype=DTYPES[saved[0].dtype])
        num_missing = out.numel()
        for tensor in saved:
            for shard in tensor.shards:
                low = [max(a, b) for a, b in zip(offset, shard.offset, strict=True)]
                high = [
                    min(a + size, b + other)
                    for a, size, b, other in zip(offset, shape, shard.offset, shard.shape, strict=True)
                ]
                if any(past <= first for first, past in zip(low, high, strict=True)):
                    continue
                content = self._shard(tensor, shard)
                source = tuple(
                    slice(first - start, past - start)
                    for first, past, start in zip(low, high, shard.offset, strict=True)
                )
                target = tuple(
                    slice(first - start, past - start) for first, past, start in zip(low, high, offset, strict=True)
                )
                out[target] = content[source]
                num_missing -= math.prod(past - first for first, past in zip(low, high, strict=True))
        if num_missing > 0:
            raise FileFormatError(f"{name} of step {self.step} is not whole: {num_missing} elements were never saved")
        return out

    def _saved(self, name: str) -> list[SavedTensor]:
        if name not in self._tensors:
            raise FileFormatError(f"step {self.step} has no tensor {name}")
        return self._tensors[name]

    def _shard(self, tensor: SavedTensor, shard: Shard) -> torch.Tensor:
        num_bytes = tensor.shard_bytes(shard)
        content = torch.empty(num_bytes, dtype=torch.uint8)
        array: Any = content.numpy()
        target = memoryview(array)
        for index, digest in enumerate(shard.chunks):
            first = index * MAX_CHUNK_BYTES
            size = min(MAX_CHUNK_BYTES, num_bytes - first)
            target[first : first + size] = self._chunk(digest, size)
        return content.view(DTYPES[tensor.dtype]).view(shard.shape)

    def _chunk(self, digest: str, num_bytes: int) -> bytes:
        for index, store in enumerate(self._stores):
            try:
                return store.get(digest, num_bytes)
            except FileFormatError as error:
                if index == len(self._stores) - 1:
                    raise
                _log.warning("%s; taking it from the second folder", error)
        raise AssertionError("there is always a store")

    def state(self) -> Any:
        """Read the whole state.

        Returns:
            The nest that was saved, with whole tensors.

        Raises:
            FileFormatError: something is missing or damaged.
        """
        return put_together(self.parts[0].structure, self.tensor)

    def private(self, rank: int) -> Any:
        """Read what belonged to one `rank` alone."""
        part = self.parts[rank]

        def tensor_of(name: str) -> torch.Tensor:
            saved = part.tensors.get(_PRIVATE_PREFIX + name)
            if saved is None:
                raise FileFormatError(f"step {self.step} has no tensor {name} of rank {rank}")
            return self._box(name, [saved], (0,) * len(saved.shape), saved.shape)

        return put_together(part.private, tensor_of)

    def load_into(self, state: Any) -> Any:
        """Read into the tensors of a state of the same structure, each rank its own shards.

        Args:
            state: the nest, as `save` takes it; its tensors are filled in place.

        Returns:
            The nest, with the saved numbers and texts and the given tensors.

        Raises:
            FileFormatError: a tensor is missing, damaged, or has another shape or dtype.
        """
        _, tensors = take_apart(state)

        def tensor_of(name: str) -> torch.Tensor:
            if name not in tensors:
                return self.tensor(name)
            self.fill(name, tensors[name])
            return tensors[name]

        return put_together(self.parts[0].structure, tensor_of)

    def fill(self, name: str, target: torch.Tensor) -> None:
        """Read a tensor into another one, of a DTensor this rank's shard.

        Args:
            name: one of `names`.
            target: of its shape and dtype, changed in place.

        Raises:
            FileFormatError: it is missing, damaged, or has another shape or dtype.
        """
        saved = self._saved(name)[0]
        if tuple(target.shape) != saved.shape or target.dtype != DTYPES[saved.dtype]:
            raise FileFormatError(
                f"{name} was saved as {list(saved.shape)} of {saved.dtype}",
                needed=f"{list(target.shape)} of {str(target.dtype).removeprefix('torch.')}",
            )
        leaf = leaf_of(name, target)
        with torch.no_grad():
            local = target.to_local() if hasattr(target, "to_local") else target
            local.copy_(self.box(name, leaf.offset, tuple(local.shape)))

    def verify(self, on_chunk: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Read every chunk.

        Args:
            on_chunk: told the bytes of each chunk read.

        Raises:
            FileFormatError: one is missing or damaged.
        """
        chunks: Mapping[str, int] = {digest: size for part in self.parts for digest, size in part.chunks.items()}
        for digest, size in chunks.items():
            self._chunk(digest, size)
            on_chunk(size)
        for name, saved in self._tensors.items():
            covered = sum(math.prod(shard.shape) for tensor in saved for shard in tensor.shards)
            if covered < math.prod(saved[0].shape):
                raise FileFormatError(f"{name} of step {self.step} is not whole")


_PRIVATE_PREFIX = "private "


def private_name(name: str) -> str:
    """Make the key of a tensor of a rank's own in its part.

    Args:
        name: the tensor's path.
    """
    return _PRIVATE_PREFIX + name


def step_folder(folder: Path, step: int) -> Path:
    """Name the folder of one checkpoint.

    Args:
        folder: that holds the checkpoints.
        step: which.
    """
    return folder / "steps" / f"{step:010d}"


def complete_steps(folder: Path) -> list[int]:
    """List the steps that have a manifest, oldest first; what the manifest says is not looked at.

    Args:
        folder: that holds the checkpoints.
    """
    steps = folder / "steps"
    if not steps.is_dir():
        return []
    return sorted(int(entry.name) for entry in steps.iterdir() if entry.name.isdigit() and (entry / MANIFEST).is_file())


def newest(folder: Path, remote: Path | None = None, *, verify: bool = True, least_step: int = 0) -> Checkpoint | None:
    """Find the newest checkpoint that is whole; what is damaged is passed over with a warning.

    Args:
        folder: that holds the checkpoints.
        remote: a second folder, for what the first has lost.
        verify: whether to read every chunk first.
        least_step: older ones are not looked at.

    Returns:
        The checkpoint, or None where there is none.
    """
    roots = [root for root in (folder, remote) if root is not None]
    steps = {step for root in roots for step in complete_steps(root) if step >= least_step}
    for step in sorted(steps, reverse=True):
        for root in roots:
            try:
                checkpoint = Checkpoint(root, step, remote if root is not remote else folder)
                if verify:
                    checkpoint.verify()
            except FileFormatError as error:
                _log.warning("the checkpoint of step %d in %s cannot be used: %s", step, root, error)
            else:
                return checkpoint
    return None
