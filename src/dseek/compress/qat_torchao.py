"""`from_torchao`: start from a configuration of torchao's quantisation-aware training.

What torchao 0.18 does and what it does not, so that nobody expects it from here: its QAT covers linear layers and
embeddings with int8 activations and integer weights of 2 to 8 bits (`Int8DynamicActivationIntxWeightConfig`,
`IntxWeightOnlyConfig`, or `IntxFakeQuantizeConfig` by hand); not convolutions, not
`Int8DynamicActivationInt8WeightConfig`, and its learned ranges lack LSQ's gradient scale. Weights round to the very
same numbers here (per channel; in groups but for scales kept as float16, and for zero points, which torchao cuts off
where they are rounded here). Activations do not: torchao's have a zero point for each token, the kernels' are
symmetric. Each such difference is told.
"""

from __future__ import annotations

from typing import Any

import torch

from dseek.compress.qat_config import GROUP_SIZES, QatConfig
from dseek.core.errors import ConfigError
from dseek.core.logs import get_logger

_log = get_logger(__name__)

_EXTRA = 'pip install "torchao>=0.18,<0.19"'


def from_torchao(config: Any) -> QatConfig:
    """Translate a configuration.

    Args:
        config: `QATConfig` of torchao, or what it is made from: `Int8DynamicActivationIntxWeightConfig`,
            `Int8DynamicActivationInt8WeightConfig`, `IntxWeightOnlyConfig`, or an `IntxFakeQuantizeConfig` of weights.

    Returns:
        The nearest that the kernels compute; what it does otherwise is logged as a warning.

    Raises:
        ConfigError: torchao is not installed, or the configuration is one that no kernel here computes.
    """
    try:
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8DynamicActivationIntxWeightConfig,
            IntxWeightOnlyConfig,
        )
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    except ImportError as error:
        raise ConfigError("torchao is not installed", remedy=_EXTRA) from error
    differences: list[str] = []
    activations = weights = None
    if isinstance(config, QATConfig):
        if config.base_config is not None:
            return from_torchao(config.base_config)
        activations, weights = config.activation_config, config.weight_config
    elif isinstance(config, IntxFakeQuantizeConfig):
        weights = config
    elif isinstance(config, Int8DynamicActivationIntxWeightConfig):
        weights = IntxFakeQuantizeConfig(
            config.weight_dtype, config.weight_granularity, mapping_type=config.weight_mapping_type
        )
        activations = IntxFakeQuantizeConfig(torch.int8, "per_token", mapping_type=config.act_mapping_type)
    elif isinstance(config, Int8DynamicActivationInt8WeightConfig):
        return _eight_bits(config, differences)
    elif isinstance(config, IntxWeightOnlyConfig):
        weights = IntxFakeQuantizeConfig(config.weight_dtype, config.granularity, mapping_type=config.mapping_type)
    if not isinstance(weights, IntxFakeQuantizeConfig) or not isinstance(
        activations, (IntxFakeQuantizeConfig, type(None))
    ):
        raise ConfigError(
            f"{type(config).__name__} has no counterpart here",
            needed="integer weights, and integer activations or none",
        )
    return _translate(weights, activations, differences)


def _translate(weights: Any, activations: Any, differences: list[str]) -> QatConfig:
    """Settings for weights, and for activations if there are any."""
    from torchao.quantization.granularity import PerGroup, PerToken

    bits = _bits(weights.dtype)
    group_size = weights.granularity.group_size if isinstance(weights.granularity, PerGroup) else None
    if group_size is not None and group_size not in GROUP_SIZES:
        raise ConfigError(f"groups of {group_size} inputs", needed="32, 64 or 128, which the kernels have")
    if not weights.is_symmetric and (group_size is None or bits != 4):
        raise ConfigError("weights with zero points", needed="4 bits in groups, or symmetric weights")
    if weights.range_learning and group_size is None:
        differences.append("learned ranges have the gradient scale of LSQ here")
    if activations is not None:
        if not isinstance(activations.granularity, PerToken):
            raise ConfigError(f"activations rounded by {activations.granularity}", needed="by token")
        if not activations.is_dynamic:
            raise ConfigError("activations with a fixed scale for each token", needed="dynamic ones")
        if not activations.is_symmetric:
            differences.append("activations are rounded symmetrically, without a zero point")
        if group_size is not None:
            differences.append("activations are rounded by 32 inputs, as the kernels do for groups, not by token")
    if group_size is not None:
        differences.append("scales of groups are kept as float16")
    learned = weights.range_learning and weights.is_symmetric
    _tell(differences)
    return QatConfig(
        weight_bits=bits,
        group_size=group_size,
        symmetric=weights.is_symmetric,
        activations="none" if activations is None else "dynamic",
        activation_bits=8 if activations is None or group_size is not None else _bits(activations.dtype),
        estimator="lsq" if learned else "ste",
        step_rule="span" if weights.is_symmetric else None,
    )


def _eight_bits(config: Any, differences: list[str]) -> QatConfig:
    """torchao's int8 scheme, which it does not train itself."""
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quant_primitives import MappingType

    granularity = config.granularity
    if granularity is not None and not all(
        isinstance(part, PerRow) for part in (granularity if isinstance(granularity, (list, tuple)) else [granularity])
    ):
        raise ConfigError(f"int8 by {granularity}", needed="PerRow for activations and weights")
    if config.act_mapping_type != MappingType.SYMMETRIC:
        differences.append("activations are rounded symmetrically, without a zero point")
    if config.reduce_range:
        differences.append("the whole range of int8 is used: the kernels here do not overflow without VNNI")
    _tell(differences)
    return QatConfig(step_rule="span")


def _bits(dtype: Any) -> int:
    """Bits of an integer dtype such as torch.int4."""
    name = str(dtype).rpartition(".")[2].lower()
    bits = name.removeprefix("int")
    if not bits.isdigit() or not 2 <= int(bits) <= 8:
        raise ConfigError(f"integers of the dtype {dtype}", needed="torch.int2 to torch.int8")
    return int(bits)


def _tell(differences: list[str]) -> None:
    if differences:
        _log.warning("unlike torchao: %s", "; ".join(differences))
