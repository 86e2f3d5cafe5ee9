"""A model in one GGUF file, or in the numbered parts of one.

GGUF stores the q and k rows of the `llama` architecture in the order that llama.cpp's rotary embedding wants
(neighbouring dimensions form a pair); they are put back into the Hugging Face order (first half, second half) by
moving whole encoded rows, so nothing is decoded. Other architectures are stored as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dseek.core.errors import ConfigError, FileFormatError, UnsupportedModelError
from dseek.core.shape import ModelShape
from dseek.models.config_values import shorten
from dseek.models.families import shape_from_gguf, with_frequency_divisors
from dseek.models.files import ModelFiles
from dseek.models.gguf_reader import GgufFile, StoredTensor
from dseek.models.tensor_names import GGUF_ROPE_DIVISORS, canonical_from_gguf, rotated_heads
from dseek.ops.tensor import BLOCK_SIZES, EncodedTensor

if TYPE_CHECKING:
    from dseek.models.tokenizer import Tokenizer

MAX_PARTS = 1000
"""The file naming has five digits; the largest published models have some 50 parts."""
_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_IGNORED = {GGUF_ROPE_DIVISORS, "rope_factors_long.weight", "rope_factors_short.weight"}


class GgufFiles(ModelFiles):
    """A GGUF model.

    Args:
        name: what the user called it.
        path: the file, or the first part.

    Raises:
        FileFormatError: a file is truncated or inconsistent, a part is missing.
        UnsupportedModelError: the architecture, an encoding or a tensor is not supported.
        ModelNotFoundError: the file is not there.
    """

    def __init__(self, name: str, path: Path) -> None:
        self._parts: list[GgufFile] = []
        try:
            self._open_parts(path)
            self._owners = self._collect()
            shape = self._read_shape(path)
            entries: dict[str, StoredTensor] = {}
            for canonical, (part, stored_name) in self._owners.items():
                entries[canonical] = part.tensors[stored_name]
            super().__init__(name, path, shape, entries)
        except BaseException:
            self.close()
            raise

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata of the file, or of its first part."""
        return self._parts[0].metadata

    @property
    def chat_template(self) -> str | None:
        """The template in the metadata, or None."""
        template = self.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    def tensor(self, name: str) -> EncodedTensor:
        """Return one tensor in its stored encoding (see `ModelFiles.tensor`).

        Args:
            name: canonical name.

        Returns:
            The tensor, rows in Hugging Face order.

        Raises:
            KeyError: there is none of this name.
        """
        entry = self._entries[name]
        part, stored_name = self._owners[name]
        data = part.data(stored_name)
        heads = rotated_heads(name, self.shape) if self.metadata["general.architecture"] == "llama" else None
        if heads is not None:
            block_elements, block_bytes = BLOCK_SIZES[entry.encoding]
            row_bytes = entry.shape[1] // block_elements * block_bytes if len(entry.shape) == 2 else block_bytes
            # [head, pair, half, bytes] -> [head, half, pair, bytes]
            rows = data.reshape(heads, self.shape.head_dim // 2, 2, row_bytes)
            data = np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1)
        return EncodedTensor(name=name, shape=entry.shape, encoding=entry.encoding, data=data)

    def release(self) -> None:
        """Let the system drop the weights read so far from memory."""
        for part in self._parts:
            part.release()

    def close(self) -> None:
        """Let go of the files."""
        for part in self._parts:
            part.close()

    def _load_tokenizer(self) -> Tokenizer:
        from dseek.models.gguf_tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(self.metadata, self.path, self.shape)

    def _open_parts(self, path: Path) -> None:
        """Open the file and, where it is the first of several parts, the others."""
        first = GgufFile(path)
        self._parts.append(first)
        count = first.metadata.get("split.count", 1)
        number = first.metadata.get("split.no", 0)
        if not isinstance(count, int) or not isinstance(number, int) or not 0 <= count <= MAX_PARTS:
            raise FileFormatError(
                f"{path} claims to be part {shorten(number)} of {shorten(count)}", needed=f"at most {MAX_PARTS} parts"
            )
        if count <= 1:
            return
        match = _PART_NAME.fullmatch(path.name)
        if match is None or int(match["count"]) != count:
            raise FileFormatError(
                f"{path} is one of {count} parts, but not named so",
                needed=f"names such as model-00001-of-{count:05d}.gguf, all in one folder",
            )
        if number != 0 or int(match["number"]) != 1:
            raise FileFormatError(
                f"{path} is part {number + 1} of {count}",
                remedy=f"open the first one, {match['stem']}-00001-of-{count:05d}.gguf",
            )
        for part_number in range(2, count + 1):
            part_path = path.with_name(f"{match['stem']}-{part_number:05d}-of-{count:05d}.gguf")
            if not part_path.is_file():
                raise FileFormatError(f"{part_path} is missing", needed=f"all {count} parts in one folder")
            part = GgufFile(part_path)
            self._parts.append(part)
            if part.metadata.get("split.no") != part_number - 1 or part.metadata.get("split.count") != count:
                raise FileFormatError(f"{part_path} does not say that it is part {part_number} of {count}")
        total = first.metadata.get("split.tensors.count")
        found = sum(len(part.tensors) for part in self._parts)
        if total is not None and total != found:
            raise FileFormatError(f"the {count} parts of {path} hold {found} tensors", needed=shorten(total))

    def _collect(self) -> dict[str, tuple[GgufFile, str]]:
        """Canonical name to the part that holds it and its name there."""
        owners: dict[str, tuple[GgufFile, str]] = {}
        for part in self._parts:
            for stored_name in part.tensors:
                if stored_name in _IGNORED:
                    continue
                # A strange name is kept: the check against the shape refuses it, unless the family is refused first.
                canonical = canonical_from_gguf(stored_name) or stored_name
                if canonical in owners:
                    raise FileFormatError(f"{part.path}: tensor {shorten(stored_name)} appears twice")
                owners[canonical] = (part, stored_name)
        return owners

    def _read_shape(self, path: Path) -> ModelShape:
        try:
            shape = shape_from_gguf(self.metadata, self._owners)
        except ConfigError as error:
            raise FileFormatError(f"{path}: {error.found}", needed=error.needed, remedy=error.remedy) from error
        for part in self._parts:
            for name in _IGNORED & part.tensors.keys():
                stored = part.tensors[name]
                if name != GGUF_ROPE_DIVISORS or stored.encoding != "F32":
                    raise UnsupportedModelError(
                        f"{path} has {name} as {stored.encoding}", needed=f"no more than {GGUF_ROPE_DIVISORS} as F32"
                    )
                if stored.num_bytes != 4 * (shape.head_dim // 2):
                    raise FileFormatError(
                        f"{path}: {name} has the shape {stored.shape}", needed=f"({shape.head_dim // 2},)"
                    )
                shape = with_frequency_divisors(shape, part.data(name).view("<f4").tolist())
        return shape
