"""A folder of checkpoints that a training writes while it goes on, and what keeps it whole and small.

`save` copies the state and returns; a thread writes. Chunks come first, then each rank's part, and when rank 0 sees
all parts it writes the manifest: that rename is the moment the checkpoint exists. A process that ends anywhere before
leaves some chunks that nothing names, and the checkpoint before stays the newest.

Layout: `chunks/XX/NAME`, `steps/NNNNNNNNNN/part-RRRR.json`, `steps/NNNNNNNNNN/manifest.json`, `lock`. Writers share the
lock; who deletes chunks has it alone, so that none is deleted between being found and being named.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dseek.core import events
from dseek.core.errors import ConfigError, DseekError, FileFormatError
from dseek.core.logs import get_logger
from dseek.train.checkpoints import collecting, reading
from dseek.train.checkpoints.chunks import MAX_CHUNK_BYTES, ChunkStore, digest_of, saves_enough
from dseek.train.checkpoints.files import Files, locked
from dseek.train.checkpoints.manifest import (
    MANIFEST,
    Manifest,
    Part,
    SavedTensor,
    Shard,
    part_name,
    read_part,
)
from dseek.train.checkpoints.snapshot import Snapshot, SnapshotBuffers

_POLL_S = 0.02
_log = get_logger(__name__)


class CheckpointError(DseekError):
    """A checkpoint could not be written; training can go on without it."""

    exit_status = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Where checkpoints go and which are kept."""

    folder: Path
    """Where they are written."""
    remote: Path | None = None
    """A second folder, such as a mounted network disk, that gets a copy of each."""
    keep_last: int = 3
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints of steps divisible by this are kept as well; 0 keeps none besides."""
    compress: bool = True
    """Whether to compress tensors where a trial saves enough; needs `zstandard`."""
    peers_timeout_s: float = 600.0
    """How long rank 0 waits for the other ranks' parts."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.keep_last < 1 or self.keep_every < 0:
            raise ConfigError(
                f"keep_last is {self.keep_last} and keep_every {self.keep_every}", needed="at least 1, and at least 0"
            )
        if self.remote is not None and self.remote.resolve() == self.folder.resolve():
            raise ConfigError(f"the second folder is the first, {self.folder}")


