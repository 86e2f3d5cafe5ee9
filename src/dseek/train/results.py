"""What a training writes: checkpoints to go on from, and at the end a model or an adapter in the usual layout."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from dseek.core.errors import ConfigError, FileFormatError
from dseek.models.config_values import shorten
from dseek.train import saving
from dseek.train.adamw_8bit import AdamW8bit, moment_sizes
from dseek.train.config import TrainConfig
from dseek.train.lora import (
    ADAPTER_WEIGHTS,
    PREFIX,
    LoraLinear,
    is_adapter,
    merged_weight,
    write_adapter_config,
)
from dseek.train.optimizers import put_state, release, state_tensors
from dseek.train.preparation import Prepared
from dseek.train.processes import Processes
from dseek.train.saving import Folder, TrainerState
from dseek.train.shards import like, local, put, whole

MERGED = "merged"
"""Folder of the whole model that an adapter was merged into."""


def save_checkpoint(
    output_dir: Path, state: TrainerState, prepared: Prepared, config: TrainConfig, processes: Processes
) -> Path:
    """Write a checkpoint. All ranks call this together.

    Args:
        output_dir: the training's folder.
        state: where it is.
        prepared: model and optimiser.
        config: the training.
        processes: who writes.

    Returns:
        The checkpoint's folder.
    """
    folder = Folder(saving.checkpoint_folder(output_dir, state.global_step), is_first=processes.is_first)
    folder.begin()
    processes.wait()  # nobody writes before the folder is there
    _write_model(folder.path, prepared, config, processes)
    moments = list(state_tensors(prepared.model, prepared.optimizer))
    own = keeps_own(prepared)
    file = saving.optimizer_file(folder.path, own=own, rank=processes.rank, world_size=processes.world_size)

    def let_go(_: str, tensor: torch.Tensor) -> torch.Tensor:
        release(prepared.optimizer)
        processes.lease.sign()
        return tensor

    saving.write_tensors(file, moments, writes=own or processes.is_first, change=let_go)
    processes.wait()  # nobody renames before all have written
    if processes.is_first:
        saving.write_state(folder.path, state)
    folder.finish()
    if processes.is_first:
        saving.remove_old(output_dir, config.save_total_limit)
    return saving.checkpoint_folder(output_dir, state.global_step)


def restore(folder: Path, state: TrainerState, prepared: Prepared, config: TrainConfig, processes: Processes) -> None:
    """Take up weights and the optimiser's state from a checkpoint.

    Args:
        folder: the checkpoint.
        state: what it says of itself.
        prepared: model and optimiser, changed in place.
        config: the training.
        processes: who takes what.

    Raises:
        ConfigError: the optimiser's state is of another number of ranks.
        FileFormatError: a file is broken.
    """
    names = learned_names(prepared, config)
    weights = folder / (ADAPTER_WEIGHTS if config.method == "lora" else saving.WEIGHTS)
    parameters = dict(prepared.model.named_parameters())
    for stored, tensor in saving.read_tensors(weights, names):
        _check_shape(weights, stored, tensor, parameters[names[stored]])
        put(parameters[names[stored]], tensor)
    file = folder / saving.OPTIMIZER
    own = folder / f"optimizer-{processes.rank + 1:05d}-of-{processes.world_size:05d}.safetensors"
    if not file.is_file() and not own.is_file():
        raise ConfigError(
            f"{folder} was made by {state.world_size} ranks, and there are {processes.world_size}",
            needed=f"{state.world_size} ranks, because optim = {config.optim!r} keeps a state for each",
        )
    file = own if own.is_file() else file
    fused = config.optim == "adamw_torch_fused"
    for stored, tensor in saving.read_tensors(file, saving.stored_names(file)):
        key, _, name = stored.partition(".")
        if name not in parameters:
            raise FileFormatError(f"{file} has {shorten(stored)}", needed="the state of this model's parameters")
        parameter = parameters[name]
        if tensor.dim() == 0:
            value = tensor.to(processes.device) if fused else tensor
        elif isinstance(parameter, DTensor) and file == own:
            value = tensor.to(processes.device)
        else:
            if key in ("exp_avg", "exp_avg_sq") and tensor.is_floating_point() and config.optim != "adamw_8bit":
                _check_shape(file, stored, tensor, parameter)
            value = like(parameter, tensor)
        put_state(prepared.optimizer, parameter, key, value)
    check_moments(file, prepared)


def _check_shape(file: Path, name: str, tensor: torch.Tensor, parameter: torch.Tensor) -> None:
    if tensor.shape != parameter.shape:
        raise FileFormatError(
            f"{file}: {shorten(name)} has the shape {tuple(tensor.shape)}", needed=str(tuple(parameter.shape))
        )


def save_result(output_dir: Path, prepared: Prepared, config: TrainConfig, processes: Processes) -> list[str]:
    """Write the result into the training's folder. All ranks call this together.

    Args:
        output_dir: the training's folder.
        prepared: the model.
        config: the training.
        processes: who writes.

    Returns:
        Names of the files written, those of a merged model with their folder.
    """
    folder = Folder(output_dir / "result", is_first=processes.is_first)
    folder.begin()
    processes.wait()
    _write_model(folder.path, prepared, config, processes)
    files: list[str] = []
    if processes.is_first:
        files = sorted(path.name for path in folder.path.iterdir())
        saving.move_files(folder.path, output_dir, ADAPTER_WEIGHTS if config.method == "lora" else saving.WEIGHTS)
    if config.method == "lora" and config.lora.merge:
        merged = Folder(output_dir / MERGED, is_first=processes.is_first)
        merged.begin()
        processes.wait()
        _write_merged(merged.path / saving.WEIGHTS, prepared, writes=processes.is_first)
        if processes.is_first:
            prepared.source.describe(merged.path)
            files += sorted(f"{MERGED}/{path.name}" for path in merged.path.iterdir())
        merged.finish()
    return files


def _write_model(folder: Path, prepared: Prepared, config: TrainConfig, processes: Processes) -> None:
    """The model, or the adapter, in the usual layout."""
    parameters = dict(prepared.model.named_parameters())
    listed = [(stored, parameters[name]) for stored, name in learned_names(prepared, config).items()]
    lora = config.method == "lora"

    def sign(_: str, tensor: torch.Tensor) -> torch.Tensor:
        processes.lease.sign()
        return tensor

    file = folder / (ADAPTER_WEIGHTS if lora else saving.WEIGHTS)
    saving.write_tensors(file, listed, writes=processes.is_first, change=sign)
    if not processes.is_first:
        return
    if lora:
        write_adapter_config(folder, config.lora, config.model)
    else:
        prepared.source.describe(folder)


def keeps_own(prepared: Prepared) -> bool:
    """Tell whether each rank's moments are its own: those in blocks are of its part of a parameter, and stay with it.

    Args:
        prepared: model and optimiser.
    """
    return prepared.shards.is_sharded and isinstance(prepared.optimizer, AdamW8bit)


def check_moments(place: Path, prepared: Prepared) -> None:
    """Make sure that 8-bit moments are of this rank's parts; those of other optimisers were read by their shapes.

    Args:
        place: where they were read from, for the message.
        prepared: model and optimiser, whose state is there.

    Raises:
        ConfigError: they are of other parts.
    """
    if not isinstance(prepared.optimizer, AdamW8bit):
        return
    for parameter, state in prepared.optimizer.state.items():
        found = {key: (tuple(value.shape), value.dtype) for key, value in state.items() if key != "step"}
        if found != moment_sizes(local(parameter).numel()):
            raise ConfigError(
                f"{place} has 8-bit moments of other parts than this rank's",
                needed="the number of ranks and the memory.shard_strategy it was made with",
            )


def learned_names(prepared: Prepared, config: TrainConfig) -> dict[str, str]:
    """Give the names in files and the parameters' names: of all weights, or of the adapters.

    Args:
        prepared: the model.
        config: the training.
    """
    names = [name for name, _ in prepared.model.named_parameters()]
    if config.method == "lora":
        return {PREFIX + name.removeprefix("decoder."): name for name in names if is_adapter(name)}
    return {name.removeprefix("decoder."): name for name in names}


def _write_merged(path: Path, prepared: Prepared, *, writes: bool) -> None:
    """Weights with their adapters added, one at a time."""
    decoder = prepared.model.decoder

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        owner = decoder.get_submodule(name.rpartition(".")[0])
        if not (isinstance(owner, LoraLinear) and name.endswith(".weight")):
            return weight
        a_RD, b_FR = whole(owner.lora_A.weight.detach()), whole(owner.lora_B.weight.detach())
        return merged_weight(weight, a_RD, b_FR, owner.scale)

    kept = [(name, parameter) for name, parameter in decoder.named_parameters() if not is_adapter(name)]
    saving.write_tensors(path, kept, writes=writes, change=change)
