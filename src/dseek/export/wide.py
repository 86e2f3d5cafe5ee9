"""Writes a model in floating point: a Hugging Face folder for transformers and vLLM, or a GGUF file for llama.cpp.

Whatever the source stores is widened first, so integers of a GGUF file or a `compressed-tensors` folder become the
numbers they stand for. Tensors are made one at a time. Norms of a GGUF file are float32 in any case, as llama.cpp
wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from dseek.models.files import ModelFiles
from dseek.models.folder_writer import DTYPES, wide_tensor, write_model_folder
from dseek.models.gguf_writer import write_gguf_file
from dseek.models.safetensors_writer import StreamTensor
from dseek.ops.tensor import EncodedTensor

FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}
"""llama.cpp's numbers of the file types (`llama_ftype`)."""

Progress = Callable[[int, int], None]
"""Tensors that are written, of how many."""


def write_wide_folder(files: ModelFiles, dtype: str, target: Path, progress: Progress) -> None:
    """Write a Hugging Face folder.

    Args:
        files: the opened source.
        dtype: float32, float16 or bfloat16.
        target: the folder, which exists.
        progress: told before every tensor.

    Raises:
        UnsupportedModelError: a number is too large for float16, or a GGUF source's tokenizer or rotation cannot be
            written.
        OSError: something cannot be written.
    """
    names = files.tensor_names()
    tensors = [wide_tensor(files, name, dtype) for name in names]
    told = [_telling(tensor, index, len(names), progress) for index, tensor in enumerate(tensors)]
    write_model_folder(files, told, dtype, target, {})


def write_wide_gguf(files: ModelFiles, dtype: str, target: Path, progress: Progress) -> None:
    """Write a GGUF file.

    Args:
        files: the opened source.
        dtype: float32, float16 or bfloat16, of all but norms and biases.
        target: the file, which is replaced.
        progress: told before every tensor.

    Raises:
        UnsupportedModelError: a number is too large for float16, or metadata or a tokenizer that cannot be written.
        OSError: it cannot be written.
    """
    names = files.tensor_names()
    dtypes = {name: dtype if len(files.tensor_shape(name)) == 2 else "float32" for name in names}

    def made() -> Iterator[EncodedTensor]:
        for index, name in enumerate(names):
            progress(index, len(names))
            tensor = wide_tensor(files, name, dtypes[name])
            yield EncodedTensor(name, tensor.shape, tensor.dtype, tensor.make())

    encodings = {name: DTYPES[dtypes[name]] for name in names}
    write_gguf_file(files, encodings, made(), target, file_type=FILE_TYPES[dtype])


def _telling(tensor: StreamTensor, index: int, total: int, progress: Progress) -> StreamTensor:
    make = tensor.make

    def told() -> np.ndarray:
        progress(index, total)
        return make()

    return replace(tensor, make=told)
