"""The optimiser of a training, its groups, and its state by name.

Matrices decay, vectors (norms, biases) do not, as in transformers. State is asked for and put back by the parameter's
name and as whole tensors, so that it can be kept by one number of ranks and taken up by another.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dseek.core.errors import ConfigError
from dseek.train.adamw_8bit import AdamW8bit
from dseek.train.config import TrainConfig
from dseek.train.offload import OffloadedAdamW
from dseek.train.processes import Processes
from dseek.train.shards import local


def make_optimizer(model: nn.Module, config: TrainConfig, processes: Processes) -> torch.optim.Optimizer:
    """Make the optimiser of the parameters that are learned.

    Args:
        model: whose parameters have their memory.
        config: which optimiser, its figures, and where its state lies.
        processes: this rank, and where it computes.

    Raises:
        ConfigError: the state is to lie where it would lie anyway, or there is no room for it.
    """
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learned if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in learned if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.optim == "adamw_8bit":
        return AdamW8bit(groups, **options)
    offload = config.memory.offload_optimizer
    if offload == "cpu" and processes.device.type == "cpu":
        raise ConfigError(
            'memory.offload_optimizer is "cpu", and the processor computes',
            needed='"none" or "disk": its memory is where the state lies anyway',
        )
    if offload != "none":
        file = Path(config.output_dir) / f"moments-{processes.rank + 1:05d}.bin" if offload == "disk" else None
        return OffloadedAdamW(groups, file, **options)
    return torch.optim.AdamW(groups, **options, fused=config.optim == "adamw_torch_fused")


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next step.

    Args:
        optimizer: of `make_optimizer`.
        rate: of all groups.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the optimiser's tensors by name, shared ones as they are.

    Args:
        model: whose parameters are learned.
        optimizer: of it, after at least one step.

    Yields:
        `exp_avg.NAME` and so on, in an order that depends on the model alone.
    """
    for name, parameter in model.named_parameters():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            yield f"{key}.{name}", value


def put_state(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, key: str, value: torch.Tensor) -> None:
    """Put a tensor of a kept state where the optimiser has it.

    Args:
        optimizer: of `make_optimizer`.
        parameter: whose state it is.
        key: of the state, such as `exp_avg`.
        value: shared as the parameter is.
    """
    if isinstance(optimizer, OffloadedAdamW) and key != "step":
        local(optimizer.state[parameter][key]).copy_(local(value))
        optimizer.release()
    else:
        optimizer.state[parameter][key] = value


def release(optimizer: torch.optim.Optimizer) -> None:
    """Let go of memory that reading a state has brought in.

    Args:
        optimizer: of `make_optimizer`.
    """
    if isinstance(optimizer, OffloadedAdamW):
        optimizer.release()


def end(optimizer: torch.optim.Optimizer, config: TrainConfig, rank: int) -> None:
    """Take away what an optimiser has beside its state.

    Args:
        optimizer: of `make_optimizer`.
        config: the training.
        rank: this process.
    """
    if isinstance(optimizer, OffloadedAdamW):
        optimizer.close()
        (Path(config.output_dir) / f"moments-{rank + 1:05d}.bin").unlink(missing_ok=True)
