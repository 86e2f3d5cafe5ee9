"""Statistics in pieces against statistics of the whole, and the dtype rule's predictions against measured rounding."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dseek.compress.dtype_rule import allowed, dot_product_bound, gain, projection_noise, rounding
from dseek.compress.rounding import round_inputs
from dseek.compress.statistics import Accumulator, by_powers_of_two, magnitude_bins, quantile, share_above
from dseek.models.calibration_file import TensorStatistics
from dseek.ops.linear.reference import rotate, round_rows, round_weight

FORMATS = ("i8c", "i8g", "i4g")
STORED = {"fp16": "f16", "bf16": "bf16", "i8c": "i8c", "i8g": "i8g", "i4g": "i4g"}


def normal(rows: int = 300, channels: int = 200, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


def heavy() -> torch.Tensor:
    """Student's t with three degrees of freedom: kurtosis without a bound."""
    chi = sum(normal(seed=seed).square() for seed in (1, 2, 3)) / 3
    return normal() / chi.sqrt()


def with_outlier_channel() -> torch.Tensor:
    x = normal()
    x[:, 7] *= 80
    return x


DISTRIBUTIONS = {
    "normal": normal(),
    "heavy tails": heavy(),
    "one outlier channel": with_outlier_channel(),
    "uniform, off centre": normal().uniform_(3, 4, generator=torch.Generator().manual_seed(4)),
    "subnormal in fp16": normal() * 1e-6,
    "scales subnormal in fp16": normal() * 3e-3,
}


def collect(x: torch.Tensor, pieces: int = 64, formats: tuple[str, ...] = FORMATS) -> TensorStatistics:
    found = Accumulator("x", "weight", x.shape[1], formats)  # type: ignore[arg-type]
    for piece in x.split(pieces):
        found.add(piece)
    return found.result()


def measured(x: torch.Tensor, name: str) -> float:
    """Relative error of a rounding, root mean square."""
    exact = rotate(x) if name == "i8c" else x
    error = round_weight(x, STORED[name]).double() - exact.double()
    return float((error.square().sum() / x.double().square().sum()).sqrt())


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_pieces_add_up_to_the_whole(name: str) -> None:
    x = DISTRIBUTIONS[name]
    whole, pieces = collect(x, len(x)), collect(x, 7)
    left, right = Accumulator("x", "weight", x.shape[1], FORMATS), Accumulator("x", "weight", x.shape[1], FORMATS)
    left.add(x[:100])
    right.add(x[100:])
    left.merge(right)
    flat = x.double().flatten()
    distance = flat - flat.mean()
    for found in (whole, pieces, left.result()):
        assert found.num_values == x.numel()
        assert (found.least, found.largest) == (float(x.min()), float(x.max()))
        assert found.mean == pytest.approx(float(flat.mean()), rel=1e-6)
        assert found.variance == pytest.approx(float(distance.square().mean()), rel=1e-6)
        kurtosis = float(distance.pow(4).mean() / distance.square().mean() ** 2)
        assert found.kurtosis == pytest.approx(kurtosis, rel=1e-6)
        assert found.histogram == whole.histogram
        assert found.outlier_channels == whole.outlier_channels
        for key, noise in found.noise.items():
            assert noise.expected == pytest.approx(whole.noise[key].expected, rel=1e-5)
            assert noise.bound == pytest.approx(whole.noise[key].bound, rel=1e-5)


def test_the_histogram_has_a_bin_for_every_power_of_two() -> None:
    values = torch.tensor([0.0, -0.0, 1e-40, -1e-39, 1.0, 1.99, -2.0, 3.0, 1024.0, 2.0**127])
    found = by_powers_of_two(magnitude_bins(values))
    assert (found.num_zeros, found.num_subnormal, found.first_exponent) == (2, 2, 0)
    assert (found.counts[0], found.counts[1], found.counts[10], found.counts[127]) == (2, 2, 1, 1)
    assert sum(found.counts) == 6
    nothing = by_powers_of_two(magnitude_bins(torch.zeros(3)))
    assert (nothing.counts, nothing.num_zeros) == ((), 3)


