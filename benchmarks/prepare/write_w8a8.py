"""Round a Hugging Face folder to W8A8 in the `compressed-tensors` layout that vLLM reads.

Weights int8 with one scale an output channel (symmetric, plain rounding), activations int8 with one scale a token,
found at run time; embedding and head stay as they are. Run: `python write_w8a8.py HF_FOLDER FOLDER`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

SCHEME: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
"""`quantization_config` of the written `config.json`."""


def round_channels(weight: Any) -> tuple[Any, Any]:
    """Round a weight to int8, one scale a row.

    Args:
        weight: tensor [N, K] of any floating dtype.

    Returns:
        int8 [N, K] and float32 [N, 1].
    """
    import torch

    wide = weight.float()
    scale = wide.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127.0
    return torch.round(wide / scale).clamp(-127, 127).to(torch.int8), scale


def write(source: Path, target: Path) -> None:
    """Write the rounded copy.

    Args:
        source: Hugging Face folder with one or more safetensors files.
        target: the folder, which exists.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                tensor = handle.get_tensor(name)
                if name.endswith("_proj.weight"):
                    tensors[name], scale = round_channels(tensor)
                    tensors[name.removesuffix("weight") + "weight_scale"] = scale.to(torch.bfloat16)
                else:
                    tensors[name] = tensor.to(torch.bfloat16)
    save_file(tensors, str(target / "model.safetensors"), metadata={"format": "pt"})
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and path.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy(path, target)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = SCHEME
    config.pop("dtype", None)
    config["torch_dtype"] = "bfloat16"
    (target / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
