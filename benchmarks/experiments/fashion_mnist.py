"""Fashion-MNIST from the four files that hold it, read as hostile input."""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dseek.core.errors import ConfigError

MEAN, DEVIATION = 0.2860, 0.3530
"""Of the training images' pixels, 0 to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Images [N, 1, 28, 28], normalised, and labels [N]."""

    images: torch.Tensor
    """float32."""
    labels: torch.Tensor
    """int64."""


def read_idx(path: Path, shape: Sequence[int]) -> np.ndarray:
    """Read a gzipped IDX file of bytes.

    Args:
        path: the file.
        shape: its dimensions but the first.

    Returns:
        uint8 [N, *shape].

    Raises:
        ConfigError: it is not there, or no such file.
    """
    if not path.is_file():
        raise ConfigError(f"there is no {path}", needed="the folder of Debian's dataset-fashion-mnist")
    with gzip.open(path) as file:
        content = file.read(1 << 27)
    head = 4 * (len(shape) + 2)
    numbers = struct.unpack_from(f">{len(shape) + 2}I", content) if len(content) >= head else ()
    expected = (0x800 + len(shape) + 1, *numbers[1:2], *shape)
    if numbers != expected or len(content) - head != math.prod(numbers[1:]):
        raise ConfigError(f"{path} is no IDX file of bytes of the shape {tuple(shape)}")
    return np.frombuffer(content, dtype=np.uint8, offset=head).reshape(numbers[1:])


def read_data(folder: Path, part: str, most: int | None = None) -> Data:
    """Read training or test images.

    Args:
        folder: of the four files.
        part: train or t10k.
        most: images, the first ones; None is all.
    """
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", (28, 28))[:most]
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", ())[:most]
    wide = (torch.from_numpy(images.copy()).float()[:, None] / 255 - MEAN) / DEVIATION
    return Data(images=wide, labels=torch.from_numpy(labels.astype(np.int64)))
