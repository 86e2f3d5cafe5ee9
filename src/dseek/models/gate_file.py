"""Gates of dynamic attention in a safetensors file beside a model: read as hostile, checked against the model.

A gate file MUST carry `format` "dseek-gate-2", `theta` (the base of the gate's rotation) and `model` (the fingerprint
of the model it was trained on) in its metadata, and for every layer i the tensors `layers.i.query` [H, d, g],
`layers.i.key` [L, G, 3 d, g], `layers.i.query_gain` [H, g], `layers.i.key_gain` [L, G, g], `layers.i.scale` [H],
`layers.i.own` [H, d], `layers.i.own_bias` [H] and `layers.i.dense` [G], in F32, F16 or BF16: H query heads, G key and
value heads, d head width, g gate width (a multiple of 16), L levels; dense is 1 for heads that have to see everything,
since no gate finds what they look for, and 0 for the others. It MAY carry `layers.i.window` [G], for all layers or for
none: the window of each key and value head in tokens, one of 64, 128, ... 4096; and likewise `layers.i.share_factor`
[G], above 0: by how much a head's least share is larger than what a pattern says. What the numbers mean says
`dseek.train.gate`.

It MAY also carry `layers.i.level_bias` [H, M], M from 1 to 6, which is added to the scores of far cells by level (those
of one block first) and lies between -30 and 30; levels beyond M take the last one's. A layer without it has no bias.
See `dseek.train.level_bias`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dseek.core.attention_pattern import BLOCK_TOKENS, MAX_SHARE_FACTOR, WINDOWS
from dseek.core.errors import FileFormatError
from dseek.core.shape import ModelShape
from dseek.models.encoding import to_float32
from dseek.models.safetensors_reader import SafetensorsFile
from dseek.ops.tensor import EncodedTensor

if TYPE_CHECKING:
    from dseek.models.files import ModelFiles

FORMAT = "dseek-gate-2"
FILE_NAME = "gate.safetensors"
"""Name of the file in a model's folder; beside a single file MODEL.gguf it is MODEL.gate.safetensors."""

SHIPPED = Path(__file__).parent / "gates"
"""Folder of the gates that come with the package."""

MAX_FILE_BYTES = 256 * 2**20
MAX_GATE_DIM = 512
MAX_LEVELS = 6
LEARNED_PARTS = ("query", "key", "query_gain", "key_gain", "scale", "own", "own_bias")
PARTS = (*LEARNED_PARTS, "dense")

MAX_LEVEL_BIAS = 30.0
"""Bound on biases of far cells: at minus that, a level is as good as switched off."""


@dataclass(frozen=True, slots=True)
class LayerGate:
    """The gate of one layer; float32 arrays shaped as the module says."""

    query: np.ndarray
    """[H, d, g]."""
    key: np.ndarray
    """[L, G, 3 d, g]."""
    query_gain: np.ndarray
    """[H, g]."""
    key_gain: np.ndarray
    """[L, G, g]."""
    scale: np.ndarray
    """[H]."""
    own: np.ndarray
    """[H, d]."""
    own_bias: np.ndarray
    """[H]."""
    dense: np.ndarray
    """[G], 1 for heads that see everything."""
    window: np.ndarray | None = None
    """[G], tokens; None where the file does not say."""
    share_factor: np.ndarray | None = None
    """[G], factor on the least share; None where all heads have the same."""
    level_bias: np.ndarray | None = None
    """[H, M], added to the scores of far cells by level, or None."""

    @property
    def learned(self) -> tuple[np.ndarray, ...]:
        """What the kernels take, in their order."""
        return tuple(getattr(self, part) for part in LEARNED_PARTS)

    def bias_of_levels(self, num_levels: int) -> np.ndarray | None:
        """Give far cells of every level their bias.

        Args:
            num_levels: levels L that there may be. Those that are not stored take the last one's bias: larger cells are
                wrong by something nearer to that than to nothing.

        Returns:
            float32 [H, L], or None where none is stored.
        """
        if self.level_bias is None:
            return None
        last = self.level_bias.shape[1] - 1
        return np.ascontiguousarray(self.level_bias[:, np.minimum(np.arange(num_levels), last)])


