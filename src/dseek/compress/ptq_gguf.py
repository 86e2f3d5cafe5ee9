"""Writes a rounded model as a GGUF file of Q8_0, Q4_0 or Q4_1, which llama.cpp runs.

A GGUF source keeps its metadata, tokenizer and tables; of a Hugging Face folder the metadata is written anew
(`gguf_metadata`). Layers are read one at a time, and the tensors' bytes are written as they come.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dseek.compress.gguf_metadata import add_metadata, copy_metadata, extra_tensors
from dseek.compress.ptq import PROJECTIONS, PtqConfig, read_layer
from dseek.compress.ptq_rounding import Scheme
from dseek.core.errors import ConfigError
from dseek.core.shape import ModelShape
from dseek.models.encoding import to_float32
from dseek.models.files import ModelFiles
from dseek.models.gguf_files import GgufFiles
from dseek.models.tensor_names import gguf_name, rotated_heads
from dseek.ops.linear.integers import group_integers
from dseek.ops.tensor import BLOCK_SIZES, EncodedTensor

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
    from gguf import GGUFWriter

    encoding = encoding_of(config.scheme)
    architecture = _architecture(files)
    writer = GGUFWriter(str(target), architecture)
    if isinstance(files, GgufFiles):
        copy_metadata(writer, files.path)
    else:
        add_metadata(writer, files)
    extra = extra_tensors(files.shape)
    writer.add_file_type(FILE_TYPES[encoding])
    writer.add_quantization_version(2)
    # The header names every tensor before the first byte of one: sizes come from the shapes alone.
    wide = {name for name in files.tensor_names() if not _is_rounded(name, config)}
    for name in files.tensor_names():
        kind = _wide_encoding(files, name) if name in wide else encoding
        _announce(writer, gguf_name(name), files.tensor_shape(name), kind)
    for name, values in extra:
        _announce(writer, name, values.shape, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in _in_order(files, config, work, wide):
        heads = rotated_heads(tensor.name, files.shape) if architecture == "llama" else None
        writer.write_tensor_data(_pairs(tensor, heads, files.shape) if heads is not None else tensor.data)
    for _, values in extra:
        writer.write_tensor_data(values.view(np.uint8))
    writer.close()


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


def _announce(writer: Any, name: str, shape: tuple[int, ...], encoding: str) -> None:
    from gguf import GGMLQuantizationType

    elements, num_bytes = BLOCK_SIZES[encoding]
    row_bytes = shape[-1] // elements * num_bytes
    count = int(np.prod(shape[:-1], dtype=np.int64)) * row_bytes
    byte_shape = (*shape[:-1], row_bytes)
    writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), count, raw_dtype=GGMLQuantizationType[encoding])


def _pairs(tensor: EncodedTensor, heads: int, shape: ModelShape) -> np.ndarray:
    """Rows of q or k in the order that llama.cpp rotates: [head, half, pair] -> [head, pair, half]."""
    elements, num_bytes = BLOCK_SIZES[tensor.encoding]
    row_bytes = tensor.shape[1] // elements * num_bytes if len(tensor.shape) == 2 else num_bytes
    rows = tensor.data.reshape(heads, 2, shape.head_dim // 2, row_bytes)
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1)


def _architecture(files: ModelFiles) -> str:
    if isinstance(files, GgufFiles):
        return str(files.metadata["general.architecture"])
    return "llama" if files.shape.family in ("llama", "mistral") else files.shape.family
