"""Post-training quantisation of a decoder, layer by layer.

One block is in memory at a time, with the calibration texts' hidden states in a mapped file beside it. A block sees
what the blocks before it make once they are rounded. What is finished lies in the work folder, a safetensors file a
layer, so that a run which was stopped goes on at the layer it had reached: its hidden states are computed anew from the
finished layers.

What it does not do: the embedding and the head stay as they are. S texts, T tokens, D model width.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save

from dseek.compress.ptq_calibration import InputStatistics, gathered, rounding_activations
from dseek.compress.ptq_gptq import GptqConfig, gptq, output_error
from dseek.compress.ptq_rounding import Grid, RoundedWeight, Scheme, round_to_nearest
from dseek.compress.ptq_smoothing import find_factors, fold, joints
from dseek.core.errors import ConfigError
from dseek.core.files import atomic_write_bytes, atomic_write_text
from dseek.core.shape import ModelShape
from dseek.models.decoder import Block, Rotary
from dseek.models.encoding import to_float32
from dseek.models.files import ModelFiles
from dseek.models.gate_file import fingerprint
from dseek.ops.attention.reference import visible

Method = Literal["rtn", "gptq", "smoothquant", "awq", "smoothquant+gptq", "awq+gptq"]
METHODS: tuple[Method, ...] = ("rtn", "gptq", "smoothquant", "awq", "smoothquant+gptq", "awq+gptq")
Progress = Callable[[str, int, int, dict[str, float]], None]
"""What is done, how much of it, of how much, and figures to show."""

_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Projections that share their inputs, in the order of computation."""
PROJECTIONS = tuple(name for group in _GROUPS for name in group)


