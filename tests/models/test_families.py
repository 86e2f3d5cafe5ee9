"""config.json to `ModelShape`: what transformers writes is read, and everything else is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dseek.core.errors import ConfigError, DseekError, UnsupportedModelError
from dseek.models.families import FAMILIES, shape_from_config
from tests.models import tiny

GOOD: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def changed(**changes: Any) -> dict[str, Any]:
    """The good configuration with some values changed; `...` removes one."""
    return {key: value for key, value in (GOOD | changes).items() if value is not ...}


def of(family: str, **changes: Any) -> dict[str, Any]:
    """The good configuration of another family."""
    return changed(model_type=family, architectures=[FAMILIES[family].architecture], **changes)


def test_the_plain_case() -> None:
    shape = shape_from_config(GOOD)
    assert (shape.family, shape.vocab_size, shape.hidden_size, shape.intermediate_size) == ("llama", 1000, 128, 256)
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (3, 4, 2, 32)
    assert shape.eos_token_ids == (2,) and shape.bos_token_id == 1
    assert shape.sliding_window is None and not shape.tie_word_embeddings and not shape.qkv_bias


@pytest.mark.parametrize("case_id", tiny.CASES)
def test_every_case_reads_as_transformers_wrote_it(case_id: str, tmp_path: Path) -> None:
    kwargs = dict(tiny.CASES[case_id])
    config_class, model_class = tiny.classes(kwargs["family"])
    config = config_class(**{key: value for key, value in kwargs.items() if key != "family"})
    config.architectures = [model_class.__name__]
    config.save_pretrained(tmp_path)
    shape = shape_from_config(json.loads((tmp_path / "config.json").read_text()))
    for ours, theirs in (
        ("vocab_size", "vocab_size"),
        ("num_layers", "num_hidden_layers"),
        ("num_kv_heads", "num_key_value_heads"),
        ("head_dim", "head_dim"),
        ("tie_word_embeddings", "tie_word_embeddings"),
        ("max_position_embeddings", "max_position_embeddings"),
    ):
        assert getattr(shape, ours) == getattr(config, theirs), ours
    assert shape.rope.kind == config.rope_parameters["rope_type"]
    assert shape.rope.theta == config.rope_parameters["rope_theta"]
    layer_types = getattr(config, "layer_types", None)
    if layer_types and shape.sliding_window is not None:
        windowed = shape.window_layers or (True,) * shape.num_layers
        assert windowed == tuple(kind == "sliding_attention" for kind in layer_types)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    config_class, _ = tiny.classes(family)
    default = config_class()
    sizes = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2}
    shape = shape_from_config({"model_type": family, **sizes, "num_attention_heads": 32})
    assert shape.num_kv_heads == default.num_key_value_heads
    assert shape.head_dim == 128
    assert shape.max_position_embeddings == default.max_position_embeddings
    assert shape.rms_norm_eps == default.rms_norm_eps
    assert shape.sliding_window == default.sliding_window if family == "mistral" else shape.sliding_window is None
    assert shape.rope.theta == default.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("scaling", "kind"),
    [
        ({"type": "linear", "factor": 4}, "linear"),
        ({"rope_type": "dynamic", "type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "finetuned": True}, "yarn"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4.0}, "llama3"),
        ({"rope_type": "default"}, "default"),
        ({}, "default"),
        (None, "default"),
    ],
)
def test_both_rotary_layouts_say_the_same(scaling: dict[str, Any] | None, kind: str) -> None:
    old = shape_from_config(changed(rope_theta=500_000.0, rope_scaling=scaling)).rope
    new = shape_from_config(changed(rope_parameters={"rope_theta": 500_000.0, **(scaling or {})})).rope
    assert old == new
    assert old.kind == kind and old.theta == 500_000.0


def test_yarn_without_a_factor_takes_the_ratio_of_the_lengths() -> None:
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 128}
    assert shape_from_config(changed(rope_scaling=scaling)).rope.factor == 4.0


def test_a_pretraining_length_beside_the_scaling_has_priority() -> None:
    scaling = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4}
    config = changed(rope_scaling={**scaling, "original_max_position_embeddings": 64})
    assert shape_from_config(config).rope.original_max_position_embeddings == 64
    assert (
        shape_from_config(config | {"original_max_position_embeddings": 32}).rope.original_max_position_embeddings == 32
    )


def test_windows() -> None:
    assert shape_from_config(of("mistral")).sliding_window == 4096
    assert shape_from_config(of("mistral", sliding_window=None)).sliding_window is None
    assert shape_from_config(of("qwen2", sliding_window=64)).sliding_window is None
    upper = shape_from_config(of("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1))
    assert upper.sliding_window == 64 and upper.window_layers == (False, True, True)
    named = shape_from_config(
        of("qwen3", use_sliding_window=True, sliding_window=64, layer_types=["sliding_attention"] * 3)
    )
    assert named.sliding_window == 64 and named.window_layers is None
    assert shape_from_config(of("llama", layer_types=["full_attention"] * 3)).sliding_window is None


def test_several_ends_and_one_beyond_the_vocabulary(caplog: pytest.LogCaptureFixture) -> None:
    assert shape_from_config(changed(eos_token_id=[2, 7, 2])).eos_token_ids == (2, 7)
    assert shape_from_config(changed(eos_token_id=None, bos_token_id=...)).eos_token_ids == ()
    with caplog.at_level("WARNING", logger="dseek"):
        assert shape_from_config(changed(eos_token_id=[2, 151_645])).eos_token_ids == (2,)


HOSTILE = (None, "64", -1, 0, 1.5, float("nan"), float("inf"), 1e12, 10**12, 10**400, True, [], {}, [64])


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_a_hostile_size_is_an_error_that_names_it(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        shape_from_config(changed(**{key: value}))
    assert key in str(caught.value)
    assert caught.value.needed and caught.value.remedy
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 3},
        {"num_key_value_heads": 0},
        {"num_key_value_heads": 8},
        {"head_dim": 24},
        {"head_dim": 8},
        {"head_dim": -32},
        {"head_dim": 1024},
        {"head_dim": float("nan")},
        {"hidden_size": 100},
        {"hidden_size": 65536, "num_attention_heads": 1, "num_key_value_heads": 1},
        {"num_hidden_layers": 1025},
        {"rms_norm_eps": 0},
        {"rms_norm_eps": -1e-5},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": "1e-5"},
        {"max_position_embeddings": 0},
        {"max_position_embeddings": 10**12},
        {"tie_word_embeddings": "false"},
        {"tie_word_embeddings": 1},
        {"attention_bias": "yes"},
        {"eos_token_id": -1},
        {"eos_token_id": "</s>"},
        {"eos_token_id": [2, True]},
        {"bos_token_id": 1.0},
        {"rope_theta": 0},
        {"rope_theta": float("inf")},
        {"rope_theta": "10000"},
        {"rope_scaling": "linear"},
        {"rope_scaling": [1]},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "linear", "factor": 0.5}},
        {"rope_scaling": {"type": "linear", "factor": float("nan")}},
        {"rope_scaling": {"type": "linear", "factor": 10**400}},
        {"rope_scaling": {"type": 7, "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": -4}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 1.0, "beta_slow": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": "no"}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
        {"model_type": ...},
        {"model_type": 3},
        {"architectures": "LlamaForCausalLM"},
        {"layer_types": ["full_attention"]},
        {"layer_types": "full_attention"},
        {"attention_bias": None, "mlp_bias": 1.0},
    ],
    ids=str,
)
def test_a_hostile_value_is_a_config_error(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        shape_from_config(changed(**changes))
    assert caught.value.needed


@pytest.mark.parametrize("config", [None, [], "llama", 3, {}])
def test_something_that_is_no_configuration(config: Any) -> None:
    with pytest.raises(ConfigError):
        shape_from_config(config)


def test_an_unknown_family_is_named_with_those_supported() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*llama, mistral, qwen2, qwen3"):
        shape_from_config(changed(model_type="mamba"))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"attn_logit_softcapping": 50.0}, "softcapping"),
        ({"final_logit_softcapping": 30.0}, "softcapping"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"num_experts": 128, "num_experts_per_tok": 8}, "mixture of experts"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": "awq"}, "awq"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "linear_attention"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": ["LlamaModel"]}, "LlamaForCausalLM"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "longrope"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 3}}, "alpha"),
        ({"rope_scaling": {"type": "default", "mrope_section": [8, 4, 4]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "each kind of layer"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "mlp_bias": True}, "mlp_bias"),
        ({"vision_config": {"depth": 32}}, "images"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_feature_that_changes_the_arithmetic_is_refused_by_name(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        shape_from_config(changed(**changes))
    assert word in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_logit_softcapping": None, "num_experts": 0, "rope_interleaved": False, "quantization_config": None},
        {"partial_rotary_factor": 1.0, "logits_scaling": 1, "hidden_act": "swish", "pretraining_tp": 1},
        {"is_llama_config": True, "torch_dtype": "bfloat16", "transformers.js_config": {"kv_cache_dtype": {}}},
        {"sliding_window": 128, "use_sliding_window": False},
    ],
)
def test_keys_that_do_nothing_are_let_through(changes: dict[str, Any]) -> None:
    assert shape_from_config(changed(**changes)) == shape_from_config(GOOD)


def test_an_option_without_effect_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="dseek"):
        shape_from_config(changed(rope_scaling={"type": "linear", "factor": 2.0, "beta_fast": 32}))
    assert "beta_fast has no effect" in caplog.text


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    changes=st.dictionaries(
        st.sampled_from(
            [
                *GOOD,
                "head_dim",
                "rope_scaling",
                "rope_parameters",
                "rope_theta",
                "sliding_window",
                "use_sliding_window",
                "max_window_layers",
                "layer_types",
                "quantization_config",
                "num_experts",
                "tie_word_embeddings",
            ]
        ),
        JUNK,
        max_size=4,
    ),
)
def test_junk_ends_in_a_shape_or_in_our_own_error(family: str, changes: dict[str, Any]) -> None:
    try:
        shape = shape_from_config(of(family) | changes)
    except DseekError:
        return
    assert shape.head_dim % 16 == 0 and shape.num_heads % shape.num_kv_heads == 0


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "rope_type",
                "type",
                "factor",
                "rope_theta",
                "original_max_position_embeddings",
                "beta_fast",
                "mscale",
                "low_freq_factor",
                "high_freq_factor",
                "attention_factor",
                "truncate",
            ]
        ),
        st.sampled_from(["linear", "dynamic", "yarn", "llama3", "default"]) | JUNK,
        max_size=6,
    )
)
def test_a_junk_scaling_ends_in_a_shape_or_in_our_own_error(scaling: dict[str, Any]) -> None:
    import numpy as np

    from dseek.models.rope import rope_table

    try:
        shape = shape_from_config(changed(rope_parameters=scaling))
    except DseekError:
        return
    cos, sin = rope_table(shape, 8, 10_000)
    assert np.isfinite(cos).all() and np.isfinite(sin).all()
