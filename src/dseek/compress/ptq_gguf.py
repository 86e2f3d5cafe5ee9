"""Writes a rounded model as a GGUF file of Q8_0, Q4_0 or Q4_1, which llama.cpp runs.

A GGUF source keeps its tables too. Layers are read one at a time, and the tensors' bytes are written as they come
(`dseek.models.gguf_writer`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dseek.compress.ptq import PROJECTIONS, PtqConfig, read_layer
from dseek.compress.ptq_rounding import Scheme
from dseek.core.errors import ConfigError
from dseek.models.encoding import to_float32
from dseek.models.files import ModelFiles
from dseek.models.gguf_files import GgufFiles
from dseek.models.gguf_writer import write_gguf_file
from dseek.ops.linear.integers import group_integers
from dseek.ops.tensor import EncodedTensor

FILE_TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_1": 3}
"""llama.cpp's numbers of the file types (`llama_ftype`)."""
_WIDE = ("F32", "F16", "BF16")
_KEPT = (*_WIDE, "Q8_0", "Q6_K")
"""Encodings in which a source's tables are copied."""


def encoding_of(scheme: Scheme) -> str:
    """Name the encoding that holds a scheme.

    Args:
        scheme: the integers.

    Raises:
        ConfigError: GGUF has none.
    """
    if scheme.group_size != 32 or scheme.activation_bits is not None:
        raise ConfigError("a GGUF file of other groups than 32 was asked for", needed="--group-size 32")
    if scheme.num_bits == 8:
        return "Q8_0"
    return "Q4_0" if scheme.symmetric else "Q4_1"


def write_gguf(files: ModelFiles, config: PtqConfig, work: Path, target: Path) -> None:
    """Write the file.

    Args:
        files: the opened source.
        config: how it was rounded; scales are float16.
        work: where the finished layers lie.
        target: the file, which is replaced.

    Raises:
        ConfigError: the scheme has no encoding in GGUF.
        UnsupportedModelError: metadata or a tokenizer that cannot be written.
        OSError: it cannot be written.
    """
    encoding = encoding_of(config.scheme)
    wide = {name for name in files.tensor_names() if not _is_rounded(name, config)}
    encodings = {name: _wide_encoding(files, name) if name in wide else encoding for name in files.tensor_names()}
    write_gguf_file(files, encodings, _in_order(files, config, work, wide), target, file_type=FILE_TYPES[encoding])


def _is_rounded(name: str, config: PtqConfig) -> bool:
    module = name.removesuffix(".weight")
    return name.endswith(tuple(f"{part}.weight" for part in PROJECTIONS)) and not config.keeps_wide(module)


def _in_order(files: ModelFiles, config: PtqConfig, work: Path, wide: set[str]) -> Iterator[EncodedTensor]:
    """Every tensor, encoded, in the order of `tensor_names`; one layer in memory at a time."""
    at, layer = -1, None
    for name in files.tensor_names():
        if not name.startswith("model.layers."):
            yield _table(files, name)
            files.release()
            continue
        number = int(name.split(".")[2])
        if number != at:
            at, layer = number, read_layer(work, number)
        assert layer is not None
        if name in wide:
            values = layer.wide[name].numpy()
            yield EncodedTensor(name, values.shape, "F32", np.ascontiguousarray(values).reshape(-1).view(np.uint8))
            continue
        weight = layer.rounded[name]
        zero = None if weight.grid.zero is None else weight.grid.zero.numpy()
        yield group_integers(
            name,
            weight.values.numpy(),
            weight.grid.scale.numpy(),
            num_bits=config.scheme.num_bits,
            zero_point=zero,
        )


def _wide_encoding(files: ModelFiles, name: str) -> str:
    """How a tensor that is not rounded is stored: layers in F32, tables as the source has them, else in Q8_0."""
    if name.startswith("model.layers.") or len(files.tensor_shape(name)) == 1:
        return "F32"
    stored = files.tensor_encoding(name)
    if isinstance(files, GgufFiles) and stored in _KEPT:
        return stored
    return "Q8_0" if files.tensor_shape(name)[1] % 32 == 0 else "F32"


def _table(files: ModelFiles, name: str) -> EncodedTensor:
    """The embedding, the head or the last norm."""
    tensor, encoding = files.tensor(name), _wide_encoding(files, name)
    if tensor.encoding == encoding:
        return tensor
    values = np.ascontiguousarray(to_float32(tensor), dtype=np.float32)
    if encoding == "F32":
        return EncodedTensor(name, tensor.shape, "F32", values.reshape(-1).view(np.uint8))
    from gguf import GGMLQuantizationType, quants

    data = np.ascontiguousarray(quants.quantize(values, GGMLQuantizationType[encoding]))
    return EncodedTensor(name, tensor.shape, encoding, data.reshape(-1))
