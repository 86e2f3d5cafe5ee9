"""Widening against the `gguf` package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from dseek.core.errors import UnsupportedModelError
from dseek.models.encoding import to_float32
from dseek.ops.tensor import BLOCK_SIZES, EncodedTensor


@pytest.mark.parametrize("encoding", BLOCK_SIZES)
def test_equals_the_gguf_package_on_any_bytes(encoding: str) -> None:
    rows, columns = 5, 768
    elements, num_bytes = BLOCK_SIZES[encoding]
    generator = np.random.default_rng(3)
    data = generator.integers(0, 256, (rows, columns // elements * num_bytes), dtype=np.uint8)
    if encoding == "F32":
        data = generator.standard_normal((rows, columns)).astype(np.float32).view(np.uint8)
    with np.errstate(all="ignore"):  # random bytes hold infinite scales too
        theirs = dequantize(data, gguf.GGMLQuantizationType[encoding])
        ours = to_float32(EncodedTensor("x", (rows, columns), encoding, data.reshape(-1)))
    assert ours.dtype == np.float32 and ours.shape == (rows, columns)
    np.testing.assert_array_equal(ours, theirs)


def test_result_is_a_copy() -> None:
    data = np.zeros(16, dtype=np.uint8)
    values = to_float32(EncodedTensor("x", (4,), "F32", data))
    values += 1
    assert not data.any()


def test_unknown_encoding_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="IQ2_XS"):
        to_float32(EncodedTensor("x", (4,), "IQ2_XS", np.zeros(16, dtype=np.uint8)))
