"""GPTQ: round a weight column by column and let the columns that are still wide make up for each error.

What is minimised is the error of the projection's outputs on calibration inputs, tr(D H D^T) with the weight's change D
and H = X^T X, not that of the weights. Grids are those of `ptq_rounding`. N output channels, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dseek.compress.ptq_rounding import Grid, RoundedWeight, Scheme, choose_grid
from dseek.core.errors import ConfigError
from dseek.ops.side_by_side import side_by_side

_BLOCK = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class GptqConfig:
    """How GPTQ rounds."""

    damping: float = 0.01
    """Added to the diagonal of H, as a share of its mean; ten times as much is tried where H cannot be factored."""
    act_order: bool = True
    """Round the inputs with the largest activations first. Groups keep their places in the file: their grids are chosen
    before anything is rounded, where otherwise a group's grid sees the errors of those before it."""

    def __post_init__(self) -> None:
        if not 0 < self.damping < 1:
            raise ConfigError(f"a damping of {self.damping} was asked for", needed="more than 0 and less than 1")


def gptq(
    weight_NK: torch.Tensor,
    hessian_KK: torch.Tensor,
    scheme: Scheme,
    config: GptqConfig,
    scale_dtype: torch.dtype = torch.float32,
) -> RoundedWeight:
    """Round a weight so that its outputs change least.

    Args:
        weight_NK: float32 [N, K].
        hessian_KK: float32 [K, K], the mean of x x^T over calibration inputs x.
        scheme: the integers.
        config: damping and order.
        scale_dtype: that scales are kept in.

    Returns:
        The integers.

    Raises:
        ConfigError: K is not a whole number of groups, or H is not finite.

    Source: Frantar et al. 2022, GPTQ, algorithm 1; the order by activations and the grids chosen beforehand are those
    of its published code (`act_order`, `static_groups`).
    """
    num_rows, num_inputs = weight_NK.shape
    width = scheme.width(num_inputs)
    diagonal = hessian_KK.diagonal().clone()
    if not torch.isfinite(diagonal).all():
        raise ConfigError("the calibration inputs of a projection are not finite", remedy="check the model's weights")
    weight = weight_NK.clone()
    weight[:, diagonal == 0] = 0  # inputs that never were other than zero
    beforehand = config.act_order or scheme.group_size is None
    order = torch.argsort(diagonal, descending=True) if config.act_order else torch.arange(num_inputs)
    groups = weight.view(num_rows, num_inputs // width, width)
    importance = diagonal.view(-1, width).clamp_min(0)
    grid = choose_grid(groups, scheme, scale_dtype, importance)
    scale = grid.scale.clone()
    zero = torch.zeros_like(scale) if grid.zero is None else grid.zero.float()

    upper = _inverse_factor(hessian_KK[order][:, order], config.damping)
    values = torch.empty(num_rows, num_inputs, dtype=torch.int8)

    def round_rows(piece: int) -> None:
        rows = slice(num_rows * piece // num_pieces, num_rows * (piece + 1) // num_pieces)
        own_scale, own_zero = scale[rows], zero[rows]
        rounded = _round_columns(
            weight[rows][:, order],
            upper,
            order,
            own_scale,
            own_zero,
            scheme,
            scale_dtype,
            None if beforehand else importance,
        )
        values[rows, order] = rounded.to(torch.int8)

    # Rows do not see each other, and a column is so little work that threads would only wait for one another.
    num_pieces = min(num_rows, torch.get_num_threads())
    side_by_side(num_pieces, round_rows)
    return RoundedWeight(values, Grid(scale, None if scheme.symmetric else zero.to(torch.int8)))


def _round_columns(
    weight: torch.Tensor,
    upper: torch.Tensor,
    order: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    """Round some rows, columns in their order; with `importance` [G, g] grids are chosen on the way, in place."""
    num_inputs = weight.shape[1]
    width = scheme.width(num_inputs)
    values = torch.empty_like(weight)
    # A block is a whole number of groups, so that a group's grid sees all that earlier columns changed.
    step = _BLOCK if importance is None or _BLOCK % width == 0 else width * max(1, _BLOCK // width)
    indices = order.tolist()
    for begin in range(0, num_inputs, step):
        end = min(begin + step, num_inputs)
        block = weight[:, begin:end].clone()
        errors = torch.empty_like(block)
        for column in range(end - begin):
            group = indices[begin + column] // width
            if importance is not None and indices[begin + column] % width == 0:
                fresh = choose_grid(
                    block[:, None, column : column + width], scheme, scale_dtype, importance[group : group + 1]
                )
                scale[:, group] = fresh.scale[:, 0]
                if fresh.zero is not None:
                    zero[:, group] = fresh.zero[:, 0].float()
            wide, step_size, offset = block[:, column], scale[:, group], zero[:, group]
            rounded = torch.round(wide / step_size).add_(offset).clamp_(scheme.least, scheme.most)
            values[:, begin + column] = rounded
            error = (wide - (rounded - offset) * step_size) / upper[begin + column, begin + column]
            errors[:, column] = error
            block[:, column:].addr_(error, upper[begin + column, begin + column : end], alpha=-1)
        weight[:, end:] -= errors @ upper[begin:end, end:]
    return values


def _inverse_factor(hessian_KK: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper Cholesky factor of the damped inverse, float32; more damping where rounding made the matrix indefinite."""
    hessian = hessian_KK.double()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    mean = float(diagonal.mean())
    share = damping
    while True:
        damped = hessian + share * mean * torch.eye(len(hessian), dtype=torch.float64)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return upper.float()
        share *= 10
        if share > 1e3:
            raise ConfigError("the calibration inputs of a projection are not finite", remedy="check the texts")


def output_error(weight_NK: torch.Tensor, rounded_NK: torch.Tensor, hessian_KK: torch.Tensor) -> float:
    """Compute the share of a projection's output energy that rounding changed.

    Args:
        weight_NK: float32 [N, K], wide.
        rounded_NK: float32 [N, K], what its integers stand for.
        hessian_KK: float32 [K, K], the mean of x x^T.

    Returns:
        tr(D H D^T) / tr(W H W^T) with D = W - Q.
    """
    change = weight_NK - rounded_NK
    wrong = float(((change @ hessian_KK) * change).sum())
    whole = float(((weight_NK @ hessian_KK) * weight_NK).sum())
    return wrong / whole if whole > 0 else 0.0
