"""The Mistral family: Llama's block with a sliding window over all layers, and never a bias.

Source: Jiang et al. 2023, Mistral 7B, section 2. GGUF files carry it under Llama's name.
"""

from __future__ import annotations

from dseek.models.config_values import ConfigValues
from dseek.models.family import MAX_POSITIONS, Family, Switches, refuse_flags, uniform_window


def read_switches(values: ConfigValues, num_layers: int) -> Switches:
    """Read Mistral's window: 4096 where the key is missing, none where it is null.

    Args:
        values: config.json.
        num_layers: number of decoder blocks.

    Returns:
        The switches.

    Raises:
        UnsupportedModelError: a bias is switched on, or the layers differ in their attention.
        ConfigError: a malformed value.
    """
    refuse_flags(
        values,
        "mistral",
        {"attention_bias": "biases in attention", "mlp_bias": "biases in the MLP"},
    )
    window: int | None = None
    if values.has("sliding_window") or "sliding_window" not in values.values:
        window = values.integer("sliding_window", maximum=MAX_POSITIONS, default=4096)
    return uniform_window(values, "mistral", num_layers, window)


FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    gguf_architecture="llama",
    default_num_kv_heads=8,
    default_head_dim=None,
    default_max_positions=131_072,
    read_switches=read_switches,
)
