"""`convert`: from a prepared module to one of integers on the integer kernels; and files of such modules.

A file is safetensors: the state of the converted module, and in the header what each integer layer means. It is read
into a plain module of the same architecture, whose code says what lies between the layers; nothing in a file is ever
run, and every number that decides something is checked.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from dseek.compress.integer_layers import ConvGeometry, IntegerConv, IntegerLayer, IntegerLinear, Scheme
from dseek.compress.qat_config import GROUP_SIZES
from dseek.compress.qat_layers import FoldedBatchNorm, QatLayer, QatLinear, folded
from dseek.compress.qat_prepare import replace
from dseek.core.errors import ConfigError, FileFormatError
from dseek.core.files import atomic_write_bytes

FORMAT = "dseek-integers-1"
"""Version of the files."""

_MOST_HEADER_BYTES = 16 << 20


def convert(module: torch.nn.Module) -> torch.nn.Module:
    """Replace rounding layers by layers of integers, which compute what those compute in evaluation.

    Args:
        module: of `prepare`, trained or not; changed in place and put into evaluation. Static ranges must be set.

    Returns:
        The module, or its replacement where it is a layer itself. Batch norms that were folded are in the bias now.

    Raises:
        ConfigError: nothing is prepared, a static range was never measured, or a weight is not finite or too large.
    """
    replaced: dict[int, torch.nn.Module] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, QatLayer):
            try:
                replaced[id(layer)] = _integer_layer(name, layer)
            except ConfigError:
                raise
            except ValueError as error:  # of packing: more inputs than sums of 32 bits have room for
                raise ConfigError(f"{name or 'the module'}: {error}", remedy="name it in `ignore`") from error
        elif isinstance(layer, FoldedBatchNorm):
            replaced[id(layer)] = torch.nn.Identity()
    if not replaced:
        raise ConfigError("the module has no rounding layers", remedy="call dseek.compress.qat.prepare on it first")
    return replace(module, replaced).eval()


@torch.no_grad()
def _integer_layer(name: str, layer: QatLayer) -> IntegerLayer:
    """The integer twin of one prepared layer."""
    inputs, rounding = layer.input_rounding, layer.weight_rounding
    static = inputs.mode == "static"
    if static and not inputs.ready:
        raise ConfigError(
            f"{name or 'the module'}: the static range was never measured", remedy="calibrate before converting"
        )
    scheme = Scheme(
        weight_bits=rounding.bits,
        group_size=rounding.group_size,
        activations=inputs.mode,
        activation_bits=inputs.bits,
        unsigned=static and bool(inputs.unsigned),
    )
    if isinstance(layer, torch.nn.modules.conv._ConvNd):
        norm = layer.batch_norm
        weight, bias = folded(layer, norm if isinstance(norm, FoldedBatchNorm) else None)
    else:
        assert isinstance(layer, QatLinear)
        weight, bias = layer.weight, layer.bias
    if not weight.isfinite().all():
        raise ConfigError(f"{name or 'the module'}: its weight is not finite", needed="finite numbers to round")
    integers, step, minimum = rounding.integers(weight)
    bias = None if bias is None else bias.detach().float().clone()
    input_step = inputs.current_step(1).detach().float().clone() if static else None
    if rounding.group_size is None:
        values, scale, zero_point = integers.to(torch.int8), step.flatten().float().clone(), None
    else:
        scale = step[..., 0].float().clone()
        zero_point = None
        if minimum is not None:
            integers = integers - 8
            zero_point = (-8 - minimum / step).round()[..., 0].to(torch.int8)
        values = integers.flatten(1)[:, : weight.shape[1]].to(torch.int8)
    if isinstance(layer, torch.nn.modules.conv._ConvNd):
        return IntegerConv(scheme, values, scale, bias, input_step, ConvGeometry.of(layer))
    return IntegerLinear(scheme, values, scale, zero_point, bias, input_step)


def save(module: torch.nn.Module, path: str | Path) -> None:
    """Write a converted module, whole or not at all.

    Args:
        module: of `convert`.
        path: a safetensors file; replaced if it is there.

    Raises:
        ConfigError: the module has no integer layers.
        OSError: the file cannot be written.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, IntegerLayer)}
    if not layers:
        raise ConfigError("the module has no integer layers", remedy="call dseek.compress.qat.convert on it first")
    described = {name: asdict(layer.scheme) for name, layer in layers.items()}
    identities = [name for name, part in module.named_modules() if isinstance(part, torch.nn.Identity)]
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    header = {"format": FORMAT, "layers": json.dumps(described), "identities": json.dumps(identities)}
    atomic_write_bytes(path, to_safetensors(tensors, header))


def load(module: torch.nn.Module, path: str | Path) -> torch.nn.Module:
    """Read what `save` wrote into a plain module.

    Args:
        module: of the architecture that was prepared, never prepared itself; changed in place. Its parameters' values
            do not matter.
        path: the file.

    Returns:
        The converted module, or its replacement where it is a layer itself, in evaluation.

    Raises:
        FileFormatError: the file is damaged, or is of another architecture.
        OSError: it cannot be read.
    """
    Path(path).open("rb").close()  # an OSError rather than one of the library's
    try:
        with safe_open(str(path), framework="pt") as stored:
            header = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118, it is no mapping
    except SafetensorError as error:
        raise FileFormatError(f"{path} is no safetensors file: {error}") from error
    if header.get("format") != FORMAT:
        raise FileFormatError(f"{path} has the format {header.get('format')!r}", needed=FORMAT)
    layers, identities = _parsed(path, header, "layers", dict), _parsed(path, header, "identities", list)
    modules = dict(module.named_modules())
    replaced: dict[int, torch.nn.Module] = {}
    for name, described in layers.items():
        plain = modules.get(name)
        if not isinstance(plain, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)):
            raise FileFormatError(f"{path}: the module has no linear or convolution layer {name!r}")
        prefix = f"{name}." if name else ""
        replaced[id(plain)] = _read_layer(f"{path}: {name}", plain, described, tensors, prefix)
    for name in identities:
        if not isinstance(name, str) or not isinstance(
            modules.get(name), (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.Identity)
        ):
            raise FileFormatError(f"{path}: the module has no batch norm {name!r}")
        replaced[id(modules[name])] = torch.nn.Identity()
    module = replace(module, replaced)
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise FileFormatError(f"{path} is of another architecture: {error}") from error
    return module.eval()