class Pending:
    """A checkpoint that is being written."""

    def __init__(self, step: int) -> None:
        """Of a `step`."""
        self.step = step
        self.stall_s = 0.0
        self.new_bytes = 0
        self._done = threading.Event()
        self._error: BaseException | None = None

    def finish(self, error: BaseException | None) -> None:
        """Wake whoever waits; `error` is why it failed."""
        self._error = error
        self._done.set()

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until it is complete: on rank 0 with all parts, on other ranks with their own.

        Args:
            timeout_s: how long at most; None waits for ever.

        Raises:
            CheckpointError: it could not be written, or not in time.
        """
        if not self._done.wait(timeout_s):
            raise CheckpointError(f"the checkpoint of step {self.step} is not written within {timeout_s:g} s")
        if isinstance(self._error, Exception):
            raise CheckpointError(f"the checkpoint of step {self.step} was not written: {self._error}") from self._error
        if self._error is not None:
            raise self._error


class CheckpointWriter:
    """Writes the checkpoints of one rank; every rank of a training has one and saves the same steps."""

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        run: str = "",
        files: Files | None = None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare, without touching the folder.

        Args:
            config: where to and what to keep.
            rank: this process.
            world_size: all of them.
            run: a text that all ranks share and no earlier start of the training had; needed with several ranks.
            files: another way to write, for tests.
            on_progress: called after each tensor that was written, and while other ranks are waited for, from the
                thread that writes.

        Raises:
            ConfigError: several ranks, and no `run`.
        """
        if world_size > 1 and not run:
            raise ConfigError("checkpoints of several ranks need a run id", needed="a text that is new at each start")
        self.config = config
        self.rank, self.world_size, self.run = rank, world_size, run or f"{time.time_ns():x}"
        self.last_error: BaseException | None = None
        self._files, self._on_progress = files or Files(), on_progress
        self._buffers = SnapshotBuffers()
        self._stores: dict[Path, ChunkStore] = {}
        self._queue: queue.SimpleQueue[tuple[Pending, Snapshot] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def save(self, step: int, state: Any, private: Any = None, *, in_place: bool = False) -> Pending:
        """Copy a state and start to write it.

        Args:
            step: of the training; larger than any before.
            state: a nest of dicts, lists and tuples around tensors, DTensors, numbers and texts, the same on all ranks
                but for the DTensors' shards.
            private: a nest of this rank's own, such as its random numbers' state.
            in_place: do not copy tensors that lie in this host's memory; nothing may change them before the writing is
                waited for.

        Returns:
            What to wait for, where somebody must. A failure is logged, and told there.

        Raises:
            ConfigError: the state holds what a checkpoint cannot.
        """
        start_s = time.perf_counter()
        pending = Pending(step)
        snapshot = self._buffers.take(state, private, self.rank, self.world_size, in_place=in_place)
        pending.stall_s = time.perf_counter() - start_s
        events.emit("checkpoint.snapshot", step=step, stall_s=pending.stall_s)
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="dseek-checkpoints", daemon=True)
            self._thread.start()
        self._queue.put((pending, snapshot))
        return pending

    def close(self) -> None:
        """Wait until everything is written, and end the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _serve(self) -> None:
        while (entry := self._queue.get()) is not None:
            pending, snapshot = entry
            error: BaseException | None = None
            try:
                pending.new_bytes = self._write(pending.step, snapshot)
            except BaseException as failure:
                error = self.last_error = failure
                _log.error("the checkpoint of step %d was not written: %s", pending.step, failure)
            self._buffers.give_back(snapshot)
            pending.finish(error)
            events.emit("checkpoint.written", step=pending.step, new_bytes=pending.new_bytes, error=error)

    def _write(self, step: int, snapshot: Snapshot) -> int:
        """Write one snapshot to both folders; the bytes that were new in the first."""
        new_bytes = self._write_to(self.config.folder, step, snapshot)
        if self.config.remote is not None:
            self._write_to(self.config.remote, step, snapshot)
        return new_bytes

    def _write_to(self, folder: Path, step: int, snapshot: Snapshot) -> int:
        target = reading.step_folder(folder, step)
        if self.rank == 0 and (target / MANIFEST).exists():
            # Of an earlier start that got further than what this one began from, or damaged.
            self._files.remove(target / MANIFEST)
        # 1. Chunks, then the part that names them, while nobody may delete chunks.
        with locked(folder, alone=False):
            store = self._stores.setdefault(folder, ChunkStore(folder / "chunks", self._files))
            new_bytes = 0
            tensors = {}
            for held in snapshot.tensors:
                tensors[held.name], num_written = self._put(store, held.leaf, held.content)
                new_bytes += num_written
                self._on_progress()
            part = Part(
                step=step,
                run=self.run,
                rank=self.rank,
                world_size=self.world_size,
                structure=snapshot.structure,
                private=snapshot.private,
                tensors=tensors,
            )
            self._files.write(target / part_name(self.rank), part.to_bytes())
        # 2. With all parts there, the manifest; then what is no longer wanted goes.
        if self.rank == 0:
            parts = self._parts(target, part)
            manifest = Manifest(
                step=step,
                run=self.run,
                created_s=time.time(),
                num_bytes=sum(sum(one.chunks.values()) for one in parts.values()),
                new_bytes=new_bytes,
                parts=tuple(parts),
            )
            self._files.write(target / MANIFEST, manifest.to_bytes())
            try:
                collecting.retire(folder, self._files, self.config.keep_last, self.config.keep_every, self.run)
            except (FileFormatError, OSError) as error:
                # This checkpoint is complete; what an older, damaged one names stays until that one has gone.
                _log.warning("nothing was deleted from %s: %s", folder, error)
        return new_bytes

    def _put(self, store: ChunkStore, leaf: Any, content: memoryview) -> tuple[SavedTensor, int]:
        """Write the chunks of one tensor."""
        width, compress, new_bytes, chunks = leaf.local.dtype.itemsize, None, 0, []
        width = width if width in (1, 2, 4, 8) else 1
        for first in range(0, len(content), MAX_CHUNK_BYTES):
            chunk = content[first : first + MAX_CHUNK_BYTES]
            digest = digest_of(chunk)
            if compress is None and not store.path(digest).is_file():
                compress = self.config.compress and saves_enough(chunk, width)
            new_bytes += store.put(chunk, digest, width, compress=bool(compress))
            chunks.append(digest)
        shard = Shard(offset=leaf.offset, shape=tuple(leaf.local.shape), chunks=tuple(chunks))
        dtype = str(leaf.local.dtype).removeprefix("torch.")
        return SavedTensor(dtype=dtype, shape=leaf.shape, shards=(shard,)), new_bytes

    def _parts(self, folder: Path, own: Part) -> dict[str, Part]:
        """Wait for every rank's part of this run; by checksum, in the order of the ranks."""
        found = {digest_of(own.to_bytes()): own}
        deadline = time.monotonic() + self.config.peers_timeout_s
        for rank in range(1, self.world_size):
            path = folder / part_name(rank)
            while True:
                if path.is_file():
                    digest = digest_of(path.read_bytes())
                    part = read_part(path)
                    if part.run == self.run:
                        found[digest] = part
                        break
                if time.monotonic() > deadline:
                    raise CheckpointError(f"rank {rank} did not write its part within the time")
                self._on_progress()
                time.sleep(_POLL_S)
        return found
