"""Integers that somebody else chose: they and their scales lie in the packed weight as they were given."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dseek.models.encoding import to_float32
from dseek.ops import native
from dseek.ops.linear.dispatch import linear as native_linear
from dseek.ops.linear.integers import channel_integers, group_integers
from dseek.ops.linear.packing import pack
from dseek.ops.linear.reference import round_groups, round_rows

VARIANTS = native.module().variants() if native.module() is not None else []


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    compiled = native.require()
    before = compiled.variant()
    compiled.set_variant(request.param)
    yield request.param
    compiled.set_variant(before)


def integers(rng: np.random.Generator, size: tuple[int, int], num_bits: int) -> np.ndarray:
    """Every value there is, the least one too."""
    half = 1 << (num_bits - 1)
    values = rng.integers(-half, half, size, dtype=np.int8)
    values[0, :2] = -half, half - 1
    return values


@pytest.mark.native
@pytest.mark.parametrize(
    ("rows", "channels", "inputs", "interleaved"),
    [
        (1, 16, 64, False),
        (2, 33, 576, False),
        (5, 40, 80, False),
        (20, 17, 1, False),
        (70, 96, 192, False),
        (9, 64, 100, True),
    ],
)
def test_given_integers_are_multiplied_as_they_are(
    variant: str, rows: int, channels: int, inputs: int, interleaved: bool
) -> None:
    rng = np.random.default_rng(rows)
    values = rng.integers(-128, 128, (channels, inputs), dtype=np.int8)
    values[0, :2] = -128
    scale = rng.uniform(1e-4, 1e-2, channels).astype(np.float32)
    # A row that no rounding to nearest would give back: its largest value is far below 127.
    values[-1] = rng.integers(-3, 4, inputs, dtype=np.int8)
    packed = pack("i8p", [channel_integers("w", values, scale)], to_float32, interleaved=interleaved)
    weight = scale[:, None] * values.astype(np.float32)
    row = np.arange(channels)
    if interleaved:  # panels of sixteen, from the first half of the rows and from the second in turn
        index = row % (channels // 2)
        row = index // 16 * 32 + row // (channels // 2) * 16 + index % 16
    np.testing.assert_array_equal(native.require().unpack(packed), weight)
    # Of activations that are integers times a scale, with 127 among them, nothing is rounded: the sums are exact.
    x = rng.integers(-127, 128, (rows, inputs)).astype(np.float32)
    x[:, 0] = 127
    found = native_linear(torch.from_numpy(x * np.float32(0.125)), torch.from_numpy(packed), channels).numpy()
    sums = x.astype(np.int64) @ values.T.astype(np.int64)
    np.testing.assert_allclose(found[:, row], sums * (scale * 0.125), rtol=3e-7, atol=0)


@pytest.mark.native
def test_a_real_row_is_rounded_by_token(variant: str) -> None:
    rng = np.random.default_rng(0)
    values, scale = integers(rng, (48, 200), 8), rng.uniform(1e-3, 1e-2, 48).astype(np.float32)
    x = torch.from_numpy(rng.standard_normal((9, 200)).astype(np.float32))
    weight = torch.from_numpy(scale[:, None] * values.astype(np.float32))
    found = native_linear(
        x, torch.from_numpy(pack("i8p", [channel_integers("w", values, scale)], to_float32)), 48
    ).double()
    expected = round_rows(x).double() @ weight.double().T
    # An input on a rounding boundary may go either way: one step of it.
    step = x.abs().amax(1, keepdim=True).double() / 127 * weight.abs().max()
    assert ((found - expected).abs() <= 1.01 * step).all()
    assert (found - expected).abs().median() < 1e-5


@pytest.mark.native
@pytest.mark.parametrize(("num_bits", "zeros"), [(4, False), (4, True), (8, False)])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_given_groups_are_moved_unchanged(variant: str, num_bits: int, group: int, zeros: bool) -> None:
    rng = np.random.default_rng(group)
    values = integers(rng, (40, 256), num_bits)
    scale = rng.uniform(1e-3, 1e-2, (40, 256 // group)).astype(np.float16).astype(np.float32)
    zero = integers(rng, scale.shape, num_bits) if zeros else None
    tensor = group_integers("w", values, scale, num_bits=num_bits, zero_point=zero)
    wide = np.repeat(scale, group, 1) * (values - (0 if zero is None else np.repeat(zero.astype(np.float32), group, 1)))
    # Exact but for the minimum of a group, which is a half: at most 15 steps, rounded by 2^-11 of it.
    bound = 15 * 2.0**-11 * np.repeat(scale, group, 1) if zeros else 1e-9
    assert (np.abs(to_float32(tensor) - wide) <= bound).all()
    weight_format = "i8g" if num_bits == 8 else "i4g"
    packed = pack(weight_format, [tensor], to_float32)
    np.testing.assert_allclose(native.require().unpack(packed), to_float32(tensor), rtol=0, atol=1e-7)
    x = torch.from_numpy(rng.standard_normal((3, 256)).astype(np.float32))
    found = native_linear(x, torch.from_numpy(packed), 40)
    expected = round_groups(x).double() @ torch.from_numpy(to_float32(tensor)).double().T
    step = x.abs().max() / 127 * np.abs(wide).max()
    assert (found - expected).abs().max() <= 1.5 * step
    assert torch.nn.functional.cosine_similarity(found.flatten().double(), expected.flatten(), dim=0) > 0.9999


def test_integers_survive_widening() -> None:
    rng = np.random.default_rng(1)
    values, scale = integers(rng, (5, 7), 8), rng.uniform(1e-3, 1, 5).astype(np.float32)
    tensor = channel_integers("w", values, scale)
    np.testing.assert_array_equal(to_float32(tensor), scale[:, None] * values)


def test_what_does_not_fit_is_refused() -> None:
    values, scale = np.zeros((4, 64), np.int8), np.ones((4, 2), np.float32)
    for wrong in (np.nan, np.inf):
        with pytest.raises(ValueError, match="channel 2 is not finite"):
            channel_integers("w", values, np.array([1, 1, wrong, 1], np.float32))
    with pytest.raises(ValueError, match="needed: int8"):
        channel_integers("w", values.astype(np.int16), scale[:, 0])
    with pytest.raises(ValueError, match="multiple of 32"):
        group_integers("w", values, np.ones((4, 4), np.float32), num_bits=8)
    with pytest.raises(ValueError, match="without zero points"):
        group_integers("w", values, scale, num_bits=8, zero_point=np.zeros((4, 2), np.int8))
    with pytest.raises(ValueError, match="needed: -8 to 7"):
        group_integers("w", values + np.int8(9), scale, num_bits=4)
    with pytest.raises(ValueError, match="zero points"):
        group_integers("w", values, scale, num_bits=4, zero_point=np.full((4, 2), 8, np.int8))
    for wrong in (1e6, 1e-7, np.nan):
        with pytest.raises(ValueError, match="a half holds"):
            group_integers("w", values, np.full((4, 2), wrong, np.float32), num_bits=4)
