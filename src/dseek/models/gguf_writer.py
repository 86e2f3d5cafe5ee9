"""Writes a GGUF file whose tensors come one at a time, as llama.cpp reads it.

A GGUF source keeps its metadata and tokenizer; of a Hugging Face folder they are written anew (`gguf_metadata`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dseek.core.shape import ModelShape
from dseek.models.files import ModelFiles
from dseek.models.gguf_files import GgufFiles
from dseek.models.gguf_metadata import add_metadata, copy_metadata, extra_tensors
from dseek.models.tensor_names import gguf_name, rotated_heads
from dseek.ops.tensor import BLOCK_SIZES, EncodedTensor


def write_gguf_file(
    files: ModelFiles,
    encodings: Mapping[str, str],
    tensors: Iterable[EncodedTensor],
    target: Path,
    *,
    file_type: int,
) -> None:
    """Write the file.

    Args:
        files: the opened source.
        encodings: canonical name of every tensor to its encoding, in the order of the file.
        tensors: the same tensors, so encoded, in the same order.
        target: the file, which is replaced.
        file_type: llama.cpp's number of what most of it is (`llama_ftype`).

    Raises:
        UnsupportedModelError: metadata or a tokenizer that cannot be written.
        OSError: it cannot be written.
    """
    from gguf import GGUFWriter

    architecture = _architecture(files)
    writer = GGUFWriter(str(target), architecture)
    if isinstance(files, GgufFiles):
        copy_metadata(writer, files.path)
    else:
        add_metadata(writer, files)
    extra = extra_tensors(files.shape)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    # The header names every tensor before the first byte of one: sizes come from the shapes alone.
    for name, encoding in encodings.items():
        _announce(writer, gguf_name(name), files.tensor_shape(name), encoding)
    for name, values in extra:
        _announce(writer, name, values.shape, "F32")
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in zip(encodings, tensors, strict=True):
            assert tensor.name == name and tensor.encoding == encodings[name], name
            heads = rotated_heads(name, files.shape) if architecture == "llama" else None
            writer.write_tensor_data(_pairs(tensor, heads, files.shape) if heads is not None else tensor.data)
        for _, values in extra:
            writer.write_tensor_data(values.view(np.uint8))
    finally:
        writer.close()


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
