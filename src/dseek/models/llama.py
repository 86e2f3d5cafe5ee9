"""The Llama family: SmolLM2, Llama 2 and 3, TinyLlama and everything else with `model_type` llama.

Source: Touvron et al. 2023, Llama 2, section 2.2; Grattafiori et al. 2024, The Llama 3 Herd of Models, section 3.2.
"""

from __future__ import annotations

import dataclasses

from dseek.models.config_values import ConfigValues
from dseek.models.family import Family, Switches, refuse, uniform_window


def read_switches(values: ConfigValues, num_layers: int) -> Switches:
    """Read Llama's biases; it has no sliding window.

    Args:
        values: config.json.
        num_layers: number of decoder blocks.

    Returns:
        The switches.

    Raises:
        UnsupportedModelError: a sliding window is set, which this family does not have.
        ConfigError: a malformed value.
    """
    if values.has("sliding_window") and values.flag("use_sliding_window", default=True):
        refuse(values, "llama", "sliding_window", "sliding window attention, which the llama family does not have")
    bias = values.flag("attention_bias")
    switches = uniform_window(values, "llama", num_layers, None)
    return dataclasses.replace(switches, qkv_bias=bias, output_bias=bias, mlp_bias=values.flag("mlp_bias"))


FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    gguf_architecture="llama",
    default_num_kv_heads=None,
    default_head_dim=None,
    default_max_positions=2048,
    read_switches=read_switches,
)
