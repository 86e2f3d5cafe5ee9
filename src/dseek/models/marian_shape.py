"""`MarianShape`: what an encoder-decoder of the Marian family is, read from config.json and written to one.

Only what transformers' `MarianMTModel` computes and the runtimes here compute too is accepted: one vocabulary for both
sides with tied embeddings, sinusoidal positions, norms after the residual sum. It knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dseek.core.errors import UnsupportedModelError
from dseek.models.config_values import ConfigValues, shorten

ACTIVATIONS = {"relu": "relu", "swish": "silu", "silu": "silu", "gelu": "gelu"}
"""Spelling in config.json to what is computed."""
ARCHITECTURE = "MarianMTModel"
_MAX_SIZE = 1 << 16
_MAX_VOCABULARY = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class MarianShape:
    """Sizes and switches of one model."""

    vocab_size: int
    """Tokens V of the vocabulary that both sides share."""
    hidden_size: int = 192
    """Width D of the residual stream."""
    num_heads: int = 4
    """Attention heads H on both sides."""
    intermediate_size: int = 512
    """Width F inside the MLP on both sides."""
    num_encoder_layers: int = 3
    """Blocks of the encoder."""
    num_decoder_layers: int = 2
    """Blocks of the decoder."""
    activation: str = "relu"
    """Between the MLP's projections: relu, silu or gelu."""
    scale_embedding: bool = True
    """Whether embeddings are multiplied by the square root of D."""
    max_positions: int = 512
    """Longest source, and longest answer, in tokens."""
    pad_id: int = 0
    """Fills short rows of a batch."""
    eos_id: int = 1
    """Ends source and answer."""
    start_id: int = 0
    """Stands before an answer's first token."""
    suppressed_ids: tuple[int, ...] = (0,)
    """Tokens that an answer never has."""

    @property
    def head_dim(self) -> int:
        """Width d of a head."""
        return self.hidden_size // self.num_heads

    @property
    def embedding_scale(self) -> float:
        """What an embedding is multiplied by."""
        return float(self.hidden_size) ** 0.5 if self.scale_embedding else 1.0

    def config(self) -> dict[str, Any]:
        """Write the shape as transformers' `MarianConfig`.

        Returns:
            What goes into config.json.
        """
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "marian",
            "is_encoder_decoder": True,
            "vocab_size": self.vocab_size,
            "decoder_vocab_size": self.vocab_size,
            "share_encoder_decoder_embeddings": True,
            "tie_word_embeddings": True,
            "d_model": self.hidden_size,
            "encoder_attention_heads": self.num_heads,
            "decoder_attention_heads": self.num_heads,
            "encoder_ffn_dim": self.intermediate_size,
            "decoder_ffn_dim": self.intermediate_size,
            "encoder_layers": self.num_encoder_layers,
            "decoder_layers": self.num_decoder_layers,
            "activation_function": self.activation,
            "scale_embedding": self.scale_embedding,
            "max_position_embeddings": self.max_positions,
            "pad_token_id": self.pad_id,
            "eos_token_id": self.eos_id,
            "bos_token_id": None,
            "forced_eos_token_id": None,
            "decoder_start_token_id": self.start_id,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "dtype": "float32",
        }

    def generation_config(self) -> dict[str, Any]:
        """Write what an answer may be, as generation_config.json says it."""
        return {
            "bad_words_ids": [[token_id] for token_id in self.suppressed_ids] or None,
            "decoder_start_token_id": self.start_id,
            "eos_token_id": self.eos_id,
            "pad_token_id": self.pad_id,
            "max_length": self.max_positions,
            "num_beams": 1,
            "do_sample": False,
        }