def test_shares_and_quantiles_are_good_to_a_bin() -> None:
    x = normal().flatten()
    bins = magnitude_bins(x)
    for bound in (0.1, 1.0, 2.5, 6.0):
        assert share_above(bins, bound) == pytest.approx(float((x.abs() > bound).float().mean()), abs=0.005)
    for share in (0.5, 0.9, 0.99):
        true = float(x.abs().quantile(share))
        assert true <= quantile(bins, share) <= 1.15 * true


def test_an_outlier_channel_is_named() -> None:
    found = collect(with_outlier_channel())
    assert found.outlier_channels == (7,)
    assert found.outlier_share > 0.001
    assert collect(normal()).num_outlier_channels == 0


def test_what_is_not_finite_is_named_and_left_out() -> None:
    x = normal(50, 32)
    x[3, 5], x[40, 0], x[41, 1] = math.nan, math.inf, -math.inf
    found = Accumulator("x", "output", 32, ())
    found.add(x[:20], "text, token 0 on", 0)
    found.add(x[20:], "text, token 512 on", 20)
    result = found.result()
    assert (result.num_nan, result.num_infinite, result.num_values) == (1, 2, 47 * 32)
    assert result.not_finite == (
        "NaN at text, token 0 on[3, 5]",
        "+inf at text, token 512 on[40, 0]",
        "-inf at text, token 512 on[41, 1]",
    )
    assert math.isfinite(result.kurtosis)
    empty = Accumulator("x", "output", 32, ())
    empty.add(torch.full((2, 32), math.nan))
    assert (empty.result().num_values, empty.result().num_nan) == (0, 64)


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_predicted_noise_against_measured_rounding(distribution: str, name: str) -> None:
    x = DISTRIBUTIONS[distribution]
    found, error = rounding(collect(x), name), measured(x, name)
    assert error <= found.bound
    # An outlier leaves the rest of its group in a few steps, where errors are not spread evenly.
    within_db = 2.0 if distribution == "one outlier channel" and name == "i4g" else 1.0
    assert 20 * math.log10(found.expected / error) == pytest.approx(0, abs=within_db)


def test_fp16_loses_what_is_below_its_subnormals_and_overflows_above() -> None:
    small, large = collect(normal() * 1e-8), collect(normal() * 3e4)
    assert rounding(small, "fp16").lost_share > 0.9
    assert rounding(small, "fp16").expected == pytest.approx(1.0, abs=0.4)
    assert rounding(large, "fp16").overflows
    assert not rounding(large, "bf16").overflows
    assert float((normal() * 3e4).half().float().abs().max()) == math.inf
    assert "fp16" not in [entry.weight_format for entry in allowed(large, 0.01)]


def test_the_narrowest_format_that_fits() -> None:
    found = collect(normal())
    assert next(entry.weight_format for entry in allowed(found, 0.1)) == "i4g"
    assert next(entry.weight_format for entry in allowed(found, 0.01)) == "i8c"
    assert next(entry.weight_format for entry in allowed(found, 0.003)) == "fp16"
    assert [entry.weight_format for entry in allowed(found, 1e-6)] == ["fp32"]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70),
    st.floats(-12, 12),
    st.floats(0, 3),
    st.floats(-5, 5),
    st.sampled_from(sorted(STORED)),
    st.integers(0, 1000),
)
def test_no_rounding_exceeds_its_bound(
    channels: int, scale: float, spread: float, shift: float, name: str, seed: int
) -> None:
    x = normal(3, channels, seed)
    x = (x * torch.exp(spread * normal(3, channels, seed + 1)) + shift) * 10.0**scale
    found = rounding(collect(x), name)
    if not found.overflows:
        assert measured(x, name) <= found.bound * (1 + 1e-6) + 1e-7


