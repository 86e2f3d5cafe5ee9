"""Integers and scales in the layout of the package `compressed-tensors`, which transformers and vLLM load.

Weights of 8 bits with a scale a channel and int8 activations are stored as they are (`int-quantized`); weights alone
are packed into words (`pack-quantized`). N output channels, K inputs, G groups.

Source: the package `compressed-tensors` (`pack_to_int32`, `QuantizationArgs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dseek.compress.ptq_rounding import Scheme


def pack_words(values: np.ndarray, num_bits: int) -> np.ndarray:
    """Pack integers into words along the last axis.

    Args:
        values: int8 [N, K].
        num_bits: 8 or 4.

    Returns:
        uint8 [N, 4 * ceil(K * bits / 32)], little-endian words, integers offset to be unsigned.
    """
    per_word = 32 // num_bits
    unsigned: np.ndarray = (values + np.int8(-128 if num_bits == 8 else 8)).view(np.uint8)
    padded = np.pad(unsigned, ((0, 0), (0, -values.shape[1] % per_word)))
    if num_bits == 4:
        padded = padded[:, 0::2] | padded[:, 1::2] << 4
    return np.ascontiguousarray(padded)


def pack_zero_points(zero: np.ndarray, num_bits: int) -> np.ndarray:
    """Pack zero points into words along the rows.

    Args:
        zero: int8 [N, G].
        num_bits: 8 or 4.

    Returns:
        uint8 [ceil(N * bits / 32) * G * 4], flat: words [ceil(N * bits / 32), G].
    """
    words = pack_words(np.ascontiguousarray(zero.T), num_bits).view("<u4")
    return np.ascontiguousarray(words.T).reshape(-1).view(np.uint8)


def quantization_config(scheme: Scheme, ignore: Sequence[str], act_order: bool) -> dict[str, Any]:
    """Describe a scheme for config.json.

    Args:
        scheme: the integers.
        ignore: names of linear modules that stay wide.
        act_order: whether GPTQ rounded inputs in the order of their activations.

    Returns:
        `quantization_config`.
    """
    weights: dict[str, Any] = {
        "num_bits": scheme.num_bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "block_structure": None,
        "dynamic": False,
        "actorder": "weight" if act_order and scheme.group_size is not None else None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    activations: dict[str, Any] | None = None
    if scheme.activation_bits is not None:
        activations = {
            "num_bits": scheme.activation_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "group_size": None,
            "block_structure": None,
            "dynamic": True,
            "actorder": None,
            "observer": None,
            "observer_kwargs": {},
        }
    return {
        "quant_method": "compressed-tensors",
        "format": layout_of(scheme),
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(ignore),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations,
                "output_activations": None,
            }
        },
    }


def layout_of(scheme: Scheme) -> str:
    """Name the format that a scheme is stored in.

    Args:
        scheme: the integers.
    """
    return "int-quantized" if scheme.activation_bits is not None else "pack-quantized"
