"""`ModelShape`: what a decoder-only transformer is, in plain numbers.

The planner, the native kernels and the torch module are all built from this one description; it carries no weights
and imports nothing. Families differ only in the values of these fields (see `dseek.models` for where they come from).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeShape:
    """Rotary position embedding (Su et al. 2021, RoFormer, section 3.4) and its context extensions."""

    theta: float = 10_000.0
    """Base of the geometric frequency series."""
    kind: str = "default"
    """One of default, linear, dynamic, yarn, llama3 (Hugging Face `rope_type` names)."""
    factor: float = 1.0
    """Context extension factor of every kind but default."""
    original_max_position_embeddings: int | None = None
    """Length the model was pretrained at; None means `ModelShape.max_position_embeddings`."""
    attention_factor: float | None = None
    """yarn: multiplies cos and sin; None derives it from `factor` (Peng et al. 2023, YaRN, section 3.4)."""
    beta_fast: float = 32.0
    """yarn: rotations at the fast end of the ramp."""
    beta_slow: float = 1.0
    """yarn: rotations at the slow end of the ramp."""
    mscale: float | None = None
    """yarn (DeepSeek): numerator of the attention factor."""
    mscale_all_dim: float | None = None
    """yarn (DeepSeek): denominator of the attention factor."""
    truncate: bool = True
    """yarn: round the ramp's ends to whole dimensions."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original / low_freq_factor are scaled by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original / high_freq_factor are left alone."""
    frequency_divisors: tuple[float, ...] | None = None
    """Per-dimension divisors stored in some GGUF files (`rope_freqs.weight`); they replace the llama3 formula."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes and switches of one decoder-only transformer; counts are plain ints, nothing is a tensor."""

    family: str
    """One of the supported families: llama, mistral, qwen2, qwen3."""
    vocab_size: int
    """Rows of the embedding, V."""
    hidden_size: int
    """Width of the residual stream, D."""
    intermediate_size: int
    """Width of the gated MLP, F."""
    num_layers: int
    """Decoder blocks, L."""
    num_heads: int
    """Query heads, H."""
    num_kv_heads: int
    """Key and value heads (H for MHA, 1 for MQA), G."""
    head_dim: int
    """Width of one head, a multiple of 16."""
    max_position_embeddings: int
    """Longest context the model claims."""
    rms_norm_eps: float = 1e-5
    """Epsilon inside every RMSNorm."""
    rope: RopeShape = field(default_factory=RopeShape)
    """Rotary embedding of queries and keys."""
    tie_word_embeddings: bool = False
    """The output head is the embedding matrix."""
    qkv_bias: bool = False
    """q, k and v projections have a bias."""
    output_bias: bool = False
    """The attention output projection has a bias."""
    mlp_bias: bool = False
    """gate, up and down projections have a bias."""
    qk_norm: bool = False
    """RMSNorm over each head of q and k before the rotation (Qwen3)."""
    sliding_window: int | None = None
    """Attention sees only the newest so many positions (Mistral); None is full attention."""
    window_layers: tuple[bool, ...] | None = None
    """Which layers use `sliding_window`; None means all of them when it is set."""
    bos_token_id: int | None = None
    """Token that starts a text, if the family has one."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer."""

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Output and input width of the four fused projections of one block, by role."""
        return {
            "qkv": (self.query_size + 2 * self.kv_size, self.hidden_size),
            "output": (self.hidden_size, self.query_size),
            "gate_up": (2 * self.intermediate_size, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
        }

    def num_block_parameters(self) -> int:
        """Weights in the projections of one block (norms and biases left out)."""
        return sum(rows * columns for rows, columns in self.linear_sizes().values())

    def num_parameters(self) -> int:
        """Weights of the whole model: projections, norms, biases, embedding and, where untied, the head."""
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        biases = 0
        if self.qkv_bias:
            biases += self.query_size + 2 * self.kv_size
        if self.output_bias:
            biases += self.hidden_size
        if self.mlp_bias:
            biases += 2 * self.intermediate_size + self.hidden_size
        tables = 1 if self.tie_word_embeddings else 2
        return (
            self.num_layers * (self.num_block_parameters() + norms + biases)
            + self.hidden_size
            + tables * self.vocab_size * self.hidden_size
        )