@dataclass(frozen=True, kw_only=True, slots=True)
class PtqConfig:
    """What is made of a model."""

    scheme: Scheme
    """The integers."""
    method: Method = "rtn"
    """How they are chosen: rounding to nearest, GPTQ, factors against outliers, or factors and then GPTQ."""
    gptq: GptqConfig = field(default_factory=GptqConfig)
    """Of the methods with gptq."""
    scale_dtype: str = "float16"
    """float16, bfloat16 or float32: scales are rounded to it before weights are."""
    ignore: tuple[str, ...] = ()
    """Patterns, as in a shell, of projections that stay wide: such as `*.down_proj` or `model.layers.0.*`."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"the method is {self.method!r}", needed="one of " + ", ".join(METHODS))
        if self.scale_dtype not in ("float16", "bfloat16", "float32"):
            raise ConfigError(f"the dtype of scales is {self.scale_dtype!r}", needed="float16, bfloat16 or float32")

    @property
    def calibrates(self) -> bool:
        """Whether the method needs texts."""
        return self.method != "rtn"

    def keeps_wide(self, name: str) -> bool:
        """Tell whether a projection is to stay as it is.

        Args:
            name: such as `model.layers.0.mlp.down_proj`.
        """
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignore)


@dataclass(frozen=True, slots=True)
class RoundedLayer:
    """One block, rounded.

    Args:
        rounded: canonical name of a weight to its integers.
        wide: canonical name to what stayed wide, float32: norms, biases, projections that were left out.
        errors: canonical name to the share of the outputs' energy that rounding changed, where texts were given.
    """

    rounded: dict[str, RoundedWeight]
    wide: dict[str, torch.Tensor]
    errors: dict[str, float]


def best_method(scheme: Scheme) -> Method:
    """Name the method that is taken where there are texts.

    Beside int8 activations the two together were seen to help (`docs/lab-log.md`); GPTQ alone for the others is a
    choice that no measurement of ours stands behind yet.

    Args:
        scheme: the integers.
    """
    return "gptq" if scheme.activation_bits is None else "smoothquant+gptq"


def quantize_layers(
    files: ModelFiles, config: PtqConfig, texts_ST: torch.Tensor | None, work: Path, progress: Progress
) -> None:
    """Round all blocks of a model into a work folder, going on with what is there already.

    Args:
        files: the opened model.
        config: what to make of it.
        texts_ST: int64 [S, T], calibration texts of one length; None only where the method needs none.
        work: the folder; made where it is missing.
        progress: told after every layer and every text.

    Raises:
        ConfigError: the method needs texts, a pattern fits nothing, or the folder holds the work of other settings.
    """
    shape = files.shape
    if config.calibrates and texts_ST is None:
        raise ConfigError(f"the method {config.method} needs texts", remedy="give --text, or take --method rtn")
    _check_patterns(shape, config)
    _claim(work, files, config, texts_ST)
    finished = 0
    while layer_path(work, finished).is_file() and finished < shape.num_layers:
        finished += 1
    hidden: np.memmap | None = None
    if config.calibrates and finished < shape.num_layers:
        assert texts_ST is not None
        hidden = _embed(files, texts_ST, work)
    rotary = Rotary(shape)
    with torch.no_grad():
        for layer in range(0 if hidden is not None else finished, shape.num_layers):
            block = load_block(files, layer)
            figures: dict[str, float] = {}
            if layer < finished:
                install(block, read_layer(work, layer), layer)
            else:
                result = _round_layer(files, block, layer, config, hidden, rotary, progress)
                _write_layer(work, layer, result)
                if result.errors:
                    figures["worst output error"] = max(result.errors.values())
            if hidden is not None and layer + 1 < shape.num_layers:
                with rounding_activations(_rounded_modules(block, layer, config), config.scheme):
                    for index in range(len(hidden)):
                        x_1TD = torch.from_numpy(np.array(hidden[index]))[None]
                        hidden[index] = run_block(block, layer, shape, rotary, x_1TD)[0].numpy()
            files.release()
            progress("layers", layer + 1, shape.num_layers, figures)
    if hidden is not None:
        del hidden
        (work / "hidden.bin").unlink(missing_ok=True)


def _round_layer(
    files: ModelFiles,
    block: Block,
    layer: int,
    config: PtqConfig,
    hidden: np.memmap | None,
    rotary: Rotary,
    progress: Progress,
) -> RoundedLayer:
    """Round one block in place."""
    shape, scheme = files.shape, config.scheme
    prefix = f"model.layers.{layer}."
    dtype: torch.dtype = getattr(torch, config.scale_dtype)
    statistics: dict[str, InputStatistics] = {}

    # 1. What the projections' inputs look like, with everything before this block rounded.
    if hidden is not None:
        with gathered(block, _GROUPS, layer) as statistics:
            for index in range(len(hidden)):
                run_block(block, layer, shape, rotary, torch.from_numpy(np.array(hidden[index]))[None])
                progress("texts of the layer", index + 1, len(hidden), {})

    # 2. Factors against outliers.
    for kind in ("smoothquant", "awq"):
        if not config.method.startswith(kind):
            continue
        for joint in joints(shape.num_heads, shape.num_kv_heads):
            if any(config.keeps_wide(prefix + name) for name in joint.after):
                continue
            found = statistics[joint.after[0]]
            weights = [_linear(block, name).weight for name in joint.after]
            factors = find_factors(
                kind,
                found.rows(),
                found.largest,
                found.mean,
                weights,
                scheme,
                head_dim=shape.head_dim,
                repeat=joint.repeat,
            )
            fold(block, joint, factors)
            found.divide(factors)

    # 3. Integers. Projections with the same inputs are one matrix: rows do not see each other.
    rounded: dict[str, RoundedWeight] = {}
    errors: dict[str, float] = {}
    for group in _GROUPS:
        names = [name for name in group if not config.keeps_wide(prefix + name)]
        if not names:
            continue
        weights = [_linear(block, name).weight.detach().clone() for name in names]
        joined = torch.cat(weights)
        if config.method.endswith("gptq"):
            whole = gptq(joined, statistics[group[0]].hessian(), scheme, config.gptq, dtype)
        else:
            whole = round_to_nearest(joined, scheme, dtype)
        begin = 0
        for name, weight in zip(names, weights, strict=True):
            end = begin + len(weight)
            zero = None if whole.grid.zero is None else whole.grid.zero[begin:end].clone()
            piece = RoundedWeight(whole.values[begin:end].clone(), Grid(whole.grid.scale[begin:end].clone(), zero))
            rounded[prefix + name + ".weight"] = piece
            wide = piece.widen()
            if statistics:
                errors[prefix + name + ".weight"] = output_error(weight, wide, statistics[group[0]].hessian())
            _linear(block, name).weight.copy_(wide)
            begin = end
    others = {
        prefix + name: value.detach().clone()
        for name, value in block.state_dict().items()
        if prefix + name not in rounded
    }
    return RoundedLayer(rounded, others, errors)


def load_block(files: ModelFiles, layer: int) -> Block:
    """Load one block of a model, wide.

    Args:
        files: the opened model.
        layer: its index.

    Returns:
        The block in float32.
    """
    with torch.device("meta"):
        block = Block(files.shape, layer)
    state = {
        name: torch.tensor(to_float32(files.tensor(f"model.layers.{layer}.{name}"))) for name in block.state_dict()
    }
    block.load_state_dict(state, strict=True, assign=True)
    return block.requires_grad_(False).eval()


def run_block(block: Block, layer: int, shape: ModelShape, rotary: Rotary, x_BTD: torch.Tensor) -> torch.Tensor:
    """Run whole texts through one block.

    Args:
        block: the block.
        layer: its index.
        shape: the model's.
        rotary: its rotation.
        x_BTD: float32 [B, T, D].

    Returns:
        float32 [B, T, D].
    """
    positions = torch.arange(x_BTD.shape[1])
    windowed = shape.sliding_window is not None and (shape.window_layers is None or shape.window_layers[layer])
    mask = visible(positions, positions, shape.sliding_window) if windowed else None
    out_BTD: torch.Tensor = block(x_BTD, rotary(positions, x_BTD.dtype), mask, not windowed, None)
    return out_BTD


def install(block: Block, finished: RoundedLayer, layer: int) -> None:
    """Give a block what a finished layer stands for.

    Args:
        block: changed in place.
        finished: the layer.
        layer: its index.
    """
    prefix = f"model.layers.{layer}."
    state = {name: weight.widen() for name, weight in finished.rounded.items()} | finished.wide
    block.load_state_dict({name.removeprefix(prefix): value for name, value in state.items()}, strict=True)


def _linear(block: Block, name: str) -> torch.nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, torch.nn.Linear)
    return module


def _rounded_modules(block: Block, layer: int, config: PtqConfig) -> Iterator[torch.nn.Module]:
    for name in PROJECTIONS:
        if not config.keeps_wide(f"model.layers.{layer}.{name}"):
            yield block.get_submodule(name)


def _embed(files: ModelFiles, texts_ST: torch.Tensor, work: Path) -> np.memmap:
    """Hidden states before the first block, in a mapped file [S, T, D]."""
    size = (*texts_ST.shape, files.shape.hidden_size)
    hidden = np.memmap(work / "hidden.bin", dtype=np.float32, mode="w+", shape=size)
    table = to_float32(files.tensor("model.embed_tokens.weight"))
    for index, text in enumerate(texts_ST.numpy()):
        hidden[index] = table[text]
    return hidden


def _check_patterns(shape: ModelShape, config: PtqConfig) -> None:
    names = [f"model.layers.{layer}.{name}" for layer in range(shape.num_layers) for name in PROJECTIONS]
    for pattern in config.ignore:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"the pattern {pattern!r} fits no projection", needed=f"one that fits names such as {names[0]}"
            )
    if all(config.keeps_wide(name) for name in names):
        raise ConfigError("every projection is left out", needed="at least one to quantise")


def _claim(work: Path, files: ModelFiles, config: PtqConfig, texts_ST: torch.Tensor | None) -> None:
    """Make the work folder say what it is for, or check that it is for the same."""
    texts = "" if texts_ST is None else hashlib.sha256(texts_ST.numpy().tobytes()).hexdigest()
    wanted = {"model": fingerprint(files), "config": asdict(config), "texts": texts}
    path = work / "work.json"
    text = json.dumps(wanted, indent=1, sort_keys=True)
    if path.is_file():
        if path.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"{work} holds the work of another model, other settings or other texts",
                remedy="repeat the command as it was, or remove that folder",
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text)


def layer_path(work: Path, layer: int) -> Path:
    """Say where a finished layer lies.

    Args:
        work: the work folder.
        layer: its index.
    """
    return work / f"layer-{layer:05d}.safetensors"


def _write_layer(work: Path, layer: int, result: RoundedLayer) -> None:
    tensors: dict[str, torch.Tensor] = {f"wide {name}": value for name, value in result.wide.items()}
    for name, weight in result.rounded.items():
        tensors[f"values {name}"] = weight.values
        tensors[f"scale {name}"] = weight.grid.scale
        if weight.grid.zero is not None:
            tensors[f"zero {name}"] = weight.grid.zero
    errors = {name: repr(value) for name, value in result.errors.items()}
    data = save({name: value.contiguous() for name, value in tensors.items()}, metadata=errors)
    atomic_write_bytes(layer_path(work, layer), data)


def read_layer(work: Path, layer: int) -> RoundedLayer:
    """Read a finished layer.

    Args:
        work: the work folder.
        layer: its index.

    Returns:
        The layer.

    Raises:
        ConfigError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = layer_path(work, layer)
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            errors = {name: float(value) for name, value in (file.metadata() or {}).items() if name != "format"}
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error})", remedy="remove it and run the command again") from None
    rounded = {
        name.removeprefix("values "): RoundedWeight(
            values, Grid(tensors["scale " + name[7:]], tensors.get("zero " + name[7:]))
        )
        for name, values in tensors.items()
        if name.startswith("values ")
    }
    wide = {name[5:]: value for name, value in tensors.items() if name.startswith("wide ")}
    return RoundedLayer(rounded, wide, errors)
