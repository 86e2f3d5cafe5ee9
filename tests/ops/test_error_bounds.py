"""Every kernel variant stays within derived error bounds, which are near what is measured and catch wrong kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from dseek.ops import native
from dseek.ops.block.dispatch import decoder_block
from dseek.ops.linear.packing import pack
from dseek.ops.tensor import EncodedTensor
from tests.ops.error_bounds import UB16, attention_bound, g, linear_bound, rotated

pytestmark = pytest.mark.native

FORMATS = ("f32", "f16", "bf16", "i8c", "i8p", "i8g", "i4g")
SIZES = [(1, 33, 576), (3, 64, 80), (8, 17, 100), (9, 40, 96), (40, 50, 577), (5, 16, 31), (1, 18, 1), (33, 96, 1552)]
VARIANTS = native.module().variants() if native.module() is not None else []
VACUOUS = 50
"""A bound this many times above the largest share of it that is ever measured says nothing."""

Data = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def normal(random: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """As weights and most activations are."""
    return random.standard_normal(size)


def heavy(random: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Heavy tails, six orders of magnitude."""
    return random.standard_normal(size) * 10.0 ** random.uniform(-4, 2, size)


def positive(random: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Nothing cancels, so that errors of sums are as large as they get."""
    return random.uniform(0.5, 1, size)


def single(random: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """One input a row: what comes out is one stored weight."""
    rows = np.zeros(size)
    rows[np.arange(size[0]), random.integers(0, size[1], size[0])] = random.standard_normal(size[0])
    return rows


DATA: tuple[tuple[Data, Data], ...] = (
    (normal, normal),
    (heavy, normal),
    (normal, heavy),
    (positive, positive),
    (single, normal),
)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    compiled = native.require()
    before = compiled.variant()
    compiled.set_variant(request.param)
    yield request.param
    compiled.set_variant(before)


def encoded(weight: np.ndarray) -> EncodedTensor:
    return EncodedTensor("weight", weight.shape, "F32", np.ascontiguousarray(weight).view(np.uint8).reshape(-1))


def blob(weight: np.ndarray, weight_format: str, *, interleaved: bool = False) -> np.ndarray:
    return pack(weight_format, [encoded(weight)], lambda tensor: np.empty(0), interleaved=interleaved)


def run(x: np.ndarray, weight: np.ndarray, weight_format: str) -> np.ndarray:
    found: np.ndarray = native.require().linear(x, blob(weight, weight_format))
    return found.astype(np.float64)


def draw(data: tuple[Data, Data], size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(sum(size))
    rows, channels, inputs = size
    return data[0](random, (rows, inputs)).astype(np.float32), data[1](random, (channels, inputs)).astype(np.float32)


def share(error: np.ndarray, bound: np.ndarray) -> float:
    """The largest share of the bound that an error takes."""
    return float((error / np.maximum(bound, 1e-300)).max())


@pytest.mark.parametrize("weight_format", FORMATS)
def test_products_are_within_the_bound_and_near_it(variant: str, weight_format: str) -> None:
    largest, by_rows = 0.0, {True: 0.0, False: 0.0}
    for size in SIZES:
        for data in DATA:
            x, weight = draw(data, size)
            few_rows = size[0] <= 8
            exact, bound = linear_bound(x, weight, weight_format, few_rows=few_rows)
            error = np.abs(run(x, weight, weight_format) - exact)
            found = share(error, bound)
            assert found <= 1, f"{size}, {data[0].__name__} x {data[1].__name__}: {found:.3f} of the bound"
            by_rows[few_rows] = max(by_rows[few_rows], found)
            largest = max(largest, found)
    print(f"{variant} {weight_format}: at most {largest:.3f} of the bound; few and many rows {by_rows}")
    assert min(by_rows.values()) > 1 / VACUOUS


@pytest.mark.parametrize("weight_format", FORMATS)
def test_on_normal_data_of_model_size_the_bound_is_not_vacuous(weight_format: str) -> None:
    for rows in (2, 16):
        x, weight = draw((normal, normal), (rows, 192, 576))
        exact, bound = linear_bound(x, weight, weight_format, few_rows=rows <= 8)
        found = share(np.abs(run(x, weight, weight_format) - exact), bound)
        # A plain sum of 576 products in fp32 rounds 576 times; worst cases of that many are far from random data.
        assert 1 / (VACUOUS if weight_format != "f32" else 20 * VACUOUS) < found <= 1
        print(f"{weight_format}, {rows} rows: {found:.4f} of the bound")


def within(found: np.ndarray, x: np.ndarray, weight: np.ndarray, weight_format: str, *, few_rows: bool) -> bool:
    exact, bound = linear_bound(x, weight, weight_format, few_rows=few_rows)
    return bool((np.abs(found - exact) <= bound).all())


@pytest.mark.parametrize("few_rows", [True, False])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_wrong_weights_are_caught(weight_format: str, few_rows: bool) -> None:
    rows = 4 if few_rows else 12
    x, weight = draw((single, normal), (rows, 32, 96))
    x[0], x[1], x[2] = 0, 0, 0
    x[0, 95], x[1, 40], x[2, 31] = 1, 1, 1
    assert within(run(x, weight, weight_format), x, weight, weight_format, few_rows=few_rows)
    last_left_out = weight.copy()
    last_left_out[:, 95] = 0
    group_shifted = np.roll(weight, 1, axis=1)
    scale_off = weight * np.float32(1.25 if weight_format in ("i8c", "i4g") else 1 + 2.0**-5)
    for wrong in (last_left_out, group_shifted, scale_off):
        assert not within(run(x, wrong, weight_format), x, weight, weight_format, few_rows=few_rows)


def test_wrong_roundings_are_caught() -> None:
    # Just below a bf16 tie: cutting bits off instead of rounding loses almost a whole place of each factor.
    almost = np.float32(1 + 2.0**-7 * 0.98)
    x, weight = np.full((3, 64), almost), np.full((16, 64), almost)
    assert within(run(x, weight, "bf16"), x, weight, "bf16", few_rows=True)
    assert not within(np.full((3, 16), 64.0), x, weight, "bf16", few_rows=True)
    # The same for int8: eight inputs of 0.98 steps that become 0.
    x = np.zeros((1, 64), dtype=np.float32)
    x[0, :9] = [1.0] + [0.98 / 127] * 8
    weight = np.ones((16, 64), dtype=np.float32)
    weight[:, 0] = 0
    assert within(run(x, weight, "i8p"), x, weight, "i8p", few_rows=True)
    assert not within(np.zeros((1, 16)), x, weight, "i8p", few_rows=True)
    # Sums kept in bf16.
    x, weight = draw((positive, positive), (2, 16, 96))
    total = torch.zeros(2, 16, dtype=torch.bfloat16)
    for i in range(96):
        total += torch.outer(torch.from_numpy(x[:, i]), torch.from_numpy(weight[:, i])).bfloat16()
    assert within(run(x, weight, "f32"), x, weight, "f32", few_rows=True)
    for weight_format in ("f32", "f16", "bf16"):
        assert not within(total.double().numpy(), x, weight, weight_format, few_rows=True)


def test_the_bounds_own_rotation_is_orthogonal() -> None:
    for inputs in (16, 80, 576, 1552):
        x, weight = (part.astype(np.float64) for part in draw((normal, normal), (3, 5, inputs)))
        np.testing.assert_allclose(rotated(x)[0] @ rotated(weight)[0].T, x @ weight.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cache_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("tokens", [1, 5, 64, 130])
@pytest.mark.parametrize("head_dim", [16, 48])
def test_attention_over_a_cache_is_within_the_bound(variant: str, cache_dtype: str, tokens: int, head_dim: int) -> None:
    # A block without rotation, whose output projection is the identity and whose MLP gives nothing: x + attention.
    heads, kv_heads = 2, 1
    width = heads * head_dim
    random = np.random.default_rng(tokens + head_dim)
    x = random.standard_normal((tokens, width)).astype(np.float32)
    qkv = (random.standard_normal(((heads + 2 * kv_heads) * head_dim, width)) / np.sqrt(width)).astype(np.float32)
    found = decoder_block(
        torch.from_numpy(x),
        torch.from_numpy(blob(qkv, "f32")),
        torch.from_numpy(blob(np.eye(width, dtype=np.float32), "f32")),
        torch.from_numpy(blob(np.zeros((32, width), dtype=np.float32), "f32", interleaved=True)),
        torch.from_numpy(blob(np.zeros((width, 16), dtype=np.float32), "f32")),
        torch.ones(width),
        torch.ones(width),
        torch.ones(tokens, head_dim // 2),
        torch.zeros(tokens, head_dim // 2),
        heads,
        kv_heads,
        16,
        1e-5,
        cache_dtype,
    ).numpy()
    wide = x.astype(np.float64)
    normed = wide / np.sqrt((wide**2).mean(1, keepdims=True) + np.float64(np.float32(1e-5)))
    parts = np.split(normed @ qkv.T.astype(np.float64), heads + 2 * kv_heads, axis=1)
    # Of the norm, a sum of squares, a root and two products; of the projection, a sum.
    products = g(2 * width + 10) * (np.abs(normed) @ np.abs(qkv.T.astype(np.float64)))
    errors = np.split(products, heads + 2 * kv_heads, axis=1)
    largest = 0.0
    for head in range(heads):
        columns = slice(head * head_dim, (head + 1) * head_dim)
        q, k, v = parts[head], parts[heads], parts[heads + 1]
        out, bound = attention_bound(q, k, v, (errors[head], errors[heads], errors[heads + 1]), cache_dtype)
        bound = bound + g(2) * (np.abs(wide[:, columns]) + np.abs(out) + bound)
        error = np.abs(found[:, columns] - (wide[:, columns] + out))
        largest = max(largest, share(error, bound))
        # Attention that sees one key too few, or a value of its neighbour, is outside.
        if tokens >= 5:
            blind = np.concatenate([out[:1], out[:-1]])
            assert not (np.abs(blind - out) <= bound).all()
    print(f"{variant} {cache_dtype} {tokens} x {head_dim}: {largest:.3f} of the bound")
    assert largest <= 1
    if cache_dtype != "fp32":
        assert largest > 1 / VACUOUS


def test_unit_roundoffs_are_those_of_the_conversions() -> None:
    values = np.random.default_rng(0).uniform(1, 2, 100_000).astype(np.float32)
    error = np.abs(torch.from_numpy(values).bfloat16().double().numpy() - values) / values
    assert 0.99 * UB16 / (1 + UB16) < error.max() <= UB16
