"""How integers are chosen: grids, GPTQ against its definition without blocks, factors that leave the function alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dseek.compress.ptq import load_block, run_block
from dseek.compress.ptq_calibration import SAMPLE_ROWS, InputStatistics, cut_texts
from dseek.compress.ptq_gptq import GptqConfig, gptq, output_error
from dseek.compress.ptq_rounding import LEAST_SCALE, Scheme, choose_grid, round_to_nearest
from dseek.compress.ptq_smoothing import find_factors, fold, joints
from dseek.core.errors import ConfigError
from dseek.models.decoder import Rotary
from dseek.models.files import open_model
from dseek.ops.linear.reference import round_rows
from tests.models import tiny

W8A8 = Scheme(num_bits=8, activation_bits=8)
W8 = Scheme(num_bits=8, group_size=32)
W4 = Scheme(num_bits=4, group_size=32)
W4_ZERO = Scheme(num_bits=4, group_size=32, symmetric=False)
SCHEMES = {"w8a8": W8A8, "w8": W8, "w4": W4, "w4-zero": W4_ZERO}


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Rows whose inputs depend on each other, some larger than others, as a transformer's do."""
    mixing = draw(inputs, inputs, seed=100) / inputs**0.5
    return (draw(rows, inputs, seed=seed) @ mixing) * torch.linspace(0.2, 4, inputs)


