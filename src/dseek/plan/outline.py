"""`Outline`: what a configuration alone says of a model, for planning models that dseek does not run.

Dense and gated MLPs, experts (with shared ones and dense first layers), grouped attention and latent attention (MLA).
It counts parameters, operations and cache; nothing is built from it. `read_outline` takes a Hugging Face `config.json`
or a name of `configs/`.

What it does not know: vision and audio parts, multi-token prediction heads, state-space layers: a configuration with
those is counted without them, or refused where its family is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from dseek.core import config
from dseek.core.errors import ConfigError, UnsupportedModelError

MAX_FILE_BYTES = 1 << 20
LARGEST = 1 << 24
"""No size in a configuration is larger."""

FAMILIES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt2",
    "phi3", "gemma", "olmo2",
)  # fmt: skip
"""Values of `model_type` whose layers are counted right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """Sizes of a decoder-only transformer, for counting."""

    name: str
    """For messages."""
    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Decoder blocks."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; with latent attention as many as query heads."""
    key_dim: int
    """Width of a query or key, rotated part included."""
    value_dim: int
    """Width of a value."""
    intermediate_size: int
    """Width of a dense MLP."""
    is_gated: bool = True
    """The MLP has a gate: three matrices, else two."""
    has_biases: bool = False
    """Every linear layer has a bias, norms too (GPT-2)."""
    qkv_bias: bool = False
    """Queries, keys and values have a bias."""
    qk_norm: bool = False
    """Norms over each head of queries and keys."""
    tie_word_embeddings: bool = False
    """The head is the embedding."""
    max_position_embeddings: int = 8192
    """Longest context."""
    num_learned_positions: int = 0
    """Rows of a table of positions; 0 where they are rotated."""
    query_rank: int = 0
    """Latent attention: width of the compressed query; 0 where queries are not compressed."""
    kv_rank: int = 0
    """Latent attention: width of what is cached of keys and values; 0 for ordinary attention."""
    rope_dim: int = 0
    """Latent attention: rotated part of a key, which all heads share."""
    num_experts: int = 0
    """Routed experts of a layer; 0 for dense layers."""
    experts_per_token: int = 0
    """Routed experts that a token passes."""
    num_shared_experts: int = 0
    """Experts that every token passes."""
    expert_size: int = 0
    """Width of one expert."""
    num_dense_layers: int = 0
    """First layers without experts, where there are experts."""

    @property
    def num_expert_layers(self) -> int:
        """Layers with experts."""
        return self.num_layers - self.num_dense_layers if self.num_experts else 0

    def attention_parameters(self) -> int:
        """Weights of one layer's attention, norms and biases included."""
        width, heads = self.hidden_size, self.num_heads
        if self.kv_rank:
            nope = self.key_dim - self.rope_dim
            total = width * (self.kv_rank + self.rope_dim) + self.kv_rank
            total += self.kv_rank * heads * (nope + self.value_dim)
            if self.query_rank:
                total += width * self.query_rank + self.query_rank + self.query_rank * heads * self.key_dim
            else:
                total += width * heads * self.key_dim
            return total + heads * self.value_dim * width
        queries, keys, values = (
            heads * self.key_dim,
            self.num_kv_heads * self.key_dim,
            self.num_kv_heads * self.value_dim,
        )
        total = width * (queries + keys + values) + heads * self.value_dim * width
        if self.has_biases or self.qkv_bias:
            total += queries + keys + values
        if self.has_biases:
            total += width
        return total + (2 * self.key_dim if self.qk_norm else 0)

    def mlp_parameters(self, size: int) -> int:
        """Weights of one MLP or expert of a width.

        Args:
            size: the width.
        """
        matrices = 3 if self.is_gated else 2
        return matrices * self.hidden_size * size + (size + self.hidden_size if self.has_biases else 0)

    def expert_parameters(self) -> int:
        """Weights of one routed expert."""
        return self.mlp_parameters(self.expert_size)

    def layer_parameters(self, *, is_dense: bool, active: bool = False) -> int:
        """Weights of one layer.

        Args:
            is_dense: it has no experts.
            active: only those that one token passes.
        """
        norms = 2 * self.hidden_size * (2 if self.has_biases else 1)
        total = self.attention_parameters() + norms
        if is_dense or not self.num_experts:
            return total + self.mlp_parameters(self.intermediate_size)
        routed = self.experts_per_token if active else self.num_experts
        total += (routed + self.num_shared_experts) * self.expert_parameters()
        return total + self.num_experts * self.hidden_size

    def num_parameters(self, *, active: bool = False, with_embedding: bool = True) -> int:
        """Weights of the model.

        Args:
            active: only those that one token passes; the embedding, a look-up, is then left out in any case.
            with_embedding: count the embedding (and the head, where they are one) and the table of positions.
        """
        dense = self.num_layers - self.num_expert_layers
        total = dense * self.layer_parameters(is_dense=True, active=active)
        total += self.num_expert_layers * self.layer_parameters(is_dense=False, active=active)
        total += self.hidden_size * (2 if self.has_biases else 1)
        table = self.vocab_size * self.hidden_size
        if active:
            return total + table
        if with_embedding:
            total += table * (1 if self.tie_word_embeddings else 2)
            total += self.num_learned_positions * self.hidden_size
        return total

    def attention_flops(self, num_pairs: float) -> float:
        """Operations of all layers' attention, as it is trained and prefilled.

        Args:
            num_pairs: of a query and a position that it sees.

        Returns:
            Two for each pair, head and channel, of both products.
        """
        return 2.0 * num_pairs * self.num_layers * self.num_heads * (self.key_dim + self.value_dim)

    def forward_flops(self, num_tokens: int, context_tokens: int) -> float:
        """Operations of a prompt.

        Args:
            num_tokens: new tokens.
            context_tokens: tokens in the end, the new ones included.
        """
        pairs = num_tokens * (context_tokens - num_tokens) + num_tokens * (num_tokens + 1) / 2
        return 2.0 * num_tokens * self.num_parameters(active=True) + self.attention_flops(pairs)

    def training_flops_per_token(self, sequence_tokens: int) -> float:
        """Operations of a training step a token: three times those forward (Kaplan et al. 2020, section 2.1).

        Args:
            sequence_tokens: length of the sequences, over which causal attention is averaged.
        """
        return 3.0 * self.forward_flops(sequence_tokens, sequence_tokens) / sequence_tokens

    def cache_elements_per_token(self) -> int:
        """Numbers that one token leaves in the cache of all layers; latent attention keeps what is compressed."""
        if self.kv_rank:
            return self.num_layers * (self.kv_rank + self.rope_dim)
        return self.num_layers * self.num_kv_heads * (self.key_dim + self.value_dim)


