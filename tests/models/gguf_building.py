"""Small GGUF files for tests, written with the `gguf` package (the oracle) from random weights.

`write_model` makes a whole model: decoder weights in a chosen encoding, laid out as llama.cpp's converter does, and a
tokenizer of either kind. `weights` are what a reader must give back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize, quantize

from dseek.core.shape import ModelShape
from dseek.models.tensor_names import expected_tensors
from tests.models import tiny

SIZES = {"hidden": 64, "inner": 96, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 384}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Translate a canonical tensor name to GGUF's."""
    tables = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem in tables:
        return f"{tables[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.{kind}"


def shape_of(architecture: str = "llama", *, tied: bool = True, vocab: int = SIZES["vocab"]) -> ModelShape:
    """The shape of the models written here."""
    return ModelShape(
        family=architecture,
        vocab_size=vocab,
        hidden_size=SIZES["hidden"],
        intermediate_size=SIZES["inner"],
        num_layers=SIZES["layers"],
        num_heads=SIZES["heads"],
        num_kv_heads=SIZES["kv_heads"],
        head_dim=SIZES["head_dim"],
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
    )


def random_weights(shape: ModelShape, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw float32 weights in Hugging Face's layout."""
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(size).astype(np.float32) for name, size in expected_tensors(shape).items()}


def rotated_layout(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a q or k projection as llama.cpp's converter does for the llama architecture."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def byte_level_metadata() -> dict[str, Any]:
    """Metadata of a byte-level BPE tokenizer: the one of `tiny`, padded to the vocabulary size."""
    model = json.loads(tiny.tokenizer_json())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    kinds = [3] * 4 + [1] * (len(tokens) - 4)
    while len(tokens) < SIZES["vocab"]:
        tokens.append(f"[PAD{len(tokens)}]")
        kinds.append(5)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": tiny.CHAT_TEMPLATE,
    }


def write_model(
    path: Path,
    architecture: str = "llama",
    *,
    encoding: str = "F32",
    tied: bool = True,
    tokenizer: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    parts: int = 1,
) -> dict[str, np.ndarray]:
    """Write a model.

    Args:
        path: the file, or with several parts the stem (`model.gguf` becomes `model-00001-of-00002.gguf`).
        architecture: llama, qwen2 or qwen3.
        encoding: of the matrices; norms and biases are F32.
        tied: there is no head of its own.
        tokenizer: its metadata; None takes `byte_level_metadata`, empty leaves it out.
        metadata: further entries; None as a value removes one.
        weights: canonical name to float32; None draws them.
        extra: further F32 tensors by GGUF name.
        parts: number of files.

    Returns:
        The weights a reader must give back, widened from their encoding, in Hugging Face's layout.
    """
    vocabulary = byte_level_metadata() if tokenizer is None else dict(tokenizer)
    shape = shape_of(architecture, tied=tied, vocab=len(vocabulary.get("tokenizer.ggml.tokens", range(SIZES["vocab"]))))
    weights = random_weights(shape) if weights is None else weights
    entries: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "block_count": shape.num_layers,
        "context_length": shape.max_position_embeddings,
        "embedding_length": shape.hidden_size,
        "feed_forward_length": shape.intermediate_size,
        "attention.head_count": shape.num_heads,
        "attention.head_count_kv": shape.num_kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "rope.dimension_count": shape.head_dim,
        "rope.freq_base": 10000.0,
    }
    entries = {f"{architecture}.{key}": value for key, value in entries.items()}
    entries |= vocabulary | dict(metadata or {})
    kind = gguf.GGMLQuantizationType[encoding]
    stored: list[tuple[str, np.ndarray, gguf.GGMLQuantizationType]] = []
    expected: dict[str, np.ndarray] = {}
    for name, values in weights.items():
        laid_out = values
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            laid_out = rotated_layout(values, shape.num_heads if "q_proj" in name else shape.num_kv_heads)
        tensor_kind = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        stored.append((gguf_name(name), quantize(laid_out, tensor_kind), tensor_kind))
        expected[name] = dequantize(quantize(values, tensor_kind), tensor_kind).reshape(values.shape)
    for name, values in (extra or {}).items():
        stored.append((name, values.astype(np.float32), gguf.GGMLQuantizationType.F32))

    for part in range(parts):
        part_path = path if parts == 1 else path.with_name(f"{path.stem}-{part + 1:05d}-of-{parts:05d}.gguf")
        writer = gguf.GGUFWriter(str(part_path), architecture)
        if part == 0:
            for key, value in entries.items():
                _add(writer, key, value)
        if parts > 1:
            writer.add_uint16("split.no", part)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(stored))
        for name, data, tensor_kind in stored[part::parts]:
            writer.add_tensor(name, data, raw_dtype=tensor_kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return expected


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, list(value))
