"""Rounding to integers with a gradient: straight-through, with learned steps, scaled element by element.

A tensor x becomes q = clamp(round(x / s), low, high), and what is computed with is s q. Layers multiply the integers q
and then the steps s, as the kernels do, so `round_to_steps` returns q; the gradients below are those of s q that
autograd puts together from it.

Why these. Straight-through (STE) takes rounding for the identity inside the range. Learned steps (LSQ) add the gradient
that the step itself has, which lets training trade clipping against resolution. Element-wise scaling (EWGS) corrects
the straight-through gradient for the distance between x and s q to first order of a Taylor series, so that values far
from their level feel the slope they have, not the level's; of the corrections of the quantisation error it is the one
whose sign cannot turn round while delta <= 2, and it costs one multiplication. What is not known: whether a correction
helps a given model; `benchmarks.experiments.qat_ablation` measures that.
"""

from __future__ import annotations

import math

import torch

LEAST_STEP = 1e-8
"""Steps are kept above it: a channel of zeros has none of its own."""


def integer_range(bits: int, *, unsigned: bool = False) -> tuple[int, int]:
    """Give the integers of a width that the kernels multiply exactly.

    Args:
        bits: 2 to 8.
        unsigned: from zero on, for inputs that are never negative.

    Returns:
        Least and largest. Of 8 bits -127 to 127, or 0 to 254: one level less than there could be, because the AVX2
        kernel takes inputs of -127 to 127 (after the shift that makes unsigned ones signed).
    """
    if bits == 8:
        return (0, 254) if unsigned else (-127, 127)
    return (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


class _RoundToSteps(torch.autograd.Function):
    """See `round_to_steps`."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: torch.Tensor,
        step: torch.Tensor,
        low: int,
        high: int,
        delta: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, step, *(() if delta is None else (delta,)))
        ctx.range = (low, high)  # type: ignore[attr-defined]
        return (x / step).round_().clamp_(low, high)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # type: ignore[no-untyped-def]
        x, step, *deltas = ctx.saved_tensors
        low, high = ctx.range
        scaled = x / step
        inside = (scaled >= low) & (scaled <= high)
        grad_x = grad_step = None
        if ctx.needs_input_grad[0]:
            corrected = grad
            if deltas:
                corrected = grad * (1 + deltas[0] * grad.sign() * (scaled - scaled.round()))
            grad_x = (corrected * inside) / step
        if ctx.needs_input_grad[1]:
            grad_step = (grad * inside * -scaled / step).sum_to_size(step.shape)
        return grad_x, grad_step, None, None, None


def round_to_steps(
    x: torch.Tensor, step: torch.Tensor, low: int, high: int, delta: torch.Tensor | None = None
) -> torch.Tensor:
    """Round to whole steps and clip, with a gradient.

    Args:
        x: float32 or float64, any shape.
        step: of the same dtype, above zero, of a shape that broadcasts to x's.
        low, high: least and largest integer.
        delta: strength of the element-wise scaling, a scalar in units of the step; None for straight-through.

    Returns:
        Integers in x's dtype and shape.

    Source:
        Straight-through: Bengio et al. 2013, section 4; the gradient of x is that of the result inside the range and
        zero outside. Steps: Esser et al. 2020, LSQ, equation 3: d(s q)/ds is q - x / s inside and low or high outside;
        this function contributes -x / s, the product s q the rest. Scaling: Lee et al. 2021, EWGS, equation 5:
        g_x = g_q (1 + delta sign(g_q) (x / s - q)); the paper's delta is for values normalised to 0..1, so it is this
        one times (number of levels - 1). Steps get LSQ's gradient in either case.
    """
    rounded: torch.Tensor = _RoundToSteps.apply(x, step, low, high, delta)
    return rounded


def scale_gradient(step: torch.Tensor, factor: float) -> torch.Tensor:
    """Return a tensor as it is, with its gradient multiplied.

    Args:
        step: any tensor.
        factor: for the gradient. Source: Esser et al. 2020, LSQ, appendix A (`gradscale`).
    """
    return step.detach() + (step * factor - (step * factor).detach())


def step_gradient_factor(num_elements: int, high: int) -> float:
    """Balance a step's gradient with those of the elements that share it.

    Args:
        num_elements: N, that share the step (of activations: in one sample).
        high: Qp, the largest integer.

    Returns:
        1 / sqrt(N Qp). Source: Esser et al. 2020, LSQ, section 2.2.
    """
    return 1.0 / math.sqrt(max(1, num_elements) * high)


def step_by_max(x: torch.Tensor, dims: tuple[int, ...], high: float) -> torch.Tensor:
    """Largest magnitude over the largest integer: nothing is clipped.

    Args:
        x: values.
        dims: dimensions that share a step; they are kept with size one.
        high: the largest integer, or what takes its place.
    """
    return (x.detach().abs().amax(dims, keepdim=True) / high).clamp_min(LEAST_STEP)


def step_by_mean(x: torch.Tensor, dims: tuple[int, ...], high: int) -> torch.Tensor:
    """Initial step of LSQ, 2 <|x|> / sqrt(Qp).

    Args:
        x: values.
        dims: dimensions that share a step; they are kept with size one.
        high: Qp. Source: Esser et al. 2020, LSQ, section 2.1.
    """
    step = x.detach().abs().mean(dims, keepdim=True) * (2.0 / math.sqrt(high))
    return _fill(step)


def step_by_error(
    x: torch.Tensor, dims: tuple[int, ...], low: int, high: int, *, num_candidates: int = 64
) -> torch.Tensor:
    """Choose the step with the least squared rounding error among equally spaced shares of the largest magnitude.

    Args:
        x: values.
        dims: dimensions that share a step; they are kept with size one.
        low, high: least and largest integer.
        num_candidates: steps that are tried, the largest being that of `step_by_max`.

    Returns:
        The steps. Clipping and rounding are weighed against each other; at 8 bits this is near the largest magnitude,
        at 2 bits far below it.
    """
    x = x.detach()
    largest = step_by_max(x, dims, high)
    best, least = largest, None
    for candidate in range(1, num_candidates + 1):
        step = largest * (candidate / num_candidates)
        error = ((x / step).round().clamp(low, high) * step - x).square().sum(dims, keepdim=True)
        if least is None:
            best, least = step, error
        else:
            best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return _fill(best)


def _fill(step: torch.Tensor) -> torch.Tensor:
    """Give channels of zeros the mean step of the others, so that a learned one does not start at nothing."""
    known = step > LEAST_STEP
    mean = step[known].mean() if known.any() else step.new_tensor(1.0)
    return torch.where(known, step, mean)
