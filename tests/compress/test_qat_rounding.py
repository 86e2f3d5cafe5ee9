"""Gradients of rounding against their formulas in float64, and against finite differences where there are any."""

from __future__ import annotations

import math

import pytest
import torch

from dseek.compress.qat_rounding import (
    integer_range,
    round_to_steps,
    scale_gradient,
    step_by_error,
    step_by_max,
    step_by_mean,
    step_gradient_factor,
)


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(
    x: torch.Tensor, step: torch.Tensor, bits: int, upstream: torch.Tensor, delta: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rounded value s q, and the gradients of x and of the step for `upstream` at s q."""
    x, step = x.clone().requires_grad_(), step.clone().requires_grad_()
    scaling = None if delta is None else torch.tensor(delta, dtype=torch.float64)
    rounded = round_to_steps(x, step, *integer_range(bits), scaling) * step
    rounded.backward(upstream)
    assert x.grad is not None and step.grad is not None
    return rounded.detach(), x.grad, step.grad


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("delta", [None, 0.3])
def test_gradients_are_the_papers(bits: int, delta: float | None) -> None:
    low, high = integer_range(bits)
    x, step, upstream = draw(5, 64) * 3, draw(5, 1, seed=1).abs() * 2 / high + 0.01, draw(5, 64, seed=2)
    rounded, grad_x, grad_step = gradients(x, step, bits, upstream, delta)
    scaled = x / step
    inside = (scaled >= low) & (scaled <= high)
    assert inside.any() and not inside.all()
    q = scaled.round().clamp(low, high)
    torch.testing.assert_close(rounded, q * step, rtol=0, atol=0)
    # STE, Bengio et al. 2013; EWGS, Lee et al. 2021, equation 5.
    expected = upstream if delta is None else upstream * (1 + delta * upstream.sign() * (scaled - q))
    torch.testing.assert_close(grad_x, expected * inside, rtol=1e-12, atol=1e-14)
    # LSQ, Esser et al. 2020, equation 3; clipped values give the clipping integer.
    by_element = torch.where(inside, q - scaled, torch.where(scaled < low, float(low), float(high)))
    torch.testing.assert_close(grad_step, (upstream * by_element).sum(1, keepdim=True), rtol=1e-10, atol=1e-12)


def test_gradients_where_rounding_is_smooth_are_finite_differences() -> None:
    """Away from the edges of a level s q moves with s alone; clipped, it is s times a constant."""
    step = torch.tensor([[0.25]], dtype=torch.float64)
    clipped = torch.tensor([[5.0, -9.0, 7.5]], dtype=torch.float64)
    upstream = torch.ones_like(clipped)
    _, grad_x, grad_step = gradients(clipped, step, 4, upstream)
    nudge = 1e-6

    def value(s: torch.Tensor) -> torch.Tensor:
        return (round_to_steps(clipped, s, *integer_range(4)) * s).sum()

    difference = (value(step + nudge) - value(step - nudge)) / (2 * nudge)
    torch.testing.assert_close(grad_step.sum(), difference, rtol=1e-7, atol=0)
    assert not grad_x.any()


def test_step_gradient_is_that_of_the_mean_over_dither() -> None:
    """Rounding dithered by uniform noise has a mean whose derivative exists: 1 for x inside the range, as STE says."""
    x = torch.tensor([[0.37]], dtype=torch.float64)
    step = torch.tensor([[0.25]], dtype=torch.float64)
    noise = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000 - 0.5

    def mean_rounded(value: torch.Tensor) -> torch.Tensor:
        return (round_to_steps(value + noise * step, step, *integer_range(8)) * step).mean()

    difference = (mean_rounded(x + 0.1) - mean_rounded(x - 0.1)) / 0.2
    _, grad_x, _ = gradients(x, step, 8, torch.ones_like(x))
    torch.testing.assert_close(difference, grad_x.sum(), rtol=2e-3, atol=0)


def test_ewgs_is_the_first_order_correction_of_a_quadratic() -> None:
    """With delta = h s / |g| the scaled gradient at s q is the true gradient at x of a loss with curvature h."""
    curvature, target = 0.7, 1.234
    x = torch.tensor([0.4, 0.61, -0.33], dtype=torch.float64)
    step = torch.tensor([0.25], dtype=torch.float64)
    q = (x / step).round() * step
    slope = curvature * (q - target)  # of curvature / 2 (v - target)^2 at v = s q
    for index in range(3):
        delta = curvature * float(step) / float(slope[index].abs())
        _, grad_x, _ = gradients(x[index : index + 1], step, 8, slope[index : index + 1], delta)
        torch.testing.assert_close(grad_x, curvature * (x[index : index + 1] - target), rtol=1e-12, atol=0)


def test_second_derivatives_pass() -> None:
    x, step = draw(3, 8).requires_grad_(), torch.full((3, 1), 0.1, dtype=torch.float64)
    loss = (round_to_steps(x, step, -127, 127) * step).pow(3).sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * (x / step).round().detach() * step, rtol=1e-10, atol=1e-12)


def test_scaled_gradient_leaves_the_value() -> None:
    step = torch.tensor([0.3, 1e-7], requires_grad=True)
    scaled = scale_gradient(step, 0.125)
    assert torch.equal(scaled, step)
    scaled.sum().backward()
    assert step.grad is not None and step.grad.tolist() == [0.125, 0.125]
    assert step_gradient_factor(100, 7) == 1 / math.sqrt(700)


def test_ranges_of_integers() -> None:
    assert integer_range(8) == (-127, 127) and integer_range(8, unsigned=True) == (0, 254)
    assert integer_range(4) == (-8, 7) and integer_range(2, unsigned=True) == (0, 3)


def test_rules_for_steps() -> None:
    x = draw(6, 500)
    x[2] = 0
    by_max, by_mean = step_by_max(x, (1,), 7), step_by_mean(x, (1,), 7)
    torch.testing.assert_close(by_max[0], x[:1].abs().amax(1) / 7)
    torch.testing.assert_close(by_mean[0], 2 * x[:1].abs().mean(1) / math.sqrt(7))
    assert by_mean[2] == by_mean[[0, 1, 3, 4, 5]].mean()  # a channel of zeros starts where the others do on average

    def error(step: torch.Tensor) -> torch.Tensor:
        return ((x / step).round().clamp(-8, 7) * step - x).square().sum(1)

    best = step_by_error(x, (1,), -8, 7)
    assert (error(best)[x.any(1)] <= error(by_max)[x.any(1)]).all()
    assert error(best).sum() < 0.9 * error(by_max).sum()