@dataclass(frozen=True, slots=True)
class Gates:
    """The gates of a model."""

    layers: tuple[LayerGate, ...]
    """One a layer."""
    theta: float
    """Base of their rotation."""
    model: str
    """Fingerprint of the model they were trained on."""

    @property
    def gate_dim(self) -> int:
        """Width g."""
        return int(self.layers[0].query.shape[2])

    @property
    def dense_heads(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the heads that see everything, layer by layer."""
        return tuple(tuple(np.flatnonzero(layer.dense > 0.5).tolist()) for layer in self.layers)

    @property
    def windows(self) -> tuple[tuple[int, ...], ...]:
        """Windows in tokens by layer and key and value head; empty where the file does not say."""
        if any(layer.window is None for layer in self.layers):
            return ()
        return tuple(tuple(int(tokens) for tokens in layer.window) for layer in self.layers if layer.window is not None)

    @property
    def share_factors(self) -> tuple[tuple[float, ...], ...]:
        """Factors on the least share by layer and key and value head; empty where the file does not say."""
        factors = [layer.share_factor for layer in self.layers]
        return tuple(tuple(float(value) for value in factor) for factor in factors if factor is not None)

    def rotation(self, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """Tabulate the rotation at the first position of every block.

        Args:
            num_blocks: rows of the table.

        Returns:
            Cosine and sine, each float32 [num_blocks, g / 2].
        """
        exponents = np.arange(0, self.gate_dim, 2, dtype=np.float32) / np.float32(self.gate_dim)
        frequencies = np.power(np.float32(self.theta), -exponents)
        angles = np.multiply.outer(np.arange(num_blocks, dtype=np.float32) * np.float32(BLOCK_TOKENS), frequencies)
        return np.cos(angles), np.sin(angles)


def fingerprint(files: ModelFiles) -> str:
    """Tell a model from others of its shape, whatever precision its file is in.

    Args:
        files: the opened model.

    Returns:
        A hash of its last norm, which every file keeps in 16 bits or more.
    """
    norm = np.ascontiguousarray(to_float32(files.tensor("model.norm.weight")), dtype=np.float32).reshape(-1)
    bits = norm.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return hashlib.sha256(rounded.tobytes()).hexdigest()[:16]


def find_gates(files: ModelFiles) -> Gates | None:
    """Look for gates beside a model, then among those that come with the package.

    Args:
        files: the opened model.

    Returns:
        Its gates, or None if there are none.

    Raises:
        FileFormatError: the file beside the model is damaged or for another model.
    """
    beside = files.path / FILE_NAME if files.path.is_dir() else files.path.with_suffix("." + FILE_NAME)
    if beside.is_file():
        gates = read_gates(beside, files.shape)
        if gates.model != fingerprint(files):
            raise FileFormatError(
                f"{beside} was trained on another model than {files.path}",
                needed="gates of this model",
                remedy="train them with `dseek train-gate`, or take the file away",
            )
        return gates
    for shipped in sorted(SHIPPED.glob(f"*-{fingerprint(files)}.safetensors")):
        return read_gates(shipped, files.shape)
    return None


def read_gates(path: Path, shape: ModelShape) -> Gates:
    """Read a gate file.

    Args:
        path: the file.
        shape: the model it has to fit.

    Returns:
        Its gates.

    Raises:
        FileFormatError: not a gate file, damaged, or for another model.
        UnsupportedModelError: a dtype that is not read here.
        OSError: it cannot be opened.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise FileFormatError(f"{path} is {path.stat().st_size} bytes long", needed=f"at most {MAX_FILE_BYTES}")
    stored = SafetensorsFile(path)
    try:
        if stored.metadata.get("format") != FORMAT:
            raise FileFormatError(f"{path} has the format {stored.metadata.get('format')!r}", needed=FORMAT)
        layers = tuple(_read_layer(stored, layer, shape) for layer in range(shape.num_layers))
        dims = {layer.query.shape[2] for layer in layers}
        if len(dims) != 1:
            raise FileFormatError(f"{path}: the layers' gates differ in width: {sorted(dims)}", needed="one width")
        for what, known in (
            ("windows", [layer.window is not None for layer in layers]),
            ("factors on the least share", [layer.share_factor is not None for layer in layers]),
        ):
            if len(set(known)) != 1:
                raise FileFormatError(f"{path} has {what} for some layers only", needed="for all of them or for none")
        return Gates(layers, _theta(stored), stored.metadata.get("model", ""))
    finally:
        stored.close()


def _theta(stored: SafetensorsFile) -> float:
    text = stored.metadata.get("theta", "")
    try:
        theta = float(text)
    except ValueError:
        theta = math.nan
    if not 1.0 < theta < 1e12:
        raise FileFormatError(f"{stored.path} has the theta {text!r}", needed="a number above 1 and below 1e12")
    return theta


def _read_layer(stored: SafetensorsFile, layer: int, shape: ModelShape) -> LayerGate:
    """Read and check the arrays of one layer."""
    arrays = {}
    for part in PARTS:
        name = f"layers.{layer}.{part}"
        if name not in stored.tensors:
            raise FileFormatError(
                f"{stored.path} has no tensor {name}", needed=f"gates for the model's {shape.num_layers} layers"
            )
        arrays[part] = _read_array(stored, name)
    query, key = arrays["query"], arrays["key"]
    groups, heads, width = shape.num_kv_heads, shape.num_heads, shape.head_dim
    dim = query.shape[-1] if query.ndim == 3 else 0
    levels = key.shape[0] if key.ndim == 4 else 0
    wanted = {
        "query": (heads, width, dim),
        "key": (levels, groups, 3 * width, dim),
        "query_gain": (heads, dim),
        "key_gain": (levels, groups, dim),
        "scale": (heads,),
        "own": (heads, width),
        "own_bias": (heads,),
        "dense": (groups,),
    }
    for part, sizes in wanted.items():
        if arrays[part].shape != sizes or not 16 <= dim <= MAX_GATE_DIM or dim % 16 or not 1 <= levels <= MAX_LEVELS:
            raise FileFormatError(
                f"{stored.path}: layers.{layer}.{part} has the shape {list(arrays[part].shape)}",
                needed=f"{heads} heads and {groups} key and value heads of width {width}, a gate width that is a "
                "multiple of 16",
                remedy="train a gate for this model with `dseek train-gate`",
            )
    return LayerGate(
        **arrays,
        window=_read_windows(stored, f"layers.{layer}.window", groups),
        share_factor=_read_share_factors(stored, f"layers.{layer}.share_factor", groups),
        level_bias=_read_level_bias(stored, f"layers.{layer}.level_bias", heads),
    )


def _read_share_factors(stored: SafetensorsFile, name: str, num_kv_heads: int) -> np.ndarray | None:
    """Read and check the factors on the least share of one layer, if there are any."""
    if name not in stored.tensors:
        return None
    factors_G = _read_array(stored, name)
    if factors_G.shape != (num_kv_heads,) or not ((factors_G > 0) & (factors_G <= MAX_SHARE_FACTOR)).all():
        raise FileFormatError(
            f"{stored.path}: {name} is {factors_G.tolist()}"[:200],
            needed=f"{num_kv_heads} factors above 0 and up to {MAX_SHARE_FACTOR:g}",
            remedy="train a gate for this model with `dseek train-gate`",
        )
    return factors_G


def _read_level_bias(stored: SafetensorsFile, name: str, num_heads: int) -> np.ndarray | None:
    """Read and check the bias of far cells, which need not be there."""
    if name not in stored.tensors:
        return None
    shape = stored.tensors[name].shape
    if len(shape) != 2 or shape[0] != num_heads or not 1 <= shape[1] <= MAX_LEVELS:
        raise FileFormatError(
            f"{stored.path}: {name} has the shape {list(shape)}",
            needed=f"{num_heads} heads and 1 to {MAX_LEVELS} levels",
            remedy="train a gate for this model with `dseek train-gate`",
        )
    bias_HM = _read_array(stored, name)
    if np.abs(bias_HM).max() > MAX_LEVEL_BIAS:
        raise FileFormatError(
            f"{stored.path}: {name} holds {float(bias_HM.flat[np.abs(bias_HM).argmax()])}",
            needed=f"{-MAX_LEVEL_BIAS} to {MAX_LEVEL_BIAS}",
        )
    return bias_HM


def _read_array(stored: SafetensorsFile, name: str) -> np.ndarray:
    """Read a tensor as float32."""
    tensor = stored.tensors[name]
    encoded = EncodedTensor(name, tensor.shape, tensor.encoding, stored.data(name))
    array = np.array(to_float32(encoded), dtype=np.float32, order="C")
    if not np.isfinite(array).all():
        raise FileFormatError(f"{stored.path}: tensor {name} holds numbers that are not finite")
    return array


def _read_windows(stored: SafetensorsFile, name: str, num_kv_heads: int) -> np.ndarray | None:
    """Read and check the windows of one layer, if there are any."""
    if name not in stored.tensors:
        return None
    windows_G = _read_array(stored, name)
    if windows_G.shape != (num_kv_heads,) or not np.isin(windows_G, WINDOWS).all():
        raise FileFormatError(
            f"{stored.path}: {name} is {windows_G.tolist()}"[:200],
            needed=f"{num_kv_heads} windows, each one of " + ", ".join(map(str, WINDOWS)),
            remedy="train a gate for this model with `dseek train-gate`",
        )
    return windows_G
