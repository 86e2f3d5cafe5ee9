"""Move the weights of a Hugging Face folder off the grid they were quantised to, and keep what the model computes.

A file that was once stored in 4 bits is exact in 4 bits, so that nothing can be learned from it about what rounding
costs. Random factors on the channels between two layers (on a norm's weight, the value or the up projection) are taken
back in the columns of the next projection: the function stays the same in exact arithmetic, and every group of weights
must be rounded anew.

Run: `python move_off_grid.py SOURCE TARGET SEED SPREAD`.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def move_off_grid(source: Path, target: Path, seed: int, spread: float) -> None:
    """Write a folder whose model computes the same from other weights.

    Args:
        source: a Llama folder with one `model.safetensors`.
        target: the folder to fill, which exists.
        seed: of the factors.
        spread: factors are log-uniform from 1 / spread to spread.
    """
    config = json.loads((source / "config.json").read_text())
    weights = {name: value.float() for name, value in load_file(source / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(seed)
    num_groups = config["num_attention_heads"] // config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]

    def factors(count: int) -> torch.Tensor:
        return torch.exp((2 * torch.rand(count, generator=generator) - 1) * math.log(spread))

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        joints = (
            (prefix + "input_layernorm", [attention + name for name in ("q_proj", "k_proj", "v_proj")], 1),
            (prefix + "post_attention_layernorm", [mlp + "gate_proj", mlp + "up_proj"], 1),
            (attention + "v_proj", [attention + "o_proj"], num_groups),
            (mlp + "up_proj", [mlp + "down_proj"], 1),
        )
        for before, after, repeat in joints:
            gain = factors(weights[before + ".weight"].shape[0])
            weights[before + ".weight"] *= gain if weights[before + ".weight"].ndim == 1 else gain[:, None]
            # Each value head is read by the query heads of its group.
            columns = gain.view(-1, 1, head_dim).expand(-1, repeat, -1).reshape(-1) if repeat > 1 else gain
            for name in after:
                weights[name + ".weight"] /= columns
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    for path in source.glob("*.json"):
        shutil.copy(path, target / path.name)


if __name__ == "__main__":
    move_off_grid(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
