"""Reads a `quantization_config` of the method `compressed-tensors` and refuses by name what is not computed here.

Run are integers of 8 and 4 bits: weights with a scale an output channel or a group of inputs, symmetric or not, in the
formats `int-quantized` and `pack-quantized`; activations as they are, or int8 with one scale a token found at run time.
Which projections are quantised is seen by their tensors, so that patterns in the file (`targets`, `ignore`) need not be
matched: somebody else's regular expression can run for ever.

Source: the package `compressed-tensors` (`QuantizationConfig`, `QuantizationScheme`, `QuantizationArgs`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dseek.core.errors import UnsupportedModelError
from dseek.models.config_values import ConfigValues, shorten

FORMATS = ("int-quantized", "pack-quantized")
MAX_GROUPS = 64
"""Configurations of one model; real ones have one or two."""
MAX_GROUP_SIZE = 1 << 20
_SILENT = ("version", "global_compression_ratio", "run_compressed", "ignore", "targets")
"""Keys without a meaning for the arithmetic."""
_WEIGHTS_ONLY_HINT = "use a checkpoint of integers of 8 or 4 bits, or the one it was quantised from"


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressedSettings:
    """What is known of a folder's integers before its tensors are looked at."""

    weight_bits: tuple[int, ...]
    """Widths of weights that there may be: 8, 4 or both."""
    int8_activations: bool
    """Whether weights of 8 bits are meant to meet activations of 8 bits, one scale a token."""


def read_compressed(values: ConfigValues) -> CompressedSettings | None:
    """Read the settings of a folder.

    Args:
        values: config.json.

    Returns:
        The settings; None where there is no `quantization_config` of the method `compressed-tensors`.

    Raises:
        ConfigError: a value of the wrong type or absurd.
        UnsupportedModelError: something that is not computed here, by name.
    """
    settings = values.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != "compressed-tensors":
        return None
    found = ConfigValues(settings, f"{values.source} (quantization_config)")
    _expect(found, "format", (*FORMATS, "mixed-precision"))
    _expect(found, "quantization_status", ("compressed",))
    sparsity = found.section("sparsity_config")
    if sparsity is not None:
        _expect(sparsity, "format", ("dense",))
    for key in ("kv_cache_scheme", "transform_config"):
        if found.section(key) is not None:
            raise _unsupported(found, key, "none")
    known = {"quant_method", "format", "quantization_status", "sparsity_config", "config_groups"}
    _refuse_unknown(found, known | {"kv_cache_scheme", "transform_config"})
    groups = found.section("config_groups")
    if groups is None or len(groups.values) > MAX_GROUPS:
        raise found.error("config_groups", f"1 to {MAX_GROUPS} groups")
    bits: set[int] = set()
    activations: set[bool] = set()
    for name in groups.values:
        group = groups.section(name)
        if group is None:
            raise groups.error(name, "an object with weights")
        width, rounds_activations = _read_group(group)
        bits.add(width)
        if width == 8:
            activations.add(rounds_activations)
    return CompressedSettings(weight_bits=tuple(sorted(bits)), int8_activations=activations == {True})


def _read_group(group: ConfigValues) -> tuple[int, bool]:
    """Bits of the weights, and whether activations are rounded."""
    _refuse_unknown(group, {"weights", "input_activations", "output_activations", "format"})
    if group.section("output_activations") is not None:
        raise _unsupported(group, "output_activations", "none")
    if group.has("format"):
        _expect(group, "format", FORMATS)
    weights = group.section("weights")
    if weights is None:
        raise group.error("weights", "an object that describes the integers")
    _check_arguments(weights, ("channel", "group", "tensor"), num_bits=(8, 4), dynamic=False)
    if weights.has("group_size"):
        weights.integer("group_size", minimum=-1, maximum=MAX_GROUP_SIZE)
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise _unsupported(weights, "actorder", "none or weight")
    activations = group.section("input_activations")
    if activations is None:
        return weights.integer("num_bits", maximum=8), False
    _check_arguments(activations, ("token",), num_bits=(8,), dynamic=True)
    if not activations.flag("symmetric", default=True):
        raise _unsupported(activations, "symmetric", "true")
    return weights.integer("num_bits", maximum=8), True


def _check_arguments(
    arguments: ConfigValues, strategies: tuple[str, ...], *, num_bits: tuple[int, ...], dynamic: bool
) -> None:
    known = {"num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder"}
    _refuse_unknown(arguments, known | {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"})
    _expect(arguments, "num_bits", num_bits)
    _expect(arguments, "type", ("int",))
    _expect(arguments, "strategy", strategies)
    arguments.flag("symmetric", default=True)
    if arguments.get("block_structure") is not None:
        raise _unsupported(arguments, "block_structure", "none")
    if arguments.get("dynamic") not in ((None, False) if not dynamic else (True,)):
        raise _unsupported(arguments, "dynamic", "true" if dynamic else "false")


def _expect(values: ConfigValues, key: str, good: tuple[Any, ...]) -> None:
    value = values.get(key)
    if isinstance(value, bool) or not any(type(value) is type(entry) and value == entry for entry in good):
        raise _unsupported(values, key, "one of " + ", ".join(map(str, good)))


def _refuse_unknown(values: ConfigValues, known: set[str]) -> None:
    for key in values.values:
        if key not in known and key not in _SILENT and values.has(key):
            raise _unsupported(values, shorten(key), "only " + ", ".join(sorted(known)))


def _unsupported(values: ConfigValues, key: str, needed: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{values.source} has {key} = {shorten(values.get(key))}", needed=needed, remedy=_WEIGHTS_ONLY_HINT
    )
