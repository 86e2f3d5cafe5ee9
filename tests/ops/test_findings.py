"""Packing names what a format cannot hold: NaN, infinity, overflow, clipping and groups that vanish."""

from __future__ import annotations

import logging

import gguf
import numpy as np
import pytest

from dseek.core.errors import ConfigError, FileFormatError
from dseek.ops import native
from dseek.ops.linear.packing import check_finite, pack
from dseek.ops.tensor import EncodedTensor

pytestmark = pytest.mark.native

FORMATS = ("f32", "f16", "bf16", "i8c", "i8p", "i8g", "i4g")


def tensor(values: np.ndarray, name: str = "w", encoding: str = "F32") -> EncodedTensor:
    kinds = {"F32": "<f4", "F16": "<f2", "Q8_0": None, "Q4_0": None, "Q4_1": None}
    kind = kinds[encoding]
    if kind is None:
        data = gguf.quants.quantize(values.astype(np.float32), gguf.GGMLQuantizationType[encoding])
    else:
        data = values.astype(kind)
    return EncodedTensor(name, values.shape, encoding, np.ascontiguousarray(data).view(np.uint8).reshape(-1).copy())


def weights(rows: int = 40, columns: int = 96) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32) * 0.1


def packed(weight_format: str, *tensors: EncodedTensor, interleaved: bool = False) -> np.ndarray:
    return pack(weight_format, tensors, lambda tensor: np.empty(0), interleaved=interleaved)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_what_is_not_finite_is_named(weight_format: str, value: float) -> None:
    first, second = weights(), weights()
    second[17, 95], second[17, 3], second[30, 0] = value, value, value
    with pytest.raises(FileFormatError, match=r"tensor up holds -?(nan|inf) at \[17, 3\], the first of 3 such values"):
        packed(weight_format, tensor(first, "gate"), tensor(second, "up"), interleaved=True)
    first[39, 90] = value
    with pytest.raises(FileFormatError, match=r"tensor down holds -?(nan|inf) at \[39, 90\]; needed"):
        packed(weight_format, tensor(first, "down", "F16"))


@pytest.mark.parametrize(("encoding", "offsets"), [("Q8_0", (0,)), ("Q4_0", (0,)), ("Q4_1", (0, 2))])
@pytest.mark.parametrize("bits", [0x7E00, 0x7C00, 0xFC00])
def test_scales_of_blocks_that_are_not_finite_are_named(encoding: str, offsets: tuple[int, ...], bits: int) -> None:
    block_bytes = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[encoding]
    for weight_format in ("i8g", "i4g", "bf16", "i8c"):  # moved unchanged, and decoded
        for offset in offsets:
            broken = tensor(weights(), encoding=encoding)
            at = (21 * 3 + 1) * block_bytes + offset
            broken.data[at : at + 2] = np.array([bits], dtype="<u2").view(np.uint8)
            with pytest.raises(FileFormatError, match=r"at \[21, \d+\]") as caught:
                packed(weight_format, broken)
            assert 32 <= int(str(caught.value).split("[21, ")[1].split("]")[0]) < 64


@pytest.mark.parametrize(
    ("weight_format", "value"),
    [("f16", 65520.0), ("bf16", 3.3962e38), ("i8c", 1.33e36), ("i8g", 8.32105e6), ("i4g", -65520.0)],
)
def test_what_would_become_infinite_is_refused(weight_format: str, value: float) -> None:
    big = weights()
    big[5, 7] = value
    with pytest.raises(ConfigError, match=rf"tensor w holds .* at \[5, 7\], which {weight_format} cannot hold"):
        packed(weight_format, tensor(big))
    big[5, 7] = value * 0.999
    blob = packed(weight_format, tensor(big))
    assert np.isfinite(native.require().unpack(blob)).all()
    packed("f32", tensor(big))


def test_a_range_beyond_the_scale_is_refused() -> None:
    wide = weights()
    wide[3, 33], wide[3, 34] = 65000, -65000
    packed("i4g", tensor(wide))
    blocks = tensor(np.full((16, 32), 0.1, dtype=np.float32), encoding="Q4_0")
    blocks.data[:2] = np.array([20000.0], dtype="<f2").view(np.uint8)  # its minimum would be -160,000
    with pytest.raises(ConfigError, match="i4g cannot hold"):
        packed("i4g", blocks)


def test_clipping_and_vanishing_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("dseek").propagate = True
    small = weights()
    with caplog.at_level(logging.WARNING, logger="dseek"):
        for weight_format in FORMATS:
            packed(weight_format, tensor(small))
        assert not caplog.records
        # The scale is 13.4 of a half's smallest steps; rounded to 13, the largest value is 131 scales.
        small[2, 32:64] = 0
        small[2, 40] = 127 * 13.4 * 2.0**-24
        packed("i8g", tensor(small, "down"))
        small[2, 40] = 1e-6
        packed("i8g", tensor(small, "head"))
        shifted = weights() * 1e-4 + 1000  # steps far below the rounding of the minimum
        packed("i4g", tensor(shifted, "odd"))
    told = [record.getMessage() for record in caplog.records]
    assert any("1 values are clipped in i8g" in text and "(2, 40) in down" in text for text in told)
    assert any("1 groups of 32 are too small for a scale in i8g" in text and "in head" in text for text in told)
    assert any("in i4g" in text and "in odd" in text for text in told)


def test_vectors_are_checked() -> None:
    values = np.zeros((3, 4), dtype=np.float32)
    assert check_finite("norm", values) is values
    values[1, 2] = np.inf
    with pytest.raises(FileFormatError, match=r"tensor norm holds inf at \[1, 2\]; needed"):
        check_finite("norm", values)


def test_any_number_of_threads_names_the_same_place() -> None:
    broken = weights(400, 64)
    broken[10:300:7, 5] = np.nan
    compiled = native.require()
    before = compiled.num_threads()
    try:
        for threads in (1, 2, 3):
            compiled.set_num_threads(threads)
            with pytest.raises(FileFormatError, match=r"at \[10, 5\], the first of 42 such values"):
                packed("i8c", tensor(broken))
    finally:
        compiled.set_num_threads(before)
