"""Small random models of every family, written to disk by transformers' own classes: the oracle of the model tests.

`CASES` names the configurations, `save` writes one as a Hugging Face folder (config, weights in one or several
safetensors files, a byte-level BPE tokenizer trained on the spot), `reference_logits` runs such a folder through
transformers in fp32. Weights are drawn wider than transformers would: with its own 0.02 attention is nearly uniform
and hides mistakes.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_BASE: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-5,
}


def _case(family: str, heads: int, kv_heads: int, head_dim: int, **settings: Any) -> dict[str, Any]:
    case = {"family": family, **_BASE, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    case |= {"head_dim": head_dim, "hidden_size": heads * head_dim} | settings
    return case


def _rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **options}}


_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=32) | {"max_position_embeddings": 128}
_LLAMA3 = _rope(
    "llama3", factor=8.0, original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0
) | {"max_position_embeddings": 512}

CASES: dict[str, dict[str, Any]] = {
    # Llama: head widths, head groups, biases, tied heads, every rotary kind.
    "llama": _case("llama", 4, 2, 32),
    "llama-16-mqa-tied": _case("llama", 4, 1, 16, tie_word_embeddings=True),
    "llama-48": _case("llama", 4, 2, 48),
    "llama-64-mha": _case("llama", 2, 2, 64),
    "llama-80": _case("llama", 4, 4, 80),
    "llama-96-tied": _case("llama", 2, 1, 96, tie_word_embeddings=True),
    "llama-128-mqa": _case("llama", 2, 1, 128),
    "llama-nine-heads": _case("llama", 9, 3, 64, tie_word_embeddings=True),
    "llama-odd-sizes": _case("llama", 5, 5, 16, intermediate_size=112, vocab_size=389, num_hidden_layers=3),
    "llama-wide-heads": _case("llama", 4, 2, 64, hidden_size=96),
    "llama-bias": _case("llama", 4, 2, 32, attention_bias=True, mlp_bias=True),
    "llama-theta": _case("llama", 4, 2, 32, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}),
    "llama-linear": _case("llama", 4, 2, 32, **_rope("linear", factor=3.0)),
    "llama-dynamic": _case("llama", 4, 2, 32, **_rope("dynamic", factor=2.0), max_position_embeddings=32),
    "llama-yarn": _case("llama", 4, 2, 64, **_YARN),
    "llama-yarn-mscale": _case(
        "llama",
        4,
        2,
        32,
        **_rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=32,
            mscale=1.5,
            mscale_all_dim=0.7,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        ),
    ),
    "llama-llama3": _case("llama", 4, 2, 64, **_LLAMA3, tie_word_embeddings=True),
    # Mistral: the window over every layer, and none.
    "mistral-window": _case("mistral", 4, 2, 32, sliding_window=8),
    "mistral-full": _case("mistral", 4, 1, 64, sliding_window=None, tie_word_embeddings=True),
    "mistral-wide-heads": _case("mistral", 4, 4, 48, hidden_size=160, sliding_window=21),
    # Qwen2: biases on q, k and v; the window in the upper layers.
    "qwen2": _case("qwen2", 4, 2, 32, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}),
    "qwen2-tied": _case("qwen2", 2, 2, 64, tie_word_embeddings=True),
    "qwen2-yarn": _case("qwen2", 6, 2, 16, **_YARN),
    "qwen2-window": _case(
        "qwen2", 4, 2, 32, num_hidden_layers=4, use_sliding_window=True, sliding_window=8, max_window_layers=2
    ),
    # Qwen3: norms of q and k, a head width of its own.
    "qwen3": _case("qwen3", 4, 2, 32, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}),
    "qwen3-128-tied": _case("qwen3", 4, 2, 128, hidden_size=160, tie_word_embeddings=True),
    "qwen3-bias": _case("qwen3", 4, 1, 16, attention_bias=True),
    "qwen3-window": _case(
        "qwen3", 4, 2, 32, num_hidden_layers=3, use_sliding_window=True, sliding_window=5, max_window_layers=0
    ),
    "qwen3-linear": _case("qwen3", 2, 2, 96, **_rope("linear", factor=2.0)),
}
"""Case id to the keyword arguments of the transformers configuration, plus `family`."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

_TEXT = (
    "the quick brown fox jumps over the lazy dog\n",
    "a small model answers a small question, and then it stops.\n",
    "def add(left, right):\n    return left + right\n",
    "weights, keys and values; 0123456789; naïve café; 東京; 🙂\n",
)


def classes(family: str) -> tuple[Any, Any]:
    """Return transformers' configuration and model class of a family."""
    import transformers

    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    name = names[family]
    return getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")


def build(case_id: str, seed: int = 0) -> Any:
    """Build the transformers model of a case in fp32 with random weights.

    Args:
        case_id: a key of `CASES`.
        seed: of the weights.

    Returns:
        The model, in eval mode.
    """
    import torch

    settings = dict(CASES[case_id])
    config_class, model_class = classes(settings.pop("family"))
    config = config_class(**json.loads(json.dumps(settings)))
    model = model_class._from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.2 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.5 * noise)
            elif "embed_tokens" in name and not config.tie_word_embeddings:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * (1.5 / math.sqrt(parameter.shape[1])))
    return model


def save(case_id: str, folder: str | Path, dtype: str = "float32", shards: int = 1, seed: int = 0) -> Path:
    """Write a case as a Hugging Face folder.

    Args:
        case_id: a key of `CASES`.
        folder: where to; made if missing.
        dtype: float32, bfloat16 or float16: what the weights are stored in.
        shards: number of safetensors files; more than one adds the index file.
        seed: of the weights.

    Returns:
        The folder.
    """
    import torch
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = build(case_id, seed).to(getattr(torch, dtype))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tied = model.config.tie_word_embeddings
    tensors = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    if shards == 1:
        save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    else:
        weight_map = {}
        for shard in range(shards):
            file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % shards == shard}
            save_file(part, str(folder / file_name), metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file_name)
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    _save_tokenizer(folder)
    return folder


def token_ids(count: int, vocab_size: int = 384, seed: int = 0) -> list[int]:
    """Draw token ids, special ones too.

    Args:
        count: how many.
        vocab_size: one more than the largest.
        seed: of the draw.

    Returns:
        The ids.
    """
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()


def reference_logits(folder: str | Path, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Run a folder through transformers in fp32, eager attention, no cache.

    Args:
        folder: written by `save`.
        token_ids: [T], or [B, T] without padding.

    Returns:
        float32 logits, [T, V] or [B, T, V].
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    settle_trigonometry()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.as_tensor(np.asarray(token_ids, dtype=np.int64))
    with torch.no_grad():
        logits = model(ids if ids.dim() == 2 else ids[None], use_cache=False).logits.float().numpy()
    return logits if ids.dim() == 2 else logits[0]


def settle_trigonometry() -> None:
    """Call cos and sin in one thread first: a first call in several may be wrong by 1.5e-4 (pytorch issue 188792)."""
    import torch

    torch.zeros(8).cos()
    torch.zeros(8).sin()


@functools.cache
def tokenizer_json() -> str:
    """Train the byte-level BPE tokenizer all cases share: 384 tokens at most; `<|bos|>` is 1, `<|end|>` 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|pad|>", "<|bos|>", "<|end|>", "<|start|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 4, trainer)
    return str(tokenizer.to_str())


def _save_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
