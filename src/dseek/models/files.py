"""`open_model`: from a name to a model's files, opened and checked; `ModelFiles`: what every kind of file offers.

Opening reads headers only. That every tensor the shape needs is there with the right size is checked before anybody
plans or packs; weights are read when `tensor` is asked for them. No torch here, so that `dseek plan` and the native
path start quickly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Protocol

from dseek.core.errors import FileFormatError, UnsupportedModelError
from dseek.core.shape import ModelShape
from dseek.models.config_values import shorten
from dseek.models.tensor_names import expected_tensors
from dseek.ops.tensor import EncodedTensor

if TYPE_CHECKING:
    from dseek.models.tokenizer import Tokenizer


class TensorEntry(Protocol):
    """What the checks here need to know of a stored tensor, whatever its file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, output channels first."""

    @property
    def encoding(self) -> str:
        """A key of `BLOCK_SIZES`."""

    @property
    def num_bytes(self) -> int:
        """Size in the file."""


class ModelFiles(ABC):
    """A model on disk: shape, weights in their stored encoding, tokenizer.

    The object keeps its files mapped until `close`. Reading is thread-safe; closing while another thread reads is not.

    Args:
        name: what the user called it.
        path: the folder or file.
        shape: what the model is.
        entries: canonical name to stored tensor; exactly those that `shape` needs are kept.

    Raises:
        FileFormatError: a tensor that the shape needs is missing or has another shape.
        UnsupportedModelError: there is a tensor that the family has no place for.
    """

    def __init__(self, name: str, path: Path, shape: ModelShape, entries: Mapping[str, TensorEntry]) -> None:
        self.name = name
        self.path = path
        self.shape = shape
        self._entries = check_tensors(path, shape, entries)
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_lock = Lock()

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all weights as they are stored."""
        return sum(entry.num_bytes for entry in self._entries.values())

    def tensor_names(self) -> list[str]:
        """List the canonical names of all tensors, embedding first, head last."""
        return list(self._entries)

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Return the logical shape of one tensor, from the header alone.

        Args:
            name: canonical name, one of `tensor_names()`.

        Raises:
            KeyError: there is none of this name.
        """
        return self._entries[name].shape

    def tensor_encoding(self, name: str) -> str:
        """Return the encoding of one tensor, from the header alone.

        Args:
            name: canonical name, one of `tensor_names()`.

        Raises:
            KeyError: there is none of this name.
        """
        return self._entries[name].encoding

    def has(self, name: str) -> bool:
        """Tell whether there is a tensor of this canonical name."""
        return name in self._entries

    def encodings(self) -> dict[str, int]:
        """Count the elements stored in each encoding (from the headers alone)."""
        counts: dict[str, int] = {}
        for entry in self._entries.values():
            elements = 1
            for size in entry.shape:
                elements *= size
            counts[entry.encoding] = counts.get(entry.encoding, 0) + elements
        return counts

    @abstractmethod
    def tensor(self, name: str) -> EncodedTensor:
        """Return one tensor in its stored encoding.

        Args:
            name: canonical name, one of `tensor_names()`.

        Returns:
            The tensor; its data is a view of the mapped file where the rows need no reordering.

        Raises:
            KeyError: there is none of this name.
        """

    def tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer, built on the first call (any thread may make it).

        Raises:
            FileFormatError: its description is missing or broken.
            UnsupportedModelError: it is of a kind that is not known here.
        """
        with self._tokenizer_lock:
            if self._tokenizer is None:
                self._tokenizer = self._load_tokenizer()
            return self._tokenizer

    @abstractmethod
    def _load_tokenizer(self) -> Tokenizer: ...

    @property
    @abstractmethod
    def chat_template(self) -> str | None:
        """The model's chat template (Jinja), or None."""

    @abstractmethod
    def release(self) -> None:
        """Tell the system that the weights read so far are not needed in memory any more; they stay readable."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files; tensors handed out stay valid."""

    def __enter__(self) -> ModelFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_tensors(path: Path, shape: ModelShape, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Hold the tensors of a file against the shape.

    Args:
        path: the file or folder, for messages.
        shape: what the model is.
        entries: canonical name to stored tensor.

    Returns:
        The entries that the shape needs, in its order.

    Raises:
        FileFormatError: one is missing or has another shape.
        UnsupportedModelError: there is one that the family has no place for.
    """
    if shape.num_layers > len(entries):  # before a hostile layer count makes a long list of names
        raise FileFormatError(
            f"{path} holds {len(entries)} tensors", needed=f"the tensors of {shape.num_layers} layers", remedy=_REMEDY
        )
    expected = expected_tensors(shape)
    for name, sizes in expected.items():
        if name not in entries:
            raise FileFormatError(f"{path} has no tensor {name}", needed=f"one of shape {sizes}", remedy=_REMEDY)
        if entries[name].shape != sizes:
            raise FileFormatError(
                f"{path}: tensor {name} has the shape {entries[name].shape}", needed=str(sizes), remedy=_REMEDY
            )
    for name in entries:
        # A tied head may be stored beside the embedding; it is the same matrix.
        if name not in expected and name != "lm_head.weight":
            raise UnsupportedModelError(
                f"{path} has a tensor {shorten(name)}, which a {shape.family} model of this shape has no place for",
                needed="only the tensors of a " + shape.family + " decoder",
                remedy="use a checkpoint of the plain model (no adapter, no mixture of experts, no other modality)",
            )
    return {name: entries[name] for name in expected}


_REMEDY = "download or convert the model again"


def open_model(name: str) -> ModelFiles:
    """Open a model.

    Args:
        name: a folder in Hugging Face layout, a `.gguf` file, an alias such as `smollm2`, or a hub id `org/name`.
            An alias or hub id that is not in the local cache is downloaded.

    Returns:
        Its files, open and checked.

    Raises:
        ModelNotFoundError: the name stands for nothing that can be found or reached.
        FileFormatError: a file is truncated or inconsistent.
        UnsupportedModelError: the family or an encoding is not supported.
        ConfigError: config.json has a wrong value.
    """
    from dseek.models.locate import locate

    path = locate(name)
    if path.is_dir():
        from dseek.models.folder_files import FolderFiles

        return FolderFiles(name, path)
    from dseek.models.gguf_files import GgufFiles

    return GgufFiles(name, path)
