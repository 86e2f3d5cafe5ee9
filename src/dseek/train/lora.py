"""Low-rank adapters: a frozen projection and two small learned matrices beside it, in the names and files of PEFT.

`attach` replaces projections by ones with an adapter; the projection's own weight keeps its name, so that a model's
weights are found as before. `write_adapter` writes the folder that PEFT and vLLM load, `merged_weight` what the
projection is with its adapter. D inputs, F outputs, R rank.

Source: Hu et al. 2021, LoRA, section 4.1; the scale by the root of the rank: Kalajdzievski 2023, rsLoRA, section 3.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dseek.core.errors import ConfigError
from dseek.core.files import atomic_write_text
from dseek.models.decoder import Decoder
from dseek.train.config import LoraOptions

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's parameters."""


class LoraLinear(nn.Module):
    """A linear layer with an adapter.

    Args:
        linear: the layer; its parameters are taken over.
        options: rank, scale, dropout.
    """

    def __init__(self, linear: nn.Linear, options: LoraOptions) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        device, dtype = linear.weight.device, linear.weight.dtype
        self.lora_A = nn.Linear(linear.in_features, options.r, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(options.r, linear.out_features, bias=False, device=device, dtype=dtype)
        self.scale = options.lora_alpha / (math.sqrt(options.r) if options.use_rslora else options.r)
        self.dropout = options.lora_dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x`, [..., D], to [..., F]."""
        dropped = F.dropout(x, self.dropout, self.training)
        return F.linear(x, self.weight, self.bias) + self.lora_B(self.lora_A(dropped)) * self.scale


def attach(decoder: Decoder, options: LoraOptions) -> None:
    """Give projections an adapter, and freeze everything else.

    Args:
        decoder: changed in place.
        options: which projections, and how.

    Raises:
        ConfigError: a name in `target_modules` is no projection of this decoder.
    """
    decoder.requires_grad_(False)
    known = {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    unknown = [name for name in options.target_modules if name not in known - {"lm_head"}]
    if unknown:
        raise ConfigError(
            f"lora.target_modules names {unknown[0]!r}", needed="one of " + ", ".join(sorted(known - {"lm_head"}))
        )
    targets = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    for name in targets:
        parent, _, own = name.rpartition(".")
        if own in options.target_modules and parent:
            linear = decoder.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            setattr(decoder.get_submodule(parent), own, LoraLinear(linear, options))


def initial_adapter(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draw an adapter's matrix: A uniform as PyTorch draws a linear layer's, B zero, so that nothing changes at first.

    Args:
        name: of the parameter.
        shape: its shape.
        generator: draws.
    """
    if name.endswith("lora_B.weight"):
        return torch.zeros(shape)
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def is_adapter(name: str) -> bool:
    """Tell whether a parameter belongs to an adapter.

    Args:
        name: of the parameter.
    """
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def merged_weight(weight: torch.Tensor, a_RD: torch.Tensor, b_FR: torch.Tensor, scale: float) -> torch.Tensor:
    """Add an adapter to its projection.

    Args:
        weight: [F, D].
        a_RD: [R, D].
        b_FR: [F, R].
        scale: of the adapter's output.

    Returns:
        [F, D], in the dtype of `weight`.
    """
    return (weight.float() + scale * (b_FR.float() @ a_RD.float())).to(weight.dtype)


def write_adapter_config(folder: Path, options: LoraOptions, base_model: str) -> None:
    """Write adapter_config.json as PEFT reads it.

    Args:
        folder: where to.
        options: of the adapters.
        base_model: name of the model they belong to.
    """
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": options.r,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "target_modules": sorted(options.target_modules),
        "use_rslora": options.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    atomic_write_text(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
