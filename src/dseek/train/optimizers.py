"""The optimiser of a training, its groups, and its state by name.

Matrices decay, vectors (norms, biases) do not, as in transformers. State is asked for and put back by the parameter's
name and as whole tensors, so that it can be kept by one number of ranks and taken up by another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dseek.train.adamw_8bit import AdamW8bit
from dseek.train.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Make the optimiser of the parameters that are learned.

    Args:
        model: whose parameters have their memory.
        config: which optimiser, and its figures.
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
