"""`prepare`: put rounding layers where a module has linear and convolution layers; `restore`: take them away again."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from dseek.compress.qat_config import QatConfig
from dseek.compress.qat_layers import (
    ADDED,
    FoldedBatchNorm,
    FoldedBatchNorm1d,
    FoldedBatchNorm2d,
    QatConv1d,
    QatConv2d,
    QatLayer,
    QatLinear,
)
from dseek.core.errors import ConfigError
from dseek.core.logs import get_logger

_log = get_logger(__name__)

_KINDS: dict[type[torch.nn.Module], str] = {
    torch.nn.Linear: "linear",
    torch.nn.Conv1d: "convolution",
    torch.nn.Conv2d: "convolution",
}
_NORMS: dict[type[torch.nn.Module], type[FoldedBatchNorm]] = {
    torch.nn.BatchNorm1d: FoldedBatchNorm1d,
    torch.nn.BatchNorm2d: FoldedBatchNorm2d,
}
_OTHER_PRODUCTS = (
    torch.nn.ConvTranspose1d,
    torch.nn.ConvTranspose2d,
    torch.nn.ConvTranspose3d,
    torch.nn.Conv3d,
    torch.nn.Bilinear,
    torch.nn.RNNBase,
    torch.nn.RNNCellBase,
    torch.nn.MultiheadAttention,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerChoice:
    """What `prepare` does with one layer."""

    name: str
    """Path of the layer."""
    kind: str
    """Its class."""
    config: QatConfig | None
    """How it rounds; None where it stays wide."""
    reason: str
    """Why it stays wide; empty where it rounds."""
    batch_norm: str | None
    """Path of the batch norm that is folded into it."""


def inspect(module: torch.nn.Module, config: QatConfig) -> list[LayerChoice]:
    """Say what `prepare` would do, layer by layer.

    Args:
        module: not changed.
        config: how to round.

    Returns:
        A choice for every layer that multiplies by a weight, those that stay wide with the reason.

    Raises:
        ConfigError: a name to ignore, override or fold that no layer has, or a pair that cannot be folded.
    """
    modules = dict(module.named_modules())
    pairs = _pairs(module, config)
    choices = []
    used: set[str] = set()
    for name, layer in modules.items():
        reason = _wide_reason(name, layer, modules)
        if reason is None:
            continue
        ignored = [pattern for pattern in config.ignore if fnmatch.fnmatchcase(name, pattern)]
        used.update(ignored)
        own = config
        for pattern, other in config.overrides.items():
            if fnmatch.fnmatchcase(name, pattern):
                used.add(pattern)
                own = other
                break
        if ignored:
            reason = f"ignored by {ignored[0]!r}"
        choices.append(
            LayerChoice(
                name=name,
                kind=type(layer).__name__,
                config=None if reason else own,
                reason=reason,
                batch_norm=None if reason else pairs.get(name),
            )
        )
    unused = [pattern for pattern in (*config.ignore, *config.overrides) if pattern not in used]
    if unused:
        raise ConfigError(
            f"no layer is called {unused[0]!r}",
            needed="names of layers that multiply: " + ", ".join(choice.name for choice in choices[:8]),
        )
    return choices


def prepare(module: torch.nn.Module, config: QatConfig | None = None) -> torch.nn.Module:
    """Make a module round as its integer version will.

    Args:
        module: changed in place: its linear and convolution layers are replaced by rounding ones that share their
            parameters. An optimiser that holds the parameters goes on holding them; learned steps are new ones
            (`parameter_groups`).
        config: how to round; None is int8 by channel with dynamic activations.

    Returns:
        The module, or its replacement where it is a layer itself. Layers that stay wide are logged with the reason.

    Raises:
        ConfigError: settings that fit no layer, or a module that is prepared already.
    """
    config = config or QatConfig()
    if any(isinstance(layer, QatLayer) for layer in module.modules()):
        raise ConfigError("the module is prepared already", remedy="restore it first, or start from a fresh copy")
    modules = dict(module.named_modules())
    replaced: dict[int, torch.nn.Module] = {}
    wide = []
    for choice in inspect(module, config):
        layer = modules[choice.name]
        if choice.config is None:
            wide.append(f"{choice.name or 'the module'} ({choice.kind}: {choice.reason})")
        elif type(layer) is torch.nn.Linear:
            replaced[id(layer)] = QatLinear(layer, choice.config)
        else:
            norm = None
            if choice.batch_norm is not None:
                plain = modules[choice.batch_norm]
                norm = _NORMS[type(plain)](plain, choice.config)
                replaced[id(plain)] = norm
            kind = QatConv1d if type(layer) is torch.nn.Conv1d else QatConv2d
            replaced[id(layer)] = kind(layer, choice.config, norm)
    if not replaced:
        raise ConfigError("no layer of the module can round", needed="a Linear, Conv1d or Conv2d that is not ignored")
    if wide:
        _log.warning("left as they are: %s", ", ".join(wide))
    for layer in modules.values():
        # PyTorch's fused path for inference reads weights without calling the layers that hold them.
        if isinstance(layer, torch.nn.TransformerEncoderLayer):
            layer.activation_relu_or_gelu = 0
    return replace(module, replaced)


def restore(module: torch.nn.Module) -> torch.nn.Module:
    """Give the plain layers back, with the parameters as they are now.

    Args:
        module: of `prepare`; changed in place.

    Returns:
        The module, or its replacement where it is a layer itself.
    """
    plain: dict[int, torch.nn.Module] = {}
    for layer in module.modules():
        if isinstance(layer, (QatLayer, FoldedBatchNorm)):
            kind = next(base for base in type(layer).__mro__ if base in _KINDS or base in _NORMS)
            fresh = kind.__new__(kind)
            torch.nn.Module.__init__(fresh)
            fresh.__dict__.update(layer.__dict__)
            fresh.__dict__["_modules"] = {name: child for name, child in layer._modules.items() if name not in ADDED}
            for extra in ("config", "batch_norm", "statistics_frozen"):
                fresh.__dict__.pop(extra, None)
            plain[id(layer)] = fresh
        elif isinstance(layer, torch.nn.TransformerEncoderLayer):
            relu = layer.activation is torch.nn.functional.relu or isinstance(layer.activation, torch.nn.ReLU)
            gelu = layer.activation is torch.nn.functional.gelu or isinstance(layer.activation, torch.nn.GELU)
            layer.activation_relu_or_gelu = 1 if relu else 2 if gelu else 0
    return replace(module, plain)


def replace(module: torch.nn.Module, by_identity: Mapping[int, torch.nn.Module]) -> torch.nn.Module:
    """Put other modules in the places of some, wherever they are used.

    Args:
        module: changed in place.
        by_identity: replacements, by the `id` of what they replace.

    Returns:
        The module or its own replacement.
    """
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in by_identity:
                parent._modules[name] = by_identity[id(child)]
    return by_identity.get(id(module), module)


def _wide_reason(name: str, layer: torch.nn.Module, modules: Mapping[str, torch.nn.Module]) -> str | None:
    """Why a layer stays wide; empty where it does not; None where it is no product with a weight."""
    if isinstance(layer, _OTHER_PRODUCTS):
        return "only Linear, Conv1d and Conv2d round"
    if not isinstance(layer, tuple(_KINDS)):
        return None
    parent = modules.get(name.rpartition(".")[0]) if name else None
    if isinstance(parent, torch.nn.MultiheadAttention):
        return "MultiheadAttention reads its weight without calling it"
    if type(layer) not in _KINDS:
        return "a class of its own, whose code is not known"
    if layer._forward_pre_hooks or layer._forward_hooks:
        return "it has hooks, which may change its weight"
    weight = layer._parameters.get("weight")
    if not isinstance(weight, torch.nn.Parameter) or not weight.is_floating_point():
        return "its weight is no parameter of floating point"
    if type(weight.data) is not torch.Tensor:
        return "its weight is a tensor of another library's class"
    return ""


def _pairs(module: torch.nn.Module, config: QatConfig) -> dict[str, str]:
    """Convolutions and the batch norms that alone follow them, by name."""
    modules = dict(module.named_modules())
    pairs = dict(_traced_pairs(module, modules))
    for convolution, norm in config.fold:
        for name in (convolution, norm):
            if name not in modules:
                raise ConfigError(f"no layer is called {name!r}", needed="names of a convolution and its batch norm")
        if not _foldable(modules[convolution], modules[norm]):
            raise ConfigError(
                f"{norm} cannot be folded into {convolution}",
                needed="a Conv1d or Conv2d and a batch norm of as many channels that keeps running statistics",
            )
        pairs[convolution] = norm
    return pairs


def _foldable(convolution: torch.nn.Module, norm: torch.nn.Module) -> bool:
    """Whether the two are a convolution and a batch norm of its channels with running statistics."""
    return (
        type(convolution) in (torch.nn.Conv1d, torch.nn.Conv2d)
        and type(norm) in _NORMS
        and norm.num_features == convolution.out_channels
        and norm.running_var is not None
    )


def _traced_pairs(module: torch.nn.Module, modules: Mapping[str, torch.nn.Module]) -> Iterator[tuple[str, str]]:
    """Find pairs in the graph of the module, or of those of its parts that can be traced."""
    if not any(type(layer) in _NORMS for layer in module.modules()):
        return
    names = {id(layer): name for name, layer in modules.items()}
    try:
        graph = torch.fx.Tracer().trace(module)
    except Exception as error:  # whatever the module's own code raises when it meets a stand-in for a tensor
        _log.debug("%s cannot be traced (%s); its parts are", type(module).__name__, error)
        if isinstance(module, torch.nn.Sequential):
            for first, second in zip(list(module), list(module)[1:], strict=False):
                if _foldable(first, second):
                    yield names[id(first)], names[id(second)]
        for child in module.children():
            yield from _traced_pairs(child, modules)
        return
    called: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            called[node.target] = called.get(node.target, 0) + 1
    for node in graph.nodes:
        if node.op != "call_module" or len(node.users) != 1 or called[node.target] != 1:
            continue
        user = next(iter(node.users))
        if user.op != "call_module" or called[user.target] != 1:
            continue
        first, second = module.get_submodule(node.target), module.get_submodule(user.target)
        if _foldable(first, second):
            yield names[id(first)], names[id(second)]
