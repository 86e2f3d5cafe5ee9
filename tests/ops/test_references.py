"""The reference operators against plain definitions in double precision, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch

from dseek.ops.attention.reference import causal_attention, visible
from dseek.ops.attention.rotary import rotate
from dseek.ops.norm.reference import rms_norm


def draw(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("size", [1, 7, 16, 576])
def test_rms_norm(size: int) -> None:
    x, weight = draw(3, 5, size), draw(size, seed=1)
    for row_in, row_out in zip(x.flatten(0, 1), rms_norm(x, weight, 1e-5).flatten(0, 1), strict=True):
        scale = 1 / math.sqrt(sum(value**2 for value in row_in.tolist()) / size + 1e-5)
        # The statistics are taken in float32.
        torch.testing.assert_close(row_out, row_in * scale * weight, rtol=1e-5, atol=1e-5)
    zero = rms_norm(torch.zeros(2, size), torch.ones(size), 1e-5)
    assert torch.equal(zero, torch.zeros(2, size))


def test_rms_norm_keeps_the_dtype_and_survives_large_values() -> None:
    x = draw(4, 64, dtype=torch.float32) * 1e3
    half = rms_norm(x.half(), torch.ones(64, dtype=torch.float16), 1e-5)
    assert half.dtype == torch.float16 and half.isfinite().all()
    torch.testing.assert_close(half.float(), rms_norm(x, torch.ones(64), 1e-5), rtol=2e-3, atol=2e-3)


def test_rms_norm_gradient() -> None:
    x = draw(4, 32, dtype=torch.float32).requires_grad_()
    weight = draw(32, seed=1, dtype=torch.float32).requires_grad_()
    direction = draw(4, 32, seed=2, dtype=torch.float32)
    (rms_norm(x, weight, 1e-5) * direction).sum().backward()
    other_x, other_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    plain = other_x / (other_x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * other_weight
    (plain * direction).sum().backward()
    torch.testing.assert_close(x.grad.double(), other_x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), other_weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim", [16, 48, 80])
def test_rotation_is_a_complex_product(head_dim: int) -> None:
    x = draw(2, 6, 3, head_dim)
    angles = draw(6, head_dim // 2, seed=1)
    turned = rotate(x, angles.cos(), angles.sin())
    pairs = torch.complex(x[..., : head_dim // 2], x[..., head_dim // 2 :])
    expected = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), dim=-1))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_rotated_products_depend_on_the_distance_alone() -> None:
    query, key = draw(1, 1, 32).expand(9, 1, 32), draw(1, 1, 32, seed=1).expand(9, 1, 32)
    angles = torch.outer(torch.arange(9.0, dtype=torch.float64), torch.logspace(0, -2, 16, dtype=torch.float64))
    products = torch.einsum("ihd,jhd->ij", *(rotate(x, angles.cos(), angles.sin()) for x in (query, key)))
    for distance in range(9):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, window: int | None) -> torch.Tensor:
    """Softmax written out, row by row."""
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for row in range(q.shape[0]):
        newest = start + row
        oldest = 0 if window is None else max(0, newest - window + 1)
        for head in range(q.shape[1]):
            keys, values = k[oldest : newest + 1, head // group], v[oldest : newest + 1, head // group]
            scores = (keys @ q[row, head] / math.sqrt(q.shape[2])).exp()
            out[row, head] = (scores[:, None] * values).sum(0) / scores.sum()
    return out


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (9, 9), (1, 13), (5, 12)])
def test_causal_attention(rows: int, keys: int, heads: int, kv_heads: int, window: int | None) -> None:
    q, k, v = draw(rows, heads, 16), draw(keys, kv_heads, 16, seed=1), draw(keys, kv_heads, 16, seed=2)
    for start in {keys - rows, 0}:
        expected = plain_attention(q, k, v, start, window)
        torch.testing.assert_close(causal_attention(q, k, v, start, window), expected)
    torch.testing.assert_close(causal_attention(q, k, v, window=window), plain_attention(q, k, v, keys - rows, window))


def test_causal_attention_equals_torchs_own_and_its_gradient() -> None:
    inputs = [draw(7, 4, 16).requires_grad_(), draw(7, 2, 16, seed=1).requires_grad_(), draw(7, 2, 16, seed=2)]
    inputs[2].requires_grad_()
    others = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    ours = causal_attention(*inputs, start=0)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.transpose(0, 1)[None] for tensor in others), is_causal=True, enable_gqa=True
    )[0].transpose(0, 1)
    torch.testing.assert_close(ours, theirs)
    direction = draw(7, 4, 16, seed=3)
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    for one, other in zip(inputs, others, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_causal_attention_in_bfloat16_rounds_only_at_the_end() -> None:
    q, k, v = (draw(8, 2, 32, seed=seed).bfloat16() for seed in range(3))
    ours = causal_attention(q, k, v)
    assert ours.dtype == torch.bfloat16
    exact = causal_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(ours.double(), exact, rtol=4e-3, atol=1e-6)


def test_a_scale_of_its_own_and_visibility() -> None:
    q, k, v = (draw(3, 1, 16, seed=seed) for seed in range(3))
    torch.testing.assert_close(causal_attention(q, k, v, scale=0.5), causal_attention(q * 2, k, v, scale=0.25))
    mask = visible(torch.tensor([2, 3]), torch.arange(5), 2)
    assert mask.tolist() == [[False, True, True, False, False], [False, False, True, True, False]]
