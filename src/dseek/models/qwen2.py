"""The Qwen2 and Qwen2.5 family: biases on q, k and v, and optionally a sliding window in the upper layers.

Source: Yang et al. 2024, Qwen2 Technical Report, section 2.2.1.
"""

from __future__ import annotations

import dataclasses

from dseek.models.config_values import ConfigValues
from dseek.models.family import Family, Switches, layered_window, refuse_flags


def read_switches(values: ConfigValues, num_layers: int) -> Switches:
    """Read Qwen2's window; its q, k and v biases are always there.

    Args:
        values: config.json.
        num_layers: number of decoder blocks.

    Returns:
        The switches.

    Raises:
        UnsupportedModelError: a bias in the MLP is switched on.
        ConfigError: a malformed value.
    """
    refuse_flags(values, "qwen2", {"mlp_bias": "biases in the MLP"})
    return dataclasses.replace(layered_window(values, num_layers), qkv_bias=True)


FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    gguf_architecture="qwen2",
    default_num_kv_heads=32,
    default_head_dim=None,
    default_max_positions=32_768,
    read_switches=read_switches,
)
