"""Writes a Hugging Face folder: weights that come one at a time, config.json, the tokenizer's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dseek.core.errors import UnsupportedModelError
from dseek.core.files import atomic_write_text
from dseek.models.encoding import to_float32
from dseek.models.files import ModelFiles
from dseek.models.folder_config import config_from_shape, write_tokenizer
from dseek.models.folder_files import FolderFiles
from dseek.models.safetensors_writer import StreamTensor, write_stream

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""torch's names to those of safetensors."""

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
)
"""Files of a source folder that are copied where they are there."""


def default_dtype(files: ModelFiles) -> str:
    """Choose the dtype of what stays wide: the source's own where it is a 16-bit one, else float32.

    Args:
        files: the opened model.
    """
    encodings = files.encodings()
    for encoding, dtype in (("BF16", "bfloat16"), ("F16", "float16")):
        if encodings.get(encoding, 0) * 2 > sum(encodings.values()):
            return dtype
    return "float32"


def to_bytes(values: torch.Tensor, dtype: str) -> np.ndarray:
    """Give a tensor's bytes in a floating dtype.

    Args:
        values: any floating tensor.
        dtype: float32, float16 or bfloat16.

    Returns:
        uint8, flat.
    """
    narrow = values.detach().to(getattr(torch, dtype)).contiguous().reshape(-1)
    return narrow.view(torch.uint8).numpy()


def wide_tensor(files: ModelFiles, name: str, dtype: str) -> StreamTensor:
    """Promise a model's tensor in a floating dtype.

    Args:
        files: the opened model.
        name: canonical name.
        dtype: float32, float16 or bfloat16.

    Returns:
        A tensor whose bytes are made when they are due; making them raises `UnsupportedModelError` where a number is
        too large for the dtype.
    """

    def make() -> np.ndarray:
        values = torch.from_numpy(np.array(to_float32(files.tensor(name))))
        files.release()
        if dtype == "float16":
            _check_range(name, values)
        return to_bytes(values, dtype)

    return StreamTensor(name=name, dtype=DTYPES[dtype], shape=files.tensor_shape(name), make=make)


def _check_range(name: str, values: torch.Tensor) -> None:
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest > torch.finfo(torch.float16).max:
        raise UnsupportedModelError(
            f"{name} holds {largest:g}", needed="at most 65504 in float16", remedy="take --dtype bfloat16 or float32"
        )


def write_model_folder(
    files: ModelFiles, tensors: Sequence[StreamTensor], dtype: str, target: Path, more: Mapping[str, Any]
) -> None:
    """Write the folder.

    Args:
        files: the opened source: of a folder config.json and tokenizer are copied, of a GGUF file they are written.
        tensors: the weights, in the order of the file.
        dtype: what config.json says of the weights: float32, float16 or bfloat16.
        target: the folder, which exists.
        more: what config.json says beside that, such as `quantization_config`.

    Raises:
        UnsupportedModelError: the tokenizer or the rotation of a GGUF source cannot be written.
        OSError: something cannot be written.
    """
    write_stream(target / "model.safetensors", tensors, {"format": "pt"})
    if isinstance(files, FolderFiles):
        described = dict(files.config)
        for name in COPIED:
            if (files.path / name).is_file():
                shutil.copyfile(files.path / name, target / name)
    else:
        described = config_from_shape(files.shape)
        write_tokenizer(files.tokenizer(), files.shape, target)
    for key in ("dtype", "quantization_config"):
        described.pop(key, None)
    described |= {"torch_dtype": dtype, **more}
    atomic_write_text(target / "config.json", json.dumps(described, indent=2) + "\n")
