"""A model in a folder of Hugging Face layout: config.json, safetensors (one file or indexed shards), tokenizer files.

Weights are looked for as `model.safetensors.index.json`, else `model.safetensors`, else the only `*.safetensors` there
is. Those of the method `compressed-tensors` may hold integers (`compressed_tensors`). Pickled checkpoints (`*.bin`,
`*.pt`) are never opened: reading one can run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dseek.core.errors import FileFormatError
from dseek.models.compressed_config import read_compressed
from dseek.models.compressed_tensors import Collector, CompressedWeight
from dseek.models.config_values import ConfigValues, shorten
from dseek.models.families import shape_from_config
from dseek.models.files import ModelFiles, TensorEntry
from dseek.models.safetensors_reader import SafetensorsFile, StoredTensor
from dseek.models.tensor_names import canonical_from_safetensors
from dseek.ops.tensor import EncodedTensor

if TYPE_CHECKING:
    from dseek.models.tokenizer import Tokenizer

MAX_JSON_BYTES = 64 << 20
"""Largest JSON file read; the index of a model with 100,000 tensors has some 10 MB."""
MAX_SHARDS = 4096
"""The largest published models have under 200 shards."""
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class FolderFiles(ModelFiles):
    """A model folder.

    Args:
        name: what the user called it.
        path: the folder.

    Raises:
        FileFormatError: a file is missing, truncated or inconsistent.
        UnsupportedModelError: the family, a dtype or a tensor is not supported.
        ConfigError: config.json has a wrong value.
    """

    def __init__(self, name: str, path: Path) -> None:
        self._shards: list[SafetensorsFile] = []
        try:
            self._config = read_json_object(path / "config.json")
            shape = shape_from_config(self._config)
            self._owners: dict[str, tuple[SafetensorsFile, str]] = {}
            settings = read_compressed(ConfigValues(self._config, "config.json"))
            entries: dict[str, StoredTensor] = {}
            for shard_path in find_shards(path):
                shard = SafetensorsFile(shard_path, integers=settings is not None)
                self._shards.append(shard)
                for stored_name, tensor in shard.tensors.items():
                    canonical = canonical_from_safetensors(stored_name)
                    if canonical is None:
                        continue
                    if canonical in entries:
                        raise FileFormatError(f"{shard_path}: tensor {shorten(stored_name)} appears twice in the model")
                    entries[canonical] = tensor
                    self._owners[canonical] = (shard, stored_name)
            weights: Mapping[str, TensorEntry] = entries
            if settings is not None:
                weights = Collector(entries, self._owners, settings).collect()
            super().__init__(name, path, shape, weights)
        except BaseException:
            self.close()
            raise

    @property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""
        return self._config

    @cached_property
    def chat_template(self) -> str | None:
        """The template of chat_template.jinja or tokenizer_config.json, or None."""
        from dseek.models.folder_tokenizer import read_chat_template

        return read_chat_template(self.path)

    def tensor(self, name: str) -> EncodedTensor:
        """Return one tensor as it is stored (see `ModelFiles.tensor`).

        Args:
            name: canonical name.

        Returns:
            The tensor, a view of the mapped file, or what its integers were put together to.

        Raises:
            KeyError: there is none of this name.
            FileFormatError: a scale is not finite.
        """
        entry = self._entries[name]
        if isinstance(entry, CompressedWeight):
            return entry.read()
        shard, stored_name = self._owners[name]
        return EncodedTensor(name=name, shape=entry.shape, encoding=entry.encoding, data=shard.data(stored_name))

    def release(self) -> None:
        """Let the system drop the weights read so far from memory."""
        for shard in self._shards:
            shard.release()

    def close(self) -> None:
        """Let go of the files."""
        for shard in self._shards:
            shard.close()

    def _load_tokenizer(self) -> Tokenizer:
        from dseek.models.folder_tokenizer import tokenizer_from_folder

        return tokenizer_from_folder(self.path, self._config)


def find_shards(folder: Path) -> list[Path]:
    """Find the safetensors files of a model.

    Args:
        folder: the model's folder.

    Returns:
        The files, each once.

    Raises:
        FileFormatError: there are none, the index is broken, names a file outside the folder or one that is missing.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        return _shards_of_index(index)
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth"))
    raise FileFormatError(
        f"{folder} has " + (f"{len(found)} safetensors files and no {INDEX_NAME}" if found else "no safetensors file"),
        needed=f"{SINGLE_NAME}, or shards with {INDEX_NAME}",
        remedy="convert the pickled weights to safetensors" if pickled and not found else "download the model again",
    )


def _shards_of_index(index: Path) -> list[Path]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFormatError(f"{index} has no weight_map", needed="tensor names with the file each is in")
    names: dict[str, None] = {}
    for file_name in weight_map.values():
        if not isinstance(file_name, str) or not file_name.endswith(".safetensors") or "\0" in file_name:
            raise FileFormatError(f"{index} names the file {shorten(file_name)}", needed="*.safetensors files")
        if Path(file_name).name != file_name or "\\" in file_name:
            raise FileFormatError(
                f"{index} names the file {shorten(file_name)}, outside its folder", needed="files beside the index"
            )
        names[file_name] = None
    if len(names) > MAX_SHARDS:
        raise FileFormatError(f"{index} names {len(names)} files", needed=f"at most {MAX_SHARDS}")
    for file_name in names:
        if not (index.parent / file_name).is_file():
            raise FileFormatError(f"{index.parent / file_name} is missing", remedy="download the model again")
    return [index.parent / file_name for file_name in names]


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        FileFormatError: it is missing, too large, no JSON, or no object.
    """
    if not path.is_file():
        raise FileFormatError(f"{path} is missing", remedy="download the model again")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise FileFormatError(f"{path} has {path.stat().st_size} bytes", needed=f"at most {MAX_JSON_BYTES}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is no JSON ({error})", remedy="download the model again") from None
    if not isinstance(value, dict):
        raise FileFormatError(f"{path} holds a {type(value).__name__}", needed="a JSON object")
    return value
