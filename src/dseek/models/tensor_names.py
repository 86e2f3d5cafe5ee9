"""Names of a model's tensors: the canonical (Hugging Face) ones, what a shape needs, and what GGUF calls them."""

from __future__ import annotations

import re

from dseek.core.shape import ModelShape

_GGUF_TABLES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_BLOCK_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CANONICAL_TABLES = {canonical: name for name, canonical in _GGUF_TABLES.items()}
_CANONICAL_PARTS = {canonical: name for name, canonical in _GGUF_BLOCK_PARTS.items()}
_GGUF_BLOCK_NAME = re.compile(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)")
_ROTATED = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.(?:weight|bias)")

GGUF_ROPE_DIVISORS = "rope_freqs.weight"
"""GGUF tensor with the divisors of the rotary frequencies (Llama 3.1 and later)."""


def canonical_from_gguf(name: str) -> str | None:
    """Translate a GGUF tensor name.

    Args:
        name: such as `blk.0.attn_q.weight`.

    Returns:
        Such as `model.layers.0.self_attn.q_proj.weight`; None where the name is none of a decoder's.
    """
    if name in _GGUF_TABLES:
        return _GGUF_TABLES[name]
    match = _GGUF_BLOCK_NAME.fullmatch(name)
    if match is None or match[2] not in _GGUF_BLOCK_PARTS:
        return None
    return f"model.layers.{int(match[1])}.{_GGUF_BLOCK_PARTS[match[2]]}.{match[3]}"


def gguf_name(name: str) -> str:
    """Translate a canonical name to GGUF's.

    Args:
        name: canonical name of a decoder's tensor.

    Returns:
        Such as `blk.0.attn_q.weight`.

    Raises:
        KeyError: it is none of a decoder's.
    """
    if name in _CANONICAL_TABLES:
        return _CANONICAL_TABLES[name]
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    module, _, kind = part.rpartition(".")
    return f"blk.{layer}.{_CANONICAL_PARTS[module]}.{kind}"


def canonical_from_safetensors(name: str) -> str | None:
    """Translate the name of a tensor in a Hugging Face checkpoint.

    Args:
        name: such as `model.norm.weight`, or `norm.weight` in a checkpoint saved without its head.

    Returns:
        The canonical name; None for a buffer that old checkpoints store and nobody needs.
    """
    if name.endswith(".rotary_emb.inv_freq"):
        return None
    return name if name.startswith(("model.", "lm_head.")) else "model." + name


def rotated_heads(name: str, shape: ModelShape) -> int | None:
    """Tell how many heads are rotated in the rows of a tensor.

    Args:
        name: canonical name.
        shape: the model's shape.

    Returns:
        Heads in the rows of a q or k projection (or bias); None for every other tensor.
    """
    match = _ROTATED.fullmatch(name)
    if match is None:
        return None
    return shape.num_heads if match[1] == "q" else shape.num_kv_heads


def expected_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """List the tensors that a shape needs.

    Args:
        shape: the model's shape.

    Returns:
        Canonical name to tensor shape, in the order of use.
    """
    hidden, inner, query, kv = shape.hidden_size, shape.intermediate_size, shape.query_size, shape.kv_size
    projections = {
        "self_attn.q_proj": (query, hidden, shape.qkv_bias),
        "self_attn.k_proj": (kv, hidden, shape.qkv_bias),
        "self_attn.v_proj": (kv, hidden, shape.qkv_bias),
        "self_attn.o_proj": (hidden, query, shape.output_bias),
        "mlp.gate_proj": (inner, hidden, shape.mlp_bias),
        "mlp.up_proj": (inner, hidden, shape.mlp_bias),
        "mlp.down_proj": (hidden, inner, shape.mlp_bias),
    }
    block: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for part, (rows, columns, has_bias) in projections.items():
        block[part + ".weight"] = (rows, columns)
        if has_bias:
            block[part + ".bias"] = (rows,)
    if shape.qk_norm:
        block["self_attn.q_norm.weight"] = (shape.head_dim,)
        block["self_attn.k_norm.weight"] = (shape.head_dim,)
    block["post_attention_layernorm.weight"] = (hidden,)

    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.num_layers):
        for part, sizes in block.items():
            tensors[f"model.layers.{layer}.{part}"] = sizes
    tensors["model.norm.weight"] = (hidden,)
    if not shape.tie_word_embeddings:
        tensors["lm_head.weight"] = (shape.vocab_size, hidden)
    return tensors


ROLE_MODULES: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Linear layers of a block that are fused into one projection, by `ModelShape.linear_sizes`' name of it."""
