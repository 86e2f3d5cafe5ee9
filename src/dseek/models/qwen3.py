"""The dense Qwen3 family: every head of q and k is normalised before the rotation, and heads have a width of their own.

Source: Yang et al. 2025, Qwen3 Technical Report, section 2.
"""

from __future__ import annotations

import dataclasses

from dseek.models.config_values import ConfigValues
from dseek.models.family import Family, Switches, layered_window, refuse_flags


def read_switches(values: ConfigValues, num_layers: int) -> Switches:
    """Read Qwen3's biases and window; the norms of q and k are always there.

    Args:
        values: config.json.
        num_layers: number of decoder blocks.

    Returns:
        The switches.

    Raises:
        UnsupportedModelError: a bias in the MLP is switched on.
        ConfigError: a malformed value.
    """
    refuse_flags(values, "qwen3", {"mlp_bias": "biases in the MLP"})
    bias = values.flag("attention_bias")
    switches = layered_window(values, num_layers)
    return dataclasses.replace(switches, qkv_bias=bias, output_bias=bias, qk_norm=True)


FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    gguf_architecture="qwen3",
    default_num_kv_heads=32,
    default_head_dim=128,
    default_max_positions=32_768,
    read_switches=read_switches,
)
