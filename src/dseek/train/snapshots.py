"""Snapshots of a training: its whole state, kept aside every few steps while it goes on, and taken up again.

What `dseek.train.checkpoints` writes for anybody, this fills for `dseek train`: `model` (all weights, or the adapters,
under the names that files of models have), `optimizer` (the moments), and of each rank its own random numbers; of the
first one also where the training is. Shared tensors are written by shards, each rank its own, and read by whatever
shards there are then. The step waits for a copy in memory alone. Moments that lie elsewhere to spare memory are not
copied: they are written from where they lie, and the step waits for that.

What this does not know: a disk that is slower than the snapshots come; then the third waits for the first.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from pathlib import Path
from typing import Any

import torch

from dseek.core.config import from_mapping, parse_json, to_plain
from dseek.core.errors import ConfigError, FileFormatError
from dseek.models.config_values import shorten
from dseek.train.adamw_8bit import AdamW8bit
from dseek.train.checkpoints import Checkpoint, CheckpointConfig, CheckpointError, CheckpointWriter
from dseek.train.checkpoints.collecting import forget_after
from dseek.train.checkpoints.files import Files
from dseek.train.config import TrainConfig
from dseek.train.offload import OffloadedAdamW
from dseek.train.optimizers import put_state, release, state_tensors
from dseek.train.preparation import Prepared
from dseek.train.processes import Processes
from dseek.train.results import check_moments, keeps_own, learned_names
from dseek.train.saving import TrainerState, check_format

FOLDER = "snapshots"
"""Where they are, inside of `output_dir`."""


def snapshot_folders(config: TrainConfig) -> list[Path]:
    """Name the folders of a training's snapshots: its own, then the second one where there is one.

    Args:
        config: the training.
    """
    remote = config.checkpoints.remote
    return [Path(config.output_dir) / FOLDER] + ([] if remote is None else [Path(remote).expanduser()])


class Snapshots:
    """Makes the snapshots of one training; all ranks call its methods together.

    Args:
        config: how often, and where to.
        prepared: model and optimiser.
        processes: who writes.

    Raises:
        ConfigError: the second folder is the first, or cannot be made.
    """

    def __init__(self, config: TrainConfig, prepared: Prepared, processes: Processes) -> None:
        self._config, self._prepared, self._processes = config, prepared, processes
        self._writer: CheckpointWriter | None = None
        self._in_place = isinstance(prepared.optimizer, OffloadedAdamW)
        options = config.checkpoints
        if not options.snapshot_steps:
            return
        folder, *remote = snapshot_folders(config)
        for path in remote if processes.is_first else ():
            _make(path)
        # Drawn anew at every start: torchrun calls all of them alike.
        (drawn,) = processes.sum(float(secrets.randbits(48) + 1) if processes.is_first else 0.0)
        self._writer = CheckpointWriter(
            CheckpointConfig(
                folder=folder,
                remote=remote[0] if remote else None,
                keep_last=options.keep_last,
                compress=options.compress,
            ),
            rank=processes.rank,
            world_size=processes.world_size,
            run=f"{int(drawn):x}",
            on_progress=self._on_progress,
        )

    def is_due(self, step: int) -> bool:
        """Tell whether a snapshot belongs behind a step.

        Args:
            step: that is done.
        """
        return self._writer is not None and step % self._config.checkpoints.snapshot_steps == 0

    def begin_after(self, step: int) -> None:
        """Let go of snapshots that a training which goes on behind a step passed over, since they are damaged.

        Args:
            step: the last one that is done.
        """
        if self._writer is not None and self._processes.is_first:
            for folder in snapshot_folders(self._config):
                forget_after(folder, Files(), step)

    def save(self, state: TrainerState) -> None:
        """Copy the state aside and begin to write it.

        Args:
            state: where the training is.
        """
        assert self._writer is not None
        nest, private = _nest(self._prepared, self._config)
        private["rng"] = _random_state(self._processes.device)
        if self._processes.is_first:
            private["trainer"] = json.dumps(to_plain(state))
        pending = self._writer.save(state.global_step, nest, private, in_place=self._in_place)
        if self._in_place:
            with contextlib.suppress(CheckpointError):  # which was logged; the training goes on without it
                pending.wait()

    def close(self) -> None:
        """Wait until everything is written."""
        if self._writer is not None:
            self._writer.close()

    def _on_progress(self) -> None:
        self._processes.lease.sign()
        release(self._prepared.optimizer)


def read_trainer_state(checkpoint: Checkpoint) -> TrainerState:
    """Read where a training was.

    Args:
        checkpoint: a snapshot.

    Raises:
        ConfigError: it is none of a training's.
    """
    place = f"snapshot {checkpoint.folder}"
    private = checkpoint.private(0)
    text = private.get("trainer") if isinstance(private, dict) else None
    if not isinstance(text, str):
        raise ConfigError(f"{place} is not of `dseek train`", remedy="train into another output_dir")
    return check_format(from_mapping(TrainerState, parse_json(text, where=place), where=place), place)


def restore_snapshot(checkpoint: Checkpoint, prepared: Prepared, config: TrainConfig, processes: Processes) -> None:
    """Take up weights, moments and random numbers from a snapshot, each rank its own shards.

    Args:
        checkpoint: the snapshot.
        prepared: model and optimiser, changed in place.
        config: the training.
        processes: who takes what.

    Raises:
        ConfigError: the moments belong to the parts of another number of ranks.
        FileFormatError: something is missing, damaged, or of another shape.
    """
    parameters = dict(prepared.model.named_parameters())
    for stored, name in learned_names(prepared, config).items():
        checkpoint.fill(json.dumps(("model", stored)), parameters[name])
        processes.lease.sign()
    num_parts = len(checkpoint.parts)
    private = checkpoint.private(processes.rank) if processes.world_size == num_parts else {}
    shared = {name for name in checkpoint.names if json.loads(name)[:1] == ["optimizer"]}
    if not shared or keeps_own(prepared):
        own = private.get("optimizer")
        if not keeps_own(prepared) or own is None:
            raise ConfigError(
                f"{checkpoint.folder} was made by {num_parts} ranks, and there are {processes.world_size}",
                needed=f'{num_parts} ranks and the same shard_strategy, because optim = "{config.optim}" keeps a state '
                "for each",
            )
        for stored, value in own.items():
            parameter, key = _place(checkpoint, stored, parameters)
            put_state(prepared.optimizer, parameter, key, value.to(processes.device) if value.dim() else value)
    for name in sorted(shared):
        stored = str(json.loads(name)[-1])
        parameter, key = _place(checkpoint, stored, parameters)
        _restore_moment(checkpoint, name, key, parameter, prepared, config)
        processes.lease.sign()
    check_moments(checkpoint.folder, prepared)
    if "rng" in private:
        _set_random_state(private["rng"], processes.device)


def _restore_moment(
    checkpoint: Checkpoint,
    name: str,
    key: str,
    parameter: torch.Tensor,
    prepared: Prepared,
    config: TrainConfig,
) -> None:
    """Read one tensor of the optimiser into where it belongs."""
    optimizer = prepared.optimizer
    if isinstance(optimizer, OffloadedAdamW) and key != "step":
        checkpoint.fill(name, optimizer.state[parameter][key])
        optimizer.release()
        return
    if key == "step":
        value = checkpoint.tensor(name)
        value = value.to(parameter.device) if config.optim == "adamw_torch_fused" else value
    elif isinstance(optimizer, AdamW8bit):
        value = checkpoint.tensor(name).to(parameter.device)
    else:
        value = torch.empty_like(parameter.detach())
        checkpoint.fill(name, value)
    put_state(optimizer, parameter, key, value)


def _place(
    checkpoint: Checkpoint, stored: str, parameters: dict[str, torch.nn.Parameter]
) -> tuple[torch.nn.Parameter, str]:
    """The parameter that a name such as `exp_avg.NAME` belongs to, and the key."""
    key, _, name = stored.partition(".")
    if name not in parameters:
        raise FileFormatError(
            f"{checkpoint.folder} has {shorten(stored)}", needed="the state of this model's parameters"
        )
    return parameters[name], key


def _nest(prepared: Prepared, config: TrainConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state that all ranks hold, and what belongs to this one."""
    parameters = dict(prepared.model.named_parameters())
    model = {stored: parameters[name] for stored, name in learned_names(prepared, config).items()}
    moments = dict(state_tensors(prepared.model, prepared.optimizer))
    if keeps_own(prepared):
        return {"model": model}, {"optimizer": moments}
    return {"model": model, "optimizer": moments}, {}


def _random_state(device: torch.device) -> list[torch.Tensor]:
    state = [torch.get_rng_state()]
    if device.type == "cuda":
        state.append(torch.cuda.get_rng_state(device))
    return state


def _set_random_state(state: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda" and len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"checkpoints.remote is {folder}, which cannot be made ({error.strerror})", needed="a folder to write into"
        ) from None
