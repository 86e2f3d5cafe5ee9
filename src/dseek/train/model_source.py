"""`ModelSource`: where a training's weights come from, one tensor at a time, and what is written beside its result.

Weights are asked for by name, so that a rank that keeps a part of each never holds the whole model. New weights are
drawn for each tensor from a seed of its own: any number of ranks draws the same.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch

from dseek.core.config import to_plain
from dseek.core.errors import ConfigError
from dseek.core.files import atomic_write_text
from dseek.core.shape import ModelShape
from dseek.models.families import shape_from_config
from dseek.models.files import ModelFiles, open_model
from dseek.models.folder_config import config_from_shape, write_tokenizer
from dseek.models.folder_files import FolderFiles, read_json_object
from dseek.models.folder_tokenizer import tokenizer_from_folder
from dseek.models.folder_writer import COPIED
from dseek.models.tokenizer import Tokenizer
from dseek.train.config import ShapeOptions, TrainConfig
from dseek.train.lora import initial_adapter, is_adapter

INITIAL_STD = 0.02
"""Standard deviation of new matrices; see `Decoder.reset_parameters`."""


class ModelSource:
    """A model to begin with.

    Args:
        config: names the model, or says that new weights are drawn.

    Raises:
        DseekError: the model cannot be opened, or its tokenizer cannot be written again.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._files: ModelFiles | None = None
        self._folder: Path | None = None
        described = Path(config.model).expanduser()
        if config.from_scratch and (described / "config.json").is_file() and not any(described.glob("*.safetensors")):
            self._folder = described
            self._described: dict[str, Any] = read_json_object(described / "config.json")
            self.shape = shape_from_config(self._described)
            self.tokenizer: Tokenizer = tokenizer_from_folder(described, self._described)
        else:
            self._files = open_model(config.model)
            self.shape, self.tokenizer = self._files.shape, self._files.tokenizer()
            if isinstance(self._files, FolderFiles):
                self._folder, self._described = self._files.path, dict(self._files.config)
            else:
                self._described = config_from_shape(self.shape)
                self.tokenizer.to_json()  # what cannot be written is refused now, not after the training
        if config.from_scratch:
            if config.shape is not None:
                self.shape = _changed(self.shape, config.shape)
            self._described = config_from_shape(self.shape)

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Give one tensor to begin with, float32, whole.

        Args:
            name: of the decoder's parameter.
            shape: its shape.

        Raises:
            FileFormatError: a weight is not a finite number.
        """
        if is_adapter(name):
            return initial_adapter(name, shape, self._generator(name))
        if not self._config.from_scratch:
            from dseek.models.weight_checks import checked_tensor

            assert self._files is not None, "the source was closed"
            tensor = checked_tensor(self._files.tensor(name), torch.float32, "cpu")
            self._files.release()
            return tensor
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
        std = INITIAL_STD
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= (2 * self.shape.num_layers) ** 0.5
        return torch.empty(shape).normal_(std=std, generator=self._generator(name))

    def describe(self, folder: Path) -> None:
        """Write config.json and the tokenizer's files.

        Args:
            folder: where to; exists.
        """
        if self._folder is not None:
            for name in COPIED:
                if (self._folder / name).is_file():
                    shutil.copyfile(self._folder / name, folder / name)
        else:
            write_tokenizer(self.tokenizer, self.shape, folder)
        described = {
            key: value for key, value in self._described.items() if key not in ("dtype", "quantization_config")
        }
        described["torch_dtype"] = "float32"
        atomic_write_text(folder / "config.json", json.dumps(described, indent=2) + "\n")

    def close(self) -> None:
        """Let go of the files; the description can still be written."""
        if self._files is not None:
            self._files.close()
            self._files = None

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(self._config.seed * 1_000_003 + zlib.crc32(name.encode()))


def _changed(shape: ModelShape, options: ShapeOptions) -> ModelShape:
    """A shape with other sizes; the head's width follows from them where it was not given."""
    given = {key: value for key, value in to_plain(options).items() if value is not None}
    described = config_from_shape(shape) | given
    if "head_dim" not in given and given.keys() & {"hidden_size", "num_attention_heads"}:
        width, rest = divmod(described["hidden_size"], max(1, described["num_attention_heads"]))
        if rest:
            raise ConfigError(
                f"shape: a width of {described['hidden_size']} over {described['num_attention_heads']} heads",
                remedy="set shape.head_dim",
            )
        described["head_dim"] = width
    return shape_from_config(described)
