"""Checkpoints of a training, and its result: folders in Hugging Face layout that are there whole or not at all.

`checkpoint-N` holds the model (or the adapter), the optimiser's state, and where in the data the next step begins. It
is written under another name and renamed when everything is on disk, so that the newest folder of that name is always a
whole one. Tensors are put together and written one at a time. Tensors are whole, so any number of ranks may go on from
them; only the 8-bit optimiser, whose blocks are of a rank's part, has a file for each rank and wants as many again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from dseek.core.config import load_json, to_plain
from dseek.core.errors import ConfigError, FileFormatError
from dseek.core.files import atomic_write_text
from dseek.models.safetensors_writer import StreamTensor, write_stream
from dseek.train.packing import RowState
from dseek.train.preparation import MemoryChoice
from dseek.train.shards import whole

STATE = "trainer_state.json"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.uint8: "U8"}
_REMEDY = "remove this checkpoint, and the one before it is gone on from"
_FOLDER = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerState:
    """Where a training is."""

    format: int = 1
    """Of the file."""
    global_step: int
    """Steps that are done."""
    num_tokens_seen: int
    """Tokens of all ranks so far."""
    world_size: int
    """Ranks that made it."""
    data: RowState
    """Where the next row begins."""
    config: str
    """The configuration, as JSON."""
    log_history: tuple[dict[str, float], ...] = field(default_factory=tuple)
    """What was reported so far."""
    memory: MemoryChoice | None = None
    """How memory was saved, which decides the order of sums and so the last bits."""


def checkpoints(folder: Path) -> list[Path]:
    """Find the checkpoints of a training.

    Args:
        folder: its `output_dir`.

    Returns:
        Their folders, oldest first.
    """
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / STATE).is_file()]


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Name the checkpoint of a step.

    Args:
        folder: `output_dir`.
        step: the last one that is done.
    """
    return folder / f"checkpoint-{step}"


def step_of(folder: Path) -> int:
    """Tell the step of a checkpoint.

    Args:
        folder: one of `checkpoints`.
    """
    return int(folder.name.removeprefix("checkpoint-"))


def read_state(folder: Path) -> TrainerState:
    """Read where a training was.

    Args:
        folder: a checkpoint.

    Raises:
        ConfigError: the file is not what `write_state` writes.
    """
    return check_format(load_json(TrainerState, folder / STATE), folder / STATE)


def check_format(state: TrainerState, place: Path | str) -> TrainerState:
    """Hand a state on if this version understands it.

    Args:
        state: as it was read.
        place: from where, for the message.

    Raises:
        ConfigError: it is of a newer dseek.
    """
    if state.format != 1:
        raise ConfigError(f"{place} has format {state.format}", needed="1", remedy="use a newer dseek")
    return state


def write_state(folder: Path, state: TrainerState) -> None:
    """Write where a training is.

    Args:
        folder: a checkpoint that is being written.
        state: what to write.
    """
    atomic_write_text(folder / STATE, json.dumps(to_plain(state), indent=1) + "\n")


def write_tensors(
    path: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    writes: bool,
    change: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, tensor: tensor,
) -> None:
    """Write tensors into a safetensors file, put together and written one at a time. All ranks call this together.

    Args:
        path: the file.
        tensors: names and tensors, shared ones in the same order on every rank.
        writes: this rank writes; the others only give their parts.
        change: makes what is written of a name and its whole tensor, of the same shape and dtype.

    Raises:
        OSError: it cannot be written.
    """

    def bytes_of(name: str, tensor: torch.Tensor) -> Callable[[], np.ndarray]:
        def make() -> np.ndarray:
            data = change(name, whole(tensor.detach())).to("cpu").contiguous().view(-1)
            return data.view(torch.uint8).numpy()

        return make

    listed = list(tensors)
    if writes:
        stream = [
            StreamTensor(name=name, dtype=_DTYPES[tensor.dtype], shape=tuple(tensor.shape), make=bytes_of(name, tensor))
            for name, tensor in listed
        ]
        write_stream(path, stream, {"format": "pt"})
    else:
        for name, tensor in listed:
            change(name, whole(tensor.detach()))


def read_tensors(path: Path, names: Iterable[str]) -> Iterable[tuple[str, torch.Tensor]]:
    """Read tensors of a safetensors file, one at a time.

    Args:
        path: the file.
        names: which.

    Yields:
        Name and tensor.

    Raises:
        FileFormatError: the file is broken, or lacks one.
    """
    try:
        with safe_open(str(path), framework="pt") as stored:
            for name in names:
                yield name, stored.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{path}: {error}", remedy=_REMEDY) from None


def stored_names(path: Path) -> list[str]:
    """List the tensors of a safetensors file.

    Args:
        path: the file.

    Raises:
        FileFormatError: the file is broken.
    """
    try:
        with safe_open(str(path), framework="pt") as stored:
            return list(stored.keys())
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{path}: {error}", remedy=_REMEDY) from None


def optimizer_file(folder: Path, *, own: bool, rank: int, world_size: int) -> Path:
    """Name the file of an optimiser's state: one for all ranks, or one for each where they cannot be put together.

    Args:
        folder: the checkpoint.
        own: the state belongs to a rank's part.
        rank: this process.
        world_size: processes.
    """
    return folder / (f"optimizer-{rank + 1:05d}-of-{world_size:05d}.safetensors" if own else OPTIMIZER)


class Folder:
    """A folder that comes to be under another name and gets its own when it is whole.

    Args:
        target: its name.
        is_first: this rank makes, renames and removes folders.
    """

    def __init__(self, target: Path, *, is_first: bool) -> None:
        self._target, self._is_first = target, is_first
        self.path = target.with_name(f".{target.name}.part")

    def begin(self) -> None:
        """Make it, empty."""
        if self._is_first:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)

    def finish(self) -> None:
        """Give it its name; one that was there before is replaced."""
        if self._is_first:
            shutil.rmtree(self._target, ignore_errors=True)
            os.replace(self.path, self._target)
            _sync(self._target.parent)


def move_files(source: Path, target: Path, last: str) -> None:
    """Move the files of a folder into another one, file by file.

    Args:
        source: the folder; removed.
        target: the other, on the same disk.
        last: the file that comes last, by whose presence a reader knows that all are there.
    """
    names = sorted((path.name for path in source.iterdir()), key=lambda name: (name == last, name))
    for name in names:
        os.replace(source / name, target / name)
    source.rmdir()
    _sync(target)


def remove_old(folder: Path, limit: int) -> None:
    """Remove the oldest checkpoints.

    Args:
        folder: `output_dir`.
        limit: how many stay; 0 is all.
    """
    found = checkpoints(folder)
    for path in found[: len(found) - limit] if limit else []:
        shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
