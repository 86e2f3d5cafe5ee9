"""Features that no supported family has and that change the arithmetic: they are refused by name.

transformers ignores a key its model class does not know, and a checkpoint that needs one then answers nonsense. A list
can not be complete; it holds the keys that published checkpoints of related families use.
"""

from __future__ import annotations

from typing import Any

from dseek.core.errors import UnsupportedModelError
from dseek.models.compressed_config import read_compressed
from dseek.models.config_values import ConfigValues, shorten
from dseek.models.family import refuse

_OFF: tuple[Any, ...] = (False, 0)
_ONE: tuple[Any, ...] = (1,)
_NOTHING: tuple[Any, ...] = ([], {})

CONFIG_FEATURES: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "an activation other than silu"),
    "hidden_activation": (("silu", "swish"), "an activation other than silu"),
    "partial_rotary_factor": (_ONE, "rotation of a part of each head"),
    "rotary_pct": (_ONE, "rotation of a part of each head"),
    "rope_interleaved": (_OFF, "rotation of neighbouring pairs"),
    "rope_local_base_freq": ((), "a rotary embedding for each kind of layer"),
    "no_rope_layers": (_NOTHING, "layers without a rotary embedding"),
    "use_mrope": (_OFF, "multimodal rotary embedding"),
    "alibi": (_OFF, "position biases instead of a rotary embedding"),
    "attn_logit_softcapping": (_OFF, "attention softcapping"),
    "final_logit_softcapping": (_OFF, "softcapping of the logits"),
    "attention_softcap": (_OFF, "attention softcapping"),
    "query_pre_attn_scalar": ((), "a scale of its own for attention"),
    "attention_multiplier": ((), "a scale of its own for attention"),
    "attn_temperature_tuning": (_OFF, "attention scaled by position"),
    "attention_chunk_size": (_OFF, "attention in chunks"),
    "use_bidirectional_attention": (_OFF, "attention to later tokens"),
    "is_causal": ((True,), "attention to later tokens"),
    "clip_qkv": (_OFF, "clipped queries, keys and values"),
    "use_qk_norm": (_OFF, "norms of q and k set by a switch"),
    "qk_layernorm": (_OFF, "norms of q and k set by a switch"),
    "logits_scaling": (_ONE, "scaled logits"),
    "logit_scale": (_ONE, "scaled logits"),
    "embedding_multiplier": (_ONE, "scaled embeddings"),
    "scale_emb": (_ONE, "scaled embeddings"),
    "residual_multiplier": (_ONE, "scaled residuals"),
    "scale_depth": ((), "scaled residuals"),
    "parallel_attn": (_OFF, "attention beside the MLP"),
    "use_parallel_residual": (_OFF, "attention beside the MLP"),
    "num_local_experts": (_OFF, "mixture of experts"),
    "num_experts": (_OFF, "mixture of experts"),
    "n_routed_experts": (_OFF, "mixture of experts"),
    "n_shared_experts": (_OFF, "mixture of experts"),
    "num_experts_per_tok": (_OFF, "mixture of experts"),
    "moe_intermediate_size": (_OFF, "mixture of experts"),
    "kv_lora_rank": (_OFF, "latent attention"),
    "q_lora_rank": (_OFF, "latent attention"),
    "is_encoder_decoder": (_OFF, "an encoder"),
    "add_cross_attention": (_OFF, "cross attention"),
    "vision_config": (_NOTHING, "images"),
    "audio_config": (_NOTHING, "sound"),
    "text_config": (_NOTHING, "several models in one configuration"),
    "compression_config": (_NOTHING, "weights compressed in a layout of their own"),
}
"""Key of config.json, the values under which it does nothing, and the feature in plain words."""

GGUF_FEATURES: dict[str, tuple[tuple[Any, ...], str]] = {
    "expert_count": (_OFF, "mixture of experts"),
    "expert_used_count": (_OFF, "mixture of experts"),
    "attn_logit_softcapping": (_OFF, "attention softcapping"),
    "final_logit_softcapping": (_OFF, "softcapping of the logits"),
    "logit_scale": (_ONE, "scaled logits"),
    "embedding_scale": (_ONE, "scaled embeddings"),
    "residual_scale": (_ONE, "scaled residuals"),
    "attention.scale": ((0,), "a scale of its own for attention"),
    "attention.clamp_kqv": (_OFF, "clipped queries, keys and values"),
    "attention.max_alibi_bias": (_OFF, "position biases instead of a rotary embedding"),
    "attention.causal": ((True,), "attention to later tokens"),
    "attention.kv_lora_rank": (_OFF, "latent attention"),
    "attention.sliding_window_pattern": ((), "layers of different attention"),
    "use_parallel_residual": (_OFF, "attention beside the MLP"),
    "pooling_type": ((0,), "a model that gives sentence vectors"),
    "rope.dimension_sections": (_NOTHING, "multimodal rotary embedding"),
    "rope.scaling.yarn_log_multiplier": (_OFF, "yarn with a scale of its own"),
    "rope.scaling.yarn_ext_factor": ((1, -1), "yarn mixed with linear scaling"),
}
"""The same for GGUF metadata, without the leading architecture."""


def refuse_features(
    values: ConfigValues, features: dict[str, tuple[tuple[Any, ...], str]], family: str, prefix: str = ""
) -> None:
    """Refuse a configuration that switches on one of `features`.

    Args:
        values: the configuration.
        features: key, values under which it does nothing, plain words.
        family: name of the family, for the message.
        prefix: put before every key.

    Raises:
        UnsupportedModelError: naming the first key that is on.
    """
    for key, (harmless, what) in features.items():
        value = values.get(prefix + key)
        if value is not None and not any(_same(value, good) for good in harmless):
            refuse(values, family, prefix + key, what)


def refuse_quantized(values: ConfigValues, family: str) -> None:
    """Refuse a folder whose weights are quantised in a layout that is not read here (`compressed_config` has what is).

    Args:
        values: config.json.
        family: name of the family.

    Raises:
        ConfigError: a `quantization_config` with a value that is absurd.
        UnsupportedModelError: one of another method, or with something that is not computed here.
    """
    settings = values.get("quantization_config")
    if settings is None or settings == {} or read_compressed(values) is not None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    raise UnsupportedModelError(
        f"{values.source} has a quantization_config (quant_method {shorten(method)})",
        needed=f"plain {family} weights in F32, F16 or BF16, integers of compressed-tensors, or a GGUF file",
        remedy="use the checkpoint it was quantised from: dseek quantises while it loads (--precision int8 or int4)",
    )


def _same(value: Any, good: Any) -> bool:
    """Compare without numpy's element-wise answers and without 1 == True in the wrong place."""
    if isinstance(good, bool):
        return value is good or (good is False and _is_number(value) and value == 0)
    if _is_number(good):
        return _is_number(value) and value == good
    return type(value) is type(good) and value == good


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