@pytest.mark.parametrize(("inputs_of", "within_db"), [(normal, 1.0), (with_outlier_channel, 3.0)])
def test_noise_of_a_projection_grows_by_its_gain(inputs_of: Callable[[], torch.Tensor], within_db: float) -> None:
    """Where one channel outweighs the others, it is the errors of one column of the weight that count."""
    inputs_RK = inputs_of()
    weight_NK = 0.05 * normal(150, 200, 9) + 0.02 * normal(1, 200, 10)
    outputs_RN = inputs_RK @ weight_NK.T
    inputs, weight, outputs = collect(inputs_RK), collect(weight_NK), collect(outputs_RN, formats=())
    assert gain(inputs, weight, outputs) > 0
    for name in ("i4g", "i8c", "i8g", "bf16"):
        given_RK = round_inputs(inputs_RK, STORED[name])
        found_RN = given_RK.double() @ round_weight(weight_NK, STORED[name]).double().T
        error = float(((found_RN - outputs_RN).square().sum() / outputs_RN.double().square().sum()).sqrt())
        predicted = projection_noise(inputs, weight, outputs, name)
        assert 20 * math.log10(predicted / error) == pytest.approx(0, abs=within_db)


@pytest.mark.parametrize("names", [("bf16", "bf16"), ("fp16", "bf16"), ("fp32", "fp16"), ("fp32", "fp32")])
def test_dot_products_stay_within_their_condition(names: tuple[str, str]) -> None:
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    x_RK, weight_NK = normal(40, 300, 1), normal(30, 300, 2)
    rounded_x, rounded_w = x_RK.to(kinds[names[0]]).float(), weight_NK.to(kinds[names[1]]).float()
    found = rounded_x @ rounded_w.T
    exact = x_RK.double() @ weight_NK.double().T
    condition = (x_RK.double().abs() @ weight_NK.double().abs().T) / exact.abs()
    errors = (found.double() - exact).abs() / exact.abs()
    for probable in (False, True):
        bounds = condition * dot_product_bound(1.0, 300, *names, probable=probable)
        assert bool((errors <= bounds).all())
    assert dot_product_bound(2.0, 300, *names, probable=True) <= dot_product_bound(2.0, 300, *names)


def test_the_largest_floats_leave_finite_statistics() -> None:
    x = torch.full((4, 64), torch.finfo(torch.float32).max) * torch.tensor([1.0, -1.0, 0.5, 1.0])[:, None]
    found = Accumulator("x", "output", 64, FORMATS)
    found.add(x)
    found.add_cancellation(x, x)
    result = found.result()
    figures = [result.mean, result.variance, result.kurtosis, result.rotated_largest]
    figures += [value for noise in result.noise.values() for value in (noise.expected, noise.bound)]
    assert result.num_nan == result.num_infinite == 0
    assert all(math.isfinite(value) for value in figures)
    assert result.cancellation is not None
    assert math.isfinite(result.cancellation.squares)


def test_cancellation_is_the_condition_number() -> None:
    x_RK, weight_NK = normal(8, 64, 1), normal(40, 64, 2)
    found = Accumulator("y", "output", 40, ())
    found.add_cancellation(x_RK, weight_NK)
    result = found.result().cancellation
    assert result is not None
    ratios = (x_RK.abs() @ weight_NK.abs().T) / (x_RK @ weight_NK.T).abs()
    for share, value in ((0.5, result.median), (0.9, result.percentile_90), (0.99, result.percentile_99)):
        true = float(ratios.quantile(share))
        assert 0.9 * true <= value <= 1.15 * true


def test_a_row_of_the_cache_has_a_scale_of_its_own() -> None:
    x = with_outlier_channel()
    found = rounding(collect(x, formats=("int8",)), "int8")
    error = float(((round_rows(x) - x).double().square().sum() / x.double().square().sum()).sqrt())
    assert error <= found.bound
    assert 20 * math.log10(found.expected / error) == pytest.approx(0, abs=1.0)
