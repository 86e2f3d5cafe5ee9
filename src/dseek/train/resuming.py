"""From where a training goes on: the newest state that is whole, whichever way it was saved.

There are two kinds: folders `checkpoint-N`, whose names say that they are whole, and snapshots, whose every byte is
checked. The first rank looks and tells the others, so that all go on from the same. A snapshot that is damaged is
passed over with a warning: to the second folder, then to the one before, or to a folder that is newer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dseek.core.config import to_plain
from dseek.core.errors import DseekError
from dseek.plan.training import STRATEGIES
from dseek.train import saving
from dseek.train.checkpoints import Checkpoint, complete_steps, newest
from dseek.train.config import TrainConfig
from dseek.train.preparation import MemoryChoice, Prepared, check_same
from dseek.train.processes import Processes
from dseek.train.results import restore
from dseek.train.saving import TrainerState
from dseek.train.snapshots import read_trainer_state, restore_snapshot, snapshot_folders

_NOTHING, _CHECKPOINT, _SNAPSHOT = 0, 1, 2  # and 3 for a snapshot in the second folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A state to go on from."""

    state: TrainerState
    """Where the training was."""
    place: Path
    """The folder of the checkpoint, or of the snapshot."""
    snapshot: Checkpoint | None
    """The snapshot, if it is one."""

    def restore(self, prepared: Prepared, config: TrainConfig, processes: Processes) -> None:
        """Take it up. All ranks call this together.

        Args:
            prepared: model and optimiser, changed in place.
            config: the training.
            processes: who takes what.

        Raises:
            ConfigError: it is of another training, or of another number of ranks where that matters.
            FileFormatError: something is damaged.
        """
        check_same(config, self.state.config, self.place)
        if self.snapshot is None:
            restore(self.place, self.state, prepared, config, processes)
        else:
            restore_snapshot(self.snapshot, prepared, config, processes)


def find_newest(config: TrainConfig, processes: Processes) -> Found | None:
    """Find the newest state that is whole. All ranks call this together.

    Args:
        config: names the folders.
        processes: who asks.

    Returns:
        The state, or None where the training is new.

    Raises:
        DseekError: it cannot be read.
    """
    kind, step = _look(config, verify=True) if processes.is_first else (0, 0)
    kind, step = (int(value) for value in processes.sum(float(kind), float(step)))
    return None if kind == _NOTHING else _open(config, kind, step)


def stored_choice(config: TrainConfig, processes: Processes) -> MemoryChoice | None:
    """Read how memory was saved before, so that a training that goes on rounds as it did. All ranks call this together.

    Args:
        config: names the folders.
        processes: who asks.

    Returns:
        What was chosen; None where there is nothing to go on from, or it was other ranks or other settings.
    """
    figures = [0.0, 0.0, 0.0, 0.0]
    kind, step = _look(config, verify=False) if processes.is_first else (0, 0)
    if kind != _NOTHING:
        try:
            state = _open(config, kind, step).state
        except DseekError:
            state = None  # whoever goes on from it says so
        choice = None if state is None else _choice_for(state, config, processes.world_size)
        if choice is not None:
            strategy = STRATEGIES.index(choice.shard_strategy)
            figures = [1.0, strategy, choice.checkpointed_layers, choice.logits_chunk_tokens]
    is_known, strategy, layers, chunk = (int(value) for value in processes.sum(*map(float, figures)))
    if not is_known:
        return None
    return MemoryChoice(shard_strategy=STRATEGIES[strategy], checkpointed_layers=layers, logits_chunk_tokens=chunk)


def _choice_for(state: TrainerState, config: TrainConfig, world_size: int) -> MemoryChoice | None:
    """What was chosen, if it was by the same settings."""
    try:
        before = json.loads(state.config)["memory"]
    except (ValueError, TypeError, KeyError):
        return None
    is_same = before == to_plain(config.memory) and state.world_size == world_size
    return state.memory if is_same and state.memory is not None and state.memory.shard_strategy in STRATEGIES else None


def _look(config: TrainConfig, *, verify: bool) -> tuple[int, int]:
    """Kind and step of the newest state."""
    folders = saving.checkpoints(Path(config.output_dir))
    kind, step = (_CHECKPOINT, saving.step_of(folders[-1])) if folders else (_NOTHING, 0)
    roots = snapshot_folders(config)
    if verify:
        found = newest(roots[0], roots[1] if len(roots) > 1 else None, least_step=step)
        if found is not None:
            return _SNAPSHOT + (found.root != roots[0]), found.step
    else:
        for index, root in enumerate(roots):
            last = (complete_steps(root) or [-1])[-1]
            if last >= step + (kind > _CHECKPOINT):
                kind, step = _SNAPSHOT + index, last
    return kind, step


def _open(config: TrainConfig, kind: int, step: int) -> Found:
    if kind == _CHECKPOINT:
        place = saving.checkpoint_folder(Path(config.output_dir), step)
        return Found(state=saving.read_state(place), place=place, snapshot=None)
    roots = snapshot_folders(config)
    root = roots.pop(kind - _SNAPSHOT)
    snapshot = Checkpoint(root, step, roots[0] if roots else None)
    return Found(state=read_trainer_state(snapshot), place=snapshot.folder, snapshot=snapshot)
