"""Metadata of a GGUF file: copied from another one, or made of a Hugging Face folder's shape and tokenizer.json.

Of tokenizers only the byte-level kind is written (GPT-2, Llama 3, Qwen2, SmolLM2 and the like), and only where the way
it cuts words is one that GGUF has a name for.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from dseek.core.errors import UnsupportedModelError
from dseek.core.shape import ModelShape, RopeShape
from dseek.models.files import ModelFiles
from dseek.models.hf_codec import SPLITS
from dseek.models.rope import inverse_frequencies
from dseek.models.tensor_names import GGUF_ROPE_DIVISORS

_OWN = ("general.architecture", "general.file_type", "general.quantization_version")
_PRE_NAMES = {"gpt2": "gpt-2", "smollm": "smollm", "llama3": "llama-bpe", "qwen2": "qwen2", "tekken": "tekken"}
"""Keys of `SPLITS` to `tokenizer.ggml.pre`."""
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def copy_metadata(writer: Any, source: Path) -> None:
    """Copy everything but what the writer says itself, and what tells the parts of a split file.

    Args:
        writer: a `gguf.GGUFWriter`.
        source: a GGUF file that was opened and checked.
    """
    from gguf import GGUFReader, GGUFValueType

    for field in GGUFReader(str(source)).fields.values():
        if field.name in _OWN or field.name.startswith(("GGUF.", "split.")):
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)


def extra_tensors(shape: ModelShape) -> list[tuple[str, np.ndarray]]:
    """Make the tensors that GGUF has beside a model's weights.

    Args:
        shape: the model.

    Returns:
        Name and float32 values: the divisors of rotary frequencies of Llama 3.1 and later, where there are some.
    """
    divisors = shape.rope.frequency_divisors
    if divisors is None and shape.rope.kind == "llama3":
        plain, _ = inverse_frequencies(dataclasses.replace(shape, rope=RopeShape(theta=shape.rope.theta)))
        scaled, _ = inverse_frequencies(shape)
        divisors = tuple((plain / scaled).tolist())
    return [] if divisors is None else [(GGUF_ROPE_DIVISORS, np.array(divisors, dtype=np.float32))]


def add_metadata(writer: Any, files: ModelFiles) -> None:
    """Describe a model of a Hugging Face folder.

    Args:
        writer: a `gguf.GGUFWriter` of the model's architecture.
        files: the opened folder.

    Raises:
        UnsupportedModelError: a rotation, a window or a tokenizer that GGUF cannot say.
    """
    shape = files.shape
    if shape.window_layers is not None or (shape.sliding_window is not None and shape.family != "mistral"):
        raise UnsupportedModelError("a sliding window in some layers cannot be said in GGUF", needed="none, or in all")
    writer.add_name(files.path.name)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope.theta)
    writer.add_vocab_size(shape.vocab_size)
    if shape.sliding_window is not None:
        writer.add_sliding_window(shape.sliding_window)
    _add_rope_scaling(writer, shape)
    _add_tokenizer(writer, files)


def _add_rope_scaling(writer: Any, shape: ModelShape) -> None:
    from gguf import RopeScalingType

    rope = shape.rope
    if rope.kind in ("default", "llama3"):
        return
    plain_yarn = rope.attention_factor is None and rope.mscale is None and rope.mscale_all_dim is None
    if rope.kind not in ("linear", "yarn") or (rope.kind == "yarn" and not (plain_yarn and rope.truncate)):
        raise UnsupportedModelError(
            f"a rotary embedding of the kind {rope.kind} with these options cannot be said in GGUF",
            needed="none, linear, yarn or llama3",
            remedy="write --format compressed-tensors",
        )
    writer.add_rope_scaling_type(RopeScalingType(rope.kind))
    writer.add_rope_scaling_factor(rope.factor)
    if rope.kind == "yarn":
        original = rope.original_max_position_embeddings or shape.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)


def _add_tokenizer(writer: Any, files: ModelFiles) -> None:
    tokenizer = files.tokenizer()
    described = json.loads(tokenizer.to_json())
    model, size = described["model"], files.shape.vocab_size
    pre = _pre_tokenizer(described)
    if model.get("type") != "BPE" or pre is None:
        raise UnsupportedModelError(
            f"the tokenizer of {files.path} is of a kind that is not written to GGUF",
            needed="byte-level BPE that cuts words as one of " + ", ".join(_PRE_NAMES.values()),
            remedy="write --format compressed-tensors, or start from a GGUF file",
        )
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [_UNUSED] * size
    for token, index in model["vocab"].items():
        if index < size:
            tokens[index], kinds[index] = token, _NORMAL
    for added in described.get("added_tokens", []):
        if added["id"] < size:
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = _CONTROL if added.get("special") else _USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_PRE_NAMES[pre])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.eos_token_ids:
        writer.add_eos_token_id(tokenizer.eos_token_ids[0])
    padding = tokenizer.special_tokens.get("pad_token")
    if padding is not None and tokenizer.token_id(padding) is not None:
        writer.add_pad_token_id(tokenizer.token_id(padding))
    start = tokenizer.encode("a", add_special_tokens=True)[:1]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and start == [tokenizer.bos_token_id])
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(described: dict[str, Any]) -> str | None:
    """Key of `SPLITS` for how a tokenizer.json cuts words, or None."""
    top = described.get("pre_tokenizer") or {}
    stages = top.get("pretokenizers", [top])
    kinds = [stage.get("type") for stage in stages]
    if "ByteLevel" not in kinds or any(stage.get("add_prefix_space") for stage in stages):
        return None
    if kinds == ["ByteLevel"]:
        return "gpt2"
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = stages[0].get("pattern", {}).get("Regex")
        return next((name for name, split in SPLITS.items() if split is not None and split == pattern), None)
    return None