def read_outline(where: str) -> Outline:
    """Read a configuration.

    Args:
        where: a `config.json`, a folder that has one, or a name of `configs/` with or without `.json`.

    Raises:
        ConfigError: there is none, or its sizes make no sense.
        UnsupportedModelError: a family whose layers are not known here.
    """
    path = Path(where)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} is {path.stat().st_size} bytes long", needed=f"at most {MAX_FILE_BYTES}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
        name = path.parent.name if path.name == "config.json" else path.stem
    else:
        name = path.name.removesuffix(".json").lower()
        known = known_names("configs")
        if name not in known:
            raise ConfigError(
                f"there is no configuration {where!r}", needed="a config.json, or one of " + ", ".join(known)
            )
        text = (resources.files("dseek.plan") / "configs" / f"{name}.json").read_text(encoding="utf-8")
    return outline_of(config.parse_json(text, where=where), name)


def known_names(folder: str) -> list[str]:
    """List what comes with the package.

    Args:
        folder: configs or machines.
    """
    found = (resources.files("dseek.plan") / folder).iterdir()
    return sorted(entry.name.removesuffix(".json") for entry in found if entry.name.endswith(".json"))


def outline_of(data: object, name: str) -> Outline:
    """Make an outline of the contents of a `config.json`.

    Args:
        data: the parsed configuration.
        name: of the model.

    Raises:
        ConfigError: sizes that are missing or make no sense.
        UnsupportedModelError: a family whose layers are not known here.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{name} is no configuration", needed="an object with model_type and sizes")
    family = data.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedModelError(f"model_type {family!r} cannot be planned", needed="one of " + ", ".join(FAMILIES))
    read = _Sizes(data, name)
    if family == "gpt2":
        width = read("n_embd")
        heads = read("n_head")
        return Outline(
            name=name,
            vocab_size=read("vocab_size"),
            hidden_size=width,
            num_layers=read("n_layer"),
            num_heads=heads,
            num_kv_heads=heads,
            key_dim=width // heads,
            value_dim=width // heads,
            intermediate_size=read("n_inner", 4 * width),
            is_gated=False,
            has_biases=True,
            tie_word_embeddings=True,
            max_position_embeddings=read("n_positions"),
            num_learned_positions=read("n_positions"),
        )
    width, heads = read("hidden_size"), read("num_attention_heads")
    experts = read("num_experts", 0) or read("n_routed_experts", 0) or read("num_local_experts", 0)
    is_latent = bool(read("kv_lora_rank", 0))
    rope_dim = read("qk_rope_head_dim") if is_latent else 0
    head_dim = read("head_dim", 0) or width // heads
    expert_size = read("moe_intermediate_size", 0) or read("intermediate_size")
    shared = read("n_shared_experts", 0)
    if read("shared_expert_intermediate_size", 0):
        shared = max(1, read("shared_expert_intermediate_size") // expert_size)
    layers = read("num_hidden_layers")
    dense = min(layers, read("first_k_dense_replace", 0) + len(data.get("mlp_only_layers") or ()))
    return Outline(
        name=name,
        vocab_size=read("vocab_size"),
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads if is_latent else read("num_key_value_heads", heads),
        key_dim=read("qk_nope_head_dim") + rope_dim if is_latent else head_dim,
        value_dim=read("v_head_dim") if is_latent else head_dim,
        intermediate_size=read("intermediate_size"),
        qkv_bias=family in ("qwen2", "qwen2_moe") or bool(data.get("attention_bias")),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        tie_word_embeddings=bool(data.get("tie_word_embeddings", family == "gemma")),
        max_position_embeddings=read("max_position_embeddings", 8192),
        query_rank=read("q_lora_rank", 0),
        kv_rank=read("kv_lora_rank", 0),
        rope_dim=rope_dim,
        num_experts=experts,
        experts_per_token=read("num_experts_per_tok") if experts else 0,
        num_shared_experts=shared,
        expert_size=expert_size if experts else 0,
        num_dense_layers=dense if experts else 0,
    )


class _Sizes:
    """Reads whole numbers out of a configuration and checks their range."""

    def __init__(self, data: Mapping[str, Any], name: str) -> None:
        self._data = data
        self._name = name

    def __call__(self, key: str, default: int | None = None) -> int:
        value = self._data.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not (0 if default is not None else 1) <= value <= LARGEST:
            raise ConfigError(f"{self._name}.{key} is {value!r}", needed=f"a whole number from 1 to {LARGEST}")
        return value
