"""Writes a safetensors file tensor by tensor, so that a model need not be in memory to be written.

Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "I32": 4, "I64": 8}
_HEADER_STEP = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamTensor:
    """A tensor that will be written."""

    name: str
    """Name in the file."""
    dtype: str
    """As the format spells it: F32, F16, BF16, I8, U8, I32, I64."""
    shape: tuple[int, ...]
    """Its shape."""
    make: Callable[[], np.ndarray]
    """Gives its bytes, uint8, when their turn comes."""

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def write_stream(path: Path, tensors: Sequence[StreamTensor], metadata: Mapping[str, str]) -> None:
    """Write a file.

    Args:
        path: where to; an existing file is replaced.
        tensors: in the order of the file.
        metadata: free text.

    Raises:
        OSError: it cannot be written.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for tensor in tensors:
        end = position + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_STEP)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            data = tensor.make()
            assert data.nbytes == tensor.num_bytes, tensor.name
            file.write(data.data)
        file.flush()
        os.fsync(file.fileno())
