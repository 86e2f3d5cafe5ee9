"""Windows of all heads, chosen from the samples that a gate is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from dseek.core.attention_pattern import BLOCK_TOKENS
from dseek.core.shape import ModelShape
from dseek.models.window_choice import WindowChoice, choose_windows, held_mass, windows_to_choose


def sample_windows(files: Sequence[Path], shape: ModelShape, choice: WindowChoice) -> torch.Tensor:
    """Choose the windows of all key-value heads.

    Args:
        files: of `dseek.train.gate_training.make_samples`.
        shape: the model.
        choice: what the windows have to hold, and their mean.

    Returns:
        int64 [layers, G], tokens.
    """
    layers = range(shape.num_layers)
    rows_by_layer = [torch.cat([_read(file, f"{layer}.rows") for file in files]) for layer in layers]
    windows = windows_to_choose(rows_by_layer)
    held_LHW = torch.zeros(shape.num_layers, shape.num_heads, len(windows), dtype=torch.float64)
    squared_LHW = torch.zeros_like(held_LHW)
    for file in files:
        for layer in layers:
            mass_RHB, rows_R = _read(file, f"{layer}.mass").double(), _read(file, f"{layer}.rows")
            held_LHW[layer] += held_mass(mass_RHB, rows_R, windows)
            squared_LHW[layer] += held_mass(mass_RHB.square(), rows_R, windows)
    # Rows are drawn anew in every layer, so that layers differ in how many count.
    counts_L = torch.tensor(
        [int((rows_R // BLOCK_TOKENS * BLOCK_TOKENS >= windows[-1]).sum()) for rows_R in rows_by_layer]
    )
    counts_L11 = counts_L.clamp(min=1)[:, None, None]
    chosen = choose_windows(held_LHW / counts_L11, squared_LHW / counts_L11, shape.num_kv_heads, windows, choice)
    return torch.tensor(chosen, dtype=torch.int64)


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(str(file), framework="pt") as stored:
        tensor: torch.Tensor = stored.get_tensor(name)
        return tensor
