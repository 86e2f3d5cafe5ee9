"""A Marian model in a folder of Hugging Face layout: opened as hostile input, written whole.

`open_marian` reads config.json, the weights and the tokenizer; `save_marian` writes them so that transformers reads
them too. Pickled checkpoints are never opened.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dseek.core.errors import FileFormatError, UnsupportedModelError
from dseek.core.files import atomic_write_bytes, atomic_write_text
from dseek.models.config_values import shorten
from dseek.models.folder_files import find_shards, read_json_object
from dseek.models.marian import Marian
from dseek.models.marian_shape import MarianShape, marian_shape
from dseek.models.safetensors_reader import SafetensorsFile

if TYPE_CHECKING:
    from dseek.models.tokenizer import Tokenizer

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HEAD, _EMBEDDING = "lm_head.weight", "model.shared.weight"
_COPIES = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", _HEAD)
"""Names that older writers give the one embedding as well."""
_COMPUTED = ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")


def is_marian(folder: Path) -> bool:
    """Tell whether a folder says that it holds a model of this family.

    Args:
        folder: any folder.
    """
    config = folder / "config.json"
    return config.is_file() and read_json_object(config).get("model_type") == "marian"


def open_marian(folder: Path) -> Marian:
    """Read a model's shape and weights.

    Args:
        folder: with config.json and safetensors.

    Returns:
        The module in float32 and `eval` mode.

    Raises:
        FileFormatError: a file is missing or broken, or a tensor is missing or has another shape.
        ConfigError: config.json has a wrong value.
        UnsupportedModelError: another family or variant, or a tensor that the family has no place for.
    """
    model = Marian(open_shape(folder))
    expected = model.state_dict()
    del expected[_HEAD]
    loaded: dict[str, torch.Tensor] = {}
    for path in find_shards(folder):
        file = SafetensorsFile(path)
        try:
            for name, entry in file.tensors.items():
                if name in _COMPUTED:
                    continue
                target = _EMBEDDING if name in _COPIES else name
                if target not in expected:
                    raise UnsupportedModelError(f"{path} has a tensor {shorten(name)}", needed="those of MarianMTModel")
                if entry.shape != tuple(expected[target].shape):
                    raise FileFormatError(
                        f"{path}: {shorten(name)} is {shorten(entry.shape)}", needed=f"{tuple(expected[target].shape)}"
                    )
                data = torch.from_numpy(file.data(name).copy()).view(_DTYPES[entry.encoding])
                value = data.reshape(entry.shape).float()
                if target in loaded and not torch.equal(loaded[target], value):
                    raise UnsupportedModelError(
                        f"{path}: {shorten(name)} differs from another copy of {target}", needed="tied embeddings"
                    )
                loaded[target] = value
        finally:
            file.close()
    loaded.setdefault("final_logits_bias", torch.zeros_like(model.final_logits_bias))
    for name in expected:
        if name not in loaded:
            raise FileFormatError(f"{folder} has no tensor {name}", remedy="download or train the model again")
    loaded[_HEAD] = loaded[_EMBEDDING]
    model.load_state_dict(loaded)
    return model.eval()


def open_shape(folder: Path) -> MarianShape:
    """Read a model's shape.

    Args:
        folder: with config.json.

    Returns:
        The shape.

    Raises:
        FileFormatError: config.json is missing or broken.
        ConfigError: it has a wrong value.
        UnsupportedModelError: another family or variant.
    """
    generation = folder / "generation_config.json"
    return marian_shape(
        read_json_object(folder / "config.json"), read_json_object(generation) if generation.is_file() else None
    )


def open_tokenizer(folder: Path) -> Tokenizer:
    """Read a model's tokenizer.

    Args:
        folder: with tokenizer.json.

    Returns:
        The tokenizer.

    Raises:
        FileFormatError: tokenizer.json is missing or broken.
    """
    from dseek.models.folder_tokenizer import tokenizer_from_folder

    return tokenizer_from_folder(folder, read_json_object(folder / "config.json"))


def save_marian(model: Marian, folder: Path, files: dict[str, str], details: dict[str, Any] | None = None) -> None:
    """Write a model; the weights come last, so that a folder without them is one that was not finished.

    Args:
        model: whose weights are written, in float32.
        folder: made if need be; files of the same names are replaced.
        files: further text files by name, such as tokenizer.json.
        details: further keys of config.json, such as how the model was trained.

    Raises:
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save as to_safetensors

    atomic_write_text(folder / "config.json", _json(model.shape.config() | (details or {})))
    atomic_write_text(folder / "generation_config.json", _json(model.shape.generation_config()))
    for name, text in files.items():
        atomic_write_text(folder / name, text)
    state = {name: value.detach().float().contiguous() for name, value in model.state_dict().items() if name != _HEAD}
    atomic_write_bytes(folder / "model.safetensors", to_safetensors(state, {"format": "pt"}))


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
