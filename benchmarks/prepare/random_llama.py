"""Write a Llama with random weights from a seed, as a Hugging Face folder in bf16.

Speed does not depend on what the weights say, so this stands for models that no package carries. Run:
`python random_llama.py FOLDER CONFIG_JSON SEED`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def write(target: Path, sizes: dict[str, Any], seed: int) -> None:
    """Write `config.json` and `model.safetensors`.

    Args:
        target: the folder, which exists.
        sizes: fields of `config.json` beside the fixed ones: hidden_size, intermediate_size, num_hidden_layers,
            num_attention_heads, num_key_value_heads, vocab_size.
        seed: seed of the weights, normal with the deviation 0.02 and norms of 1.
    """
    import torch
    from safetensors.torch import save_file

    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "head_dim": head_dim,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **sizes,
    }
    generator = torch.Generator().manual_seed(seed)
    width, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    kv_width = sizes["num_key_value_heads"] * head_dim

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).to(torch.bfloat16)

    ones = torch.ones(width, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": matrix(vocabulary, width), "model.norm.weight": ones.clone()}
    for index in range(sizes["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        tensors |= {
            f"{prefix}input_layernorm.weight": ones.clone(),
            f"{prefix}self_attn.q_proj.weight": matrix(width, width),
            f"{prefix}self_attn.k_proj.weight": matrix(kv_width, width),
            f"{prefix}self_attn.v_proj.weight": matrix(kv_width, width),
            f"{prefix}self_attn.o_proj.weight": matrix(width, width),
            f"{prefix}post_attention_layernorm.weight": ones.clone(),
            f"{prefix}mlp.gate_proj.weight": matrix(inner, width),
            f"{prefix}mlp.up_proj.weight": matrix(inner, width),
            f"{prefix}mlp.down_proj.weight": matrix(width, inner),
        }
    tensors["lm_head.weight"] = matrix(vocabulary, width)
    save_file(tensors, str(target / "model.safetensors"), metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    write(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