def marian_shape(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> MarianShape:
    """Read a configuration and trust nothing in it.

    Args:
        config: config.json.
        generation: generation_config.json, or None where there is none.

    Returns:
        The shape.

    Raises:
        ConfigError: a value is missing, of another type or out of range.
        UnsupportedModelError: another family, or a variant that is not run here.
    """
    values = ConfigValues(config, "config.json")
    if values.get("model_type") != "marian":
        raise UnsupportedModelError(
            f"config.json says the model is of type {shorten(values.get('model_type'))}",
            needed="marian, the encoder-decoder family that is run here",
            remedy="run models with a decoder alone with `dseek generate`",
        )
    _refuse_variants(values)
    size = values.integer("vocab_size", maximum=_MAX_VOCABULARY)
    width = values.integer("d_model", maximum=_MAX_SIZE, step=2)
    heads = values.integer("encoder_attention_heads", maximum=width)
    if width % heads:
        raise values.error("encoder_attention_heads", f"a divisor of d_model = {width}")
    activation = values.text("activation_function", default="gelu")
    if activation not in ACTIVATIONS:
        raise values.error("activation_function", "one of " + ", ".join(ACTIVATIONS))
    inner = values.integer("encoder_ffn_dim", maximum=_MAX_SIZE)
    for mine, other, same in (
        ("decoder_attention_heads", "encoder_attention_heads", heads),
        ("decoder_ffn_dim", "encoder_ffn_dim", inner),
        ("decoder_vocab_size", "vocab_size", size),
    ):
        if values.integer(mine, maximum=_MAX_VOCABULARY, default=same) != same:
            raise UnsupportedModelError(
                f"config.json has {mine} = {values.get(mine)} beside {other} = {same}", needed="the same on both sides"
            )
    ids = {"minimum": 0, "maximum": size - 1}
    pad_id = values.integer("pad_token_id", **ids)
    return MarianShape(
        vocab_size=size,
        hidden_size=width,
        num_heads=heads,
        intermediate_size=inner,
        num_encoder_layers=values.integer("encoder_layers", maximum=1024),
        num_decoder_layers=values.integer("decoder_layers", maximum=1024),
        activation=ACTIVATIONS[activation],
        scale_embedding=values.flag("scale_embedding"),
        max_positions=values.integer("max_position_embeddings", maximum=1 << 20),
        pad_id=pad_id,
        eos_id=values.integer("eos_token_id", **ids),
        start_id=values.integer("decoder_start_token_id", **ids, default=pad_id),
        suppressed_ids=_suppressed(ConfigValues(generation or config, "generation_config.json"), size),
    )


def _refuse_variants(values: ConfigValues) -> None:
    for key, needed in (("share_encoder_decoder_embeddings", True), ("tie_word_embeddings", True)):
        if values.flag(key, default=True) is not needed:
            raise UnsupportedModelError(
                f"config.json has {key} = {str(not needed).lower()}", needed="one embedding for both sides and the head"
            )
    for key in ("normalize_embedding", "normalize_before", "add_final_layer_norm", "add_bias_logits"):
        if values.flag(key):
            raise UnsupportedModelError(f"config.json has {key} = true", needed="false, as transformers computes it")
    if values.get("quantization_config") is not None:
        raise UnsupportedModelError(
            "config.json has a quantization_config", needed="wide weights: they are rounded here when they are loaded"
        )


def _suppressed(generation: ConfigValues, vocab_size: int) -> tuple[int, ...]:
    """Single tokens of `bad_words_ids`; longer sequences cannot be forbidden by a token's own bias."""
    words = generation.get("bad_words_ids")
    if words is None:
        return ()
    if not isinstance(words, list) or len(words) > vocab_size:
        raise generation.error("bad_words_ids", "a list of lists of token ids")
    result = []
    for word in words:
        if not isinstance(word, list) or len(word) != 1 or isinstance(word[0], bool) or not isinstance(word[0], int):
            raise generation.error("bad_words_ids", "lists of one token id each")
        if not 0 <= word[0] < vocab_size:
            raise generation.error("bad_words_ids", f"token ids from 0 to {vocab_size - 1}")
        result.append(word[0])
    return tuple(dict.fromkeys(result))
