"""Convolution of integers, every native variant against the reference: odd sizes, groups, steps, poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from dseek.ops import native
from dseek.ops.conv.dispatch import integer_conv as native_conv
from dseek.ops.conv.packing import pack_conv
from dseek.ops.conv.reference import dynamic_steps, integer_conv, round_inputs

pytestmark = pytest.mark.native

VARIANTS = native.module().variants() if native.module() is not None else []

# Samples, channels, height, width; output channels, kernel; the rest.
CASES: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((1, 3, 9, 7), (5, 3, 3), {"padding": (1, 1, 1, 1)}),
    ((3, 16, 8, 8), (33, 1, 1), {}),
    ((2, 17, 11, 5), (40, 3, 2), {"stride": (2, 1), "padding": (0, 1, 2, 0)}),
    ((2, 8, 13, 13), (12, 3, 3), {"dilation": (2, 3), "padding": (2, 2, 3, 3)}),
    ((2, 12, 6, 6), (18, 3, 3), {"groups": 3, "padding": (1, 1, 1, 1)}),
    ((1, 6, 5, 5), (12, 2, 2), {"groups": 6}),
    ((1, 70, 1, 40), (20, 1, 5), {"padding": (0, 0, 2, 2)}),
    ((9, 65, 1, 1), (19, 1, 1), {}),
    ((2, 19, 9, 7), (19, 3, 3), {"groups": 19, "padding": (1, 1, 1, 1)}),
    ((1, 32, 12, 10), (32, 5, 5), {"groups": 32, "stride": (2, 2), "padding": (2, 2, 1, 2)}),
    ((2, 33, 8, 9), (33, 3, 3), {"groups": 33, "dilation": (2, 2)}),
]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    compiled = native.require()
    before = compiled.variant()
    compiled.set_variant(request.param)
    yield request.param
    compiled.set_variant(before)


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def poison() -> None:
    """Leave NaN in memory that the allocator is about to hand out again."""
    for num_bytes in (1 << 10, 1 << 14, 1 << 18):
        np.full(num_bytes // 4, np.nan, dtype=np.float32)


def weight(outputs: int, channels: int, kernel: tuple[int, ...], groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(outputs)
    values = torch.randint(-128, 128, (outputs, channels // groups, *kernel), generator=generator, dtype=torch.int8)
    return values, torch.rand(outputs, generator=generator) * 0.01 + 1e-4


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[:2]))
@pytest.mark.parametrize("inputs", ["dynamic", "static", "unsigned", "two bits"])
def test_integer_conv(variant: str, case: tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]], inputs: str) -> None:
    size, (outputs, *kernel), options = case
    groups = options.get("groups", 1)
    places = {name: value for name, value in options.items() if name != "groups"}
    x = draw(*size)
    x[0, 0] *= 9
    integers, steps = (-127, 127), None
    if inputs != "dynamic":
        steps = torch.tensor([0.02])
    if inputs == "unsigned":
        x, integers = x.relu(), (0, 254)
    if inputs == "two bits":
        integers, steps = (-2, 1), torch.tensor([0.7])
    values, scale = weight(outputs, size[1], tuple(kernel), groups)
    bias = draw(outputs, seed=3) if outputs % 2 else None
    packed = pack_conv(values, scale, groups)
    wanted_steps = steps if steps is None else steps.expand(size[0])
    expected = integer_conv(x, values, scale, bias, wanted_steps, integers=integers, groups=groups, **places)
    poison()
    found = native_conv(x, packed, bias, steps, integers=integers, **places)
    assert found.shape == expected.shape
    # The integers are the same, so that only the last roundings differ: of scales, and of what a shift by 127 took.
    assert (found - expected).abs().max() <= 4e-6 * _magnitude(expected, values, scale, integers, steps, x)
    again = native_conv(
        x.contiguous(memory_format=torch.channels_last), packed, bias, steps, integers=integers, **places
    )
    assert torch.equal(again, found)
    strided = torch.stack([x, x.neg()], -1)[..., 0]
    assert torch.equal(native_conv(strided, packed, bias, steps, integers=integers, **places), found)


def _magnitude(
    expected: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    integers: tuple[int, int],
    steps: torch.Tensor | None,
    x: torch.Tensor,
) -> float:
    """Largest number that stands in a sum: the result, or what taking 127 from unsigned inputs adds and removes."""
    taken = 0.0
    if integers[1] > 127:
        assert steps is not None
        taken = float((values.flatten(1).float().sum(1).abs() * scale).max() * 127 * steps[0])
    return float(expected.abs().max()) + taken


def test_rounding_is_that_of_pytorch(variant: str) -> None:
    """Halves go to even and quotients are not products with an inverse: an identity kernel shows the integers."""
    x = (torch.arange(-4000, 4001).float() / 64 * 0.03).reshape(1, 1, 1, -1)
    packed = pack_conv(torch.ones(1, 1, 1, 1, dtype=torch.int8), torch.ones(1), 1)
    for step in (0.03, 0.0299, 1.0 / 3):
        found = native_conv(x, packed, None, torch.tensor([step]))
        expected = round_inputs(x, torch.tensor([step]), -127, 127) * torch.tensor(step)
        assert torch.equal(found, expected)


def test_dynamic_steps_are_of_each_sample(variant: str) -> None:
    x = draw(5, 8, 6, 6) * torch.tensor([1.0, 1e-3, 0.0, 1e4, 7.0]).view(-1, 1, 1, 1)
    values, scale = weight(16, 8, (3, 3), 1)
    packed = pack_conv(values, scale, 1)
    together = native_conv(x, packed, None, None)
    for index in range(5):
        assert torch.equal(native_conv(x[index : index + 1], packed, None, None)[0], together[index])
    assert torch.equal(together, native_conv(x, packed, None, dynamic_steps(x, 127)))
    assert not together[2].any()


def test_the_operator_can_be_traced() -> None:
    values, scale = weight(6, 4, (3, 3), 1)
    packed = pack_conv(values, scale, 1)
    x = draw(2, 4, 7, 9)

    def run(images: torch.Tensor) -> torch.Tensor:
        return native_conv(images, packed, None, None, stride=(2, 1), padding=(1, 1, 0, 0)).relu()

    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(x), run(x), rtol=0, atol=0)
    name = torch.ops.dseek.integer_conv.default
    arguments = (x, packed.data, None, None, None, [6, 4, 3, 3], [2, 1, 1, 1, 1, 1, 0, 0], 1, -127, 127)
    torch.library.opcheck(name, arguments, test_utils=("test_schema", "test_faketensor"))
    assert native_conv(x[:0], packed, None, None).shape == (0, 6, 5, 7)


def test_what_does_not_fit_is_refused() -> None:
    values, scale = weight(6, 4, (3, 3), 1)
    packed = pack_conv(values, scale, 1)
    x = draw(2, 4, 7, 9)
    for images in (x[:, :3], x[:, :, :2]):
        with pytest.raises(ValueError):
            native_conv(images, packed, None, None)
    for options in ({"integers": (-128, 127)}, {"integers": (0, 255)}, {"stride": (0, 1)}, {"padding": (-1, 0, 0, 0)}):
        with pytest.raises((ValueError, RuntimeError)):
            native_conv(x, packed, None, None, **options)
    with pytest.raises(ValueError):
        native_conv(x, packed, torch.zeros(5), None)
    with pytest.raises(ValueError):
        native_conv(x, packed, None, torch.ones(3))
    with pytest.raises(ValueError, match="groups"):
        pack_conv(values, scale, 4)
    with pytest.raises(ValueError, match="int8"):
        pack_conv(values.float(), scale, 1)