def _parsed(path: str | Path, header: dict[str, str], key: str, kind: type) -> Any:
    """One JSON value of the header."""
    text = header.get(key, "")
    try:
        if len(text) > _MOST_HEADER_BYTES:
            raise ValueError("it is too long")
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: {key!r} of the header cannot be read: {error}") from error
    if not isinstance(value, kind):
        raise FileFormatError(f"{path}: {key!r} of the header is no {kind.__name__}")
    return value


def _read_layer(
    what: str, plain: torch.nn.Module, described: Any, tensors: dict[str, torch.Tensor], prefix: str
) -> IntegerLayer:
    """Make one integer layer from a file's tensors, everything checked."""
    scheme = _read_scheme(what, described)
    weight = plain.weight
    assert isinstance(weight, torch.Tensor)
    shape = tuple(weight.shape)
    linear = isinstance(plain, torch.nn.Linear)
    if scheme.group_size is not None and not linear:
        raise FileFormatError(f"{what}: a convolution has groups of weights")
    groups = 0 if scheme.group_size is None else -(-shape[1] // scheme.group_size)
    scale_shape = (shape[0], groups) if groups else (shape[0],)
    values = _tensor(what, tensors, prefix + "values", torch.int8, shape)
    scale = _tensor(what, tensors, prefix + "scale", torch.float32, scale_shape)
    low, high = (-8, 7) if groups and scheme.weight_bits == 4 else integer_bounds(scheme.weight_bits)
    if values.numel() and (int(values.min()) < low or int(values.max()) > high):
        raise FileFormatError(f"{what}: integers beyond {low} to {high}")
    if not (scale.isfinite().all() and (scale > 0).all()):
        raise FileFormatError(f"{what}: a scale is not finite or not above zero")
    zero_point = bias = input_step = None
    if prefix + "zero_point" in tensors:
        if not groups or scheme.weight_bits != 4:
            raise FileFormatError(f"{what}: zero points where there are no 4-bit groups")
        zero_point = _tensor(what, tensors, prefix + "zero_point", torch.int8, scale_shape)
        if int(zero_point.min()) < -8 or int(zero_point.max()) > 7:
            raise FileFormatError(f"{what}: zero points beyond -8 to 7")
    if prefix + "bias" in tensors:
        bias = _tensor(what, tensors, prefix + "bias", torch.float32, (shape[0],))
    if scheme.activations == "static":
        input_step = _tensor(what, tensors, prefix + "input_step", torch.float32, ())
        if not (input_step.isfinite() and input_step > 0):
            raise FileFormatError(f"{what}: the step of its inputs is not finite or not above zero")
    try:
        if linear:
            return IntegerLinear(scheme, values, scale, zero_point, bias, input_step)
        assert isinstance(plain, torch.nn.modules.conv._ConvNd)
        return IntegerConv(scheme, values, scale, bias, input_step, ConvGeometry.of(plain))
    except ConfigError:
        raise
    except ValueError as error:  # of packing: scales that a half does not hold
        raise FileFormatError(f"{what}: {error}") from error


def integer_bounds(bits: int) -> tuple[int, int]:
    """Least and largest value that a stored weight may have.

    Args:
        bits: 2 to 8.
    """
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _read_scheme(what: str, described: Any) -> Scheme:
    """Check what a file says of one layer."""
    names = {field.name for field in fields(Scheme)}
    if not isinstance(described, dict) or set(described) != names:
        raise FileFormatError(f"{what}: its description is {str(described)[:200]}", needed=", ".join(sorted(names)))
    checks = (
        ("weight_bits", type(described["weight_bits"]) is int and 2 <= described["weight_bits"] <= 8),
        ("group_size", described["group_size"] in (None, *GROUP_SIZES)),
        ("activations", described["activations"] in ("dynamic", "static", "none")),
        ("activation_bits", type(described["activation_bits"]) is int and 2 <= described["activation_bits"] <= 8),
        ("unsigned", type(described["unsigned"]) is bool),
    )
    for name, good in checks:
        if not good:
            raise FileFormatError(f"{what}: {name} is {str(described[name])[:100]}")
    scheme = Scheme(**described)
    if scheme.group_size is not None and (
        scheme.weight_bits not in (4, 8) or scheme.activations == "static" or scheme.activation_bits != 8
    ):
        raise FileFormatError(f"{what}: groups of {scheme.weight_bits} bits with {scheme.activations} activations")
    if scheme.unsigned and scheme.activations != "static":
        raise FileFormatError(f"{what}: unsigned activations that are not static")
    return scheme


def _tensor(
    what: str, tensors: dict[str, torch.Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """One tensor of a file, of the dtype and shape it must have."""
    found = tensors.get(name)
    if found is None or found.dtype != dtype or tuple(found.shape) != shape:
        described = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
        raise FileFormatError(f"{what}: {name} is {described}", needed=f"{dtype} {shape}")
    return found