@pytest.mark.parametrize("name", SCHEMES)
def test_rounding_is_to_the_nearest_point(name: str) -> None:
    scheme = SCHEMES[name]
    weight = draw(24, 96) * 0.05
    weight[3, 32:64] = 0  # a group of nothing
    weight[4, :32] += 1  # a group without a sign change: its range still holds zero
    found = round_to_nearest(weight, scheme, torch.float16, search=False)
    assert found.values.dtype == torch.int8
    assert found.values.min() >= scheme.least and found.values.max() <= scheme.most
    scale = found.grid.scale.repeat_interleave(96 // found.grid.scale.shape[1], 1)
    torch.testing.assert_close(scale, scale.half().float(), rtol=0, atol=0)
    # Half a step; the range's ends may lie half a step off where a zero point or the scale was rounded.
    slack = 1.1 if scheme.symmetric else 2.2
    assert ((found.widen() - weight).abs() <= 0.5 * slack * scale).all()
    assert (found.grid.scale >= LEAST_SCALE).all() and (found.widen()[3, 32:64] == 0).all()


@pytest.mark.parametrize("scheme", [W4, W4_ZERO], ids=["w4", "w4-zero"])
def test_a_range_that_is_cut_short_is_taken_only_where_it_is_better(scheme: Scheme) -> None:
    weight = draw(16, 4, 32) ** 3
    importance = draw(4, 32, seed=1).abs()
    for weights_of_errors in (None, importance):
        plain = choose_grid(weight, scheme, importance_Gg=weights_of_errors, search=False)
        best = choose_grid(weight, scheme, importance_Gg=weights_of_errors)

        def error(grid: object, weighting: torch.Tensor | None = weights_of_errors) -> torch.Tensor:
            squares = (grid.widen(grid.round(weight, scheme)) - weight) ** 2
            return (squares if weighting is None else squares * weighting).sum(-1)

        assert (error(best) <= error(plain) + 1e-9).all() and error(best).sum() < error(plain).sum()


def test_minima_beside_zero_points_are_halves_exactly() -> None:
    found = round_to_nearest(draw(64, 128) * 0.03 + 0.01, W4_ZERO, torch.float32)
    assert found.grid.zero is not None and found.grid.zero.unique().numel() > 3
    minimum = found.grid.scale * (W4_ZERO.least - found.grid.zero.float())
    torch.testing.assert_close(minimum, minimum.half().float(), rtol=0, atol=0)
    torch.testing.assert_close(found.grid.scale, found.grid.scale.bfloat16().float(), rtol=0, atol=0)


def definition(weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme, config: GptqConfig) -> torch.Tensor:
    """Integers by optimal brain quantisation, one column after the other, with the whole inverse each time.

    Source: Frantar et al. 2022, GPTQ, equations 2 and 3, with the order and the grids given.
    """
    inputs = weight.shape[1]
    width = scheme.group_size or inputs
    diagonal = hessian.diagonal()
    grid = choose_grid(weight.view(len(weight), -1, width), scheme, importance_Gg=diagonal.view(-1, width).clone())
    order = torch.argsort(diagonal, descending=True) if config.act_order else torch.arange(inputs)
    left = weight.double().clone()
    damped = hessian.double() + config.damping * diagonal.double().mean() * torch.eye(inputs, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    values = torch.zeros_like(left)
    for column in order.tolist():
        scale = grid.scale[:, column // width].double()
        zero = 0 if grid.zero is None else grid.zero[:, column // width].double()
        rounded = torch.clamp(torch.round(left[:, column] / scale) + zero, scheme.least, scheme.most)
        values[:, column] = rounded
        error = left[:, column] - (rounded - zero) * scale
        left -= error[:, None] / inverse[column, column] * inverse[column]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return values.to(torch.int8)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", [W8A8, W4, W4_ZERO], ids=["channel", "w4", "w4-zero"])
def test_gptq_is_what_its_definition_says(scheme: Scheme, act_order: bool) -> None:
    if scheme.group_size is not None and not act_order:
        # Grids are chosen on the way then, which the definition above leaves open.
        scheme = Scheme(num_bits=8, group_size=None)
    x, weight = correlated(400, 160), draw(12, 160, seed=1) * 0.1
    hessian = x.T @ x / len(x)
    config = GptqConfig(act_order=act_order)
    found = gptq(weight, hessian, scheme, config)
    expected = definition(weight, hessian, scheme, config)
    # float32 against float64: a weight on a boundary may round the other way and move those after it by a step.
    assert (found.values == expected).float().mean() > 0.98
    wide = found.grid.widen(expected.view(12, -1, 160 // found.grid.scale.shape[1])).view(12, 160)
    assert output_error(weight, found.widen(), hessian) == pytest.approx(output_error(weight, wide, hessian), rel=0.02)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_changes_outputs_less_than_rounding(name: str, act_order: bool) -> None:
    scheme = SCHEMES[name]
    x, weight = correlated(600, 256), draw(24, 256, seed=1) * 0.1
    hessian = x.T @ x / len(x)
    nearest = output_error(weight, round_to_nearest(weight, scheme).widen(), hessian)
    found = gptq(weight, hessian, scheme, GptqConfig(act_order=act_order))
    assert output_error(weight, found.widen(), hessian) < 0.85 * nearest
    fresh = correlated(200, 256, seed=7)
    outputs = fresh @ (found.widen() - weight).T
    assert (
        outputs.square().mean() < 0.9 * (fresh @ (round_to_nearest(weight, scheme).widen() - weight).T).square().mean()
    )


def test_gptq_survives_inputs_that_never_move_and_refuses_what_is_not_finite() -> None:
    x, weight = correlated(20, 64), draw(6, 64, seed=1)
    x[:, 5] = 0
    hessian = x.T @ x / len(x)  # of rank 20 at most
    found = gptq(weight, hessian, W4, GptqConfig(damping=1e-6))
    assert (found.widen()[:, 5] == 0).all() and torch.isfinite(found.grid.scale).all()
    assert output_error(weight, found.widen(), hessian) < 0.01
    hessian[3, 3] = float("nan")
    with pytest.raises(ConfigError, match="not finite"):
        gptq(weight, hessian, W4, GptqConfig())


@pytest.mark.parametrize("case", ["llama-bias", "qwen2", "qwen3", "llama-64-mha"])
def test_folding_leaves_a_block_alone(case: str, tmp_path: Path) -> None:
    with open_model(str(tiny.save(case, tmp_path / "m"))) as files:
        block, shape = load_block(files, 1), files.shape
        rotary, x = Rotary(shape), draw(2, 30, shape.hidden_size)
        with torch.no_grad():
            before = run_block(block, 1, shape, rotary, x)
            for number, joint in enumerate(joints(shape.num_heads, shape.num_kv_heads)):
                inputs = block.get_submodule(joint.after[0]).in_features
                factors = torch.exp(draw(inputs, seed=number))
                if joint.repeat > 1:
                    factors = factors.view(-1, joint.repeat, shape.head_dim)[:, :1].expand(-1, joint.repeat, -1)
                fold(block, joint, factors.reshape(-1))
            after = run_block(block, 1, shape, rotary, x)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "scheme"), [("smoothquant", W8A8), ("awq", W4)])
def test_factors_help_where_there_are_outliers(kind: str, scheme: Scheme) -> None:
    rows, weight = draw(256, 128), draw(48, 128, seed=1) * 0.1
    rows[:, 7] *= 60
    rows[:, 90] *= 20
    factors = find_factors(kind, rows, rows.abs().amax(0), rows.abs().mean(0), [weight[:20], weight[20:]], scheme)

    def error(by: torch.Tensor) -> float:
        x = rows / by
        if scheme.activation_bits is not None:
            x = round_rows(x)
        return float((x @ round_to_nearest(weight * by, scheme).widen().T - rows @ weight.T).square().mean())

    assert factors.max() > 2 and error(factors) < 0.6 * error(torch.ones(128))


def test_factors_are_ones_where_nothing_helps_and_shared_where_heads_share() -> None:
    exact = torch.randint(-7, 8, (16, 64), generator=torch.Generator().manual_seed(0)).float()
    exact[:, ::32] = 7
    rows = draw(64, 64)
    ones = find_factors("awq", rows, rows.abs().amax(0), rows.abs().mean(0), [exact], W4)
    assert (ones == 1).all()
    rows[:, 3] *= 50
    weight = draw(24, 64, seed=2)
    shared = find_factors(
        "smoothquant", rows, rows.abs().amax(0), rows.abs().mean(0), [weight], W8A8, head_dim=16, repeat=2
    ).view(2, 2, 16)
    assert (shared[:, 0] == shared[:, 1]).all() and shared.max() > 1.5


def test_statistics_are_those_of_all_rows() -> None:
    x = correlated(SAMPLE_ROWS + 300, 48)
    found = InputStatistics(48, seed=1)
    for piece in x.split(130):
        found.add(piece)
    torch.testing.assert_close(found.hessian(), x.T @ x / len(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mean, x.abs().mean(0), rtol=1e-5, atol=1e-6)
    assert (found.largest == x.abs().amax(0)).all()
    kept = found.rows()
    assert len(kept) == SAMPLE_ROWS
    where = (kept[:, None, :4] == x[None, :, :4]).all(-1).int().argmax(1)
    assert (x[where] == kept).all() and where.unique().numel() == SAMPLE_ROWS
    late = int((where >= SAMPLE_ROWS).sum())  # of 300 of 812 rows; five standard deviations
    assert abs(late - SAMPLE_ROWS * 300 / len(x)) < 55
    factors = torch.exp(draw(48, seed=3))
    found.divide(factors)
    torch.testing.assert_close(found.hessian(), (x / factors).T @ (x / factors) / len(x), rtol=1e-4, atol=1e-4)


def test_texts_are_cut_without_overlap() -> None:
    found = cut_texts(list(range(105)), 4, 10, seed=2)
    assert found.shape == (4, 10)
    assert len(set(found.flatten().tolist())) == 40 and (found.diff(dim=1) == 1).all()
    assert cut_texts(list(range(25)), 9, 10, seed=0).shape == (2, 10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_bits": 3},
        {"num_bits": 4},
        {"num_bits": 4, "group_size": 48},
        {"num_bits": 8, "symmetric": False},
        {"num_bits": 4, "group_size": 32, "activation_bits": 8},
        {"num_bits": 8, "activation_bits": 4},
    ],
    ids=str,
)
def test_schemes_that_nothing_stores_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="needed"):
        Scheme(**wrong)


def test_inputs_that_are_no_whole_number_of_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="96 inputs"):
        round_to_nearest(draw(4, 96), Scheme(num_bits=4, group_size=64))
