"""`EncodedTensor`: a weight as it lies in its file, not yet widened.

Readers hand these out and `dseek.ops.linear` packs them; the bytes are a view of the mapped file where possible, so
nothing is copied before it is packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK_SIZES: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
"""Elements and bytes of one block of each encoding (GGUF names; layouts: ggml `ggml-common.h`)."""

CHANNEL_ENCODING = "I8_CHANNEL"
"""A row is its scale, a float32, and one int8 for each input: what `dseek.ops.linear.integers` makes."""


@dataclass(frozen=True, slots=True)
class EncodedTensor:
    """A named weight in its stored encoding.

    Args:
        name: canonical (Hugging Face) name, such as `model.layers.0.mlp.up_proj.weight`.
        shape: logical shape, output channels first.
        encoding: a key of `BLOCK_SIZES`, whose blocks run along the last axis, or `CHANNEL_ENCODING`.
        data: uint8 [num_bytes], contiguous, row after row.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    data: np.ndarray

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        count = 1
        for size in self.shape:
            count *= size
        return count
