"""Statistics of tensors that pass by in pieces: range, magnitudes by powers of two, moments, outliers, rounding noise.

An `Accumulator` keeps a fixed amount of memory however much it is given, and two of them that saw different rows add up
to what one would hold that saw all (`merge`). Magnitudes are counted in bins of an eighth of a power of two, which are
the upper bits of a float32, so that shares above a bound are known to an eighth of an octave without a second pass.

What it does not know: values are taken to be float32; a quantile is good to the width of a bin, some 9 %. R rows, C
channels.
"""

from __future__ import annotations

import math
import sys
from typing import Literal

import torch
import torch.nn.functional as F

from dseek.models.calibration_file import Cancellation, Histogram, Kind, Noise, TensorStatistics
from dseek.ops.linear.reference import GROUP, rotate

OUTLIER_FACTOR = 6.0
"""Values beyond so many times the root mean square are outliers; channels, beyond so many times the median channel."""

MAX_NAMED = 16
"""Channels and places that are named; the others are counted."""

_BINS = 2048
_SUB_BITS = 3
_ROOM = 1.0 + 2.0**-10
"""On bounds: x / scale is rounded to float32."""

_SUMMABLE = 1e30
"""Rows with larger magnitudes are summed in float64."""

IntegerFormat = Literal["i8c", "i8g", "i4g", "int8"]


class Accumulator:
    """Collects the statistics of one tensor.

    Args:
        name: canonical name.
        kind: what it is.
        num_channels: C.
        formats: integer formats whose rounding noise is followed: i8c, i8g, i4g, or int8 (a scale a row, as in the
            cache).
    """

    def __init__(self, name: str, kind: Kind, num_channels: int, formats: tuple[IntegerFormat, ...]) -> None:
        self.name, self.kind, self.num_channels, self.formats = name, kind, num_channels, formats
        self.num_values = 0
        self.least, self.largest = math.inf, -math.inf
        self._moments = (0.0, 0.0, 0.0, 0.0)  # mean, then sums of second, third and fourth powers of distances from it
        self._bins = torch.zeros(_BINS, dtype=torch.int64)
        self._channel_largest = torch.zeros(num_channels)
        self._noise = {name: [0.0, 0.0] for name in formats}
        self.rotated_largest = 0.0
        self.num_nan = self.num_infinite = 0
        self.not_finite: list[str] = []
        self.cancellation: Ratios | None = None

    @torch.no_grad()
    def add(self, x_RC: torch.Tensor, where: str = "", first_row: int = 0) -> None:
        """Take in rows.

        Args:
            x_RC: float32 [R, C].
            where: what they are rows of, for the places of values that are not finite.
            first_row: index of the first of them there.
        """
        x_RC = x_RC.detach().float()
        if not torch.isfinite(x_RC.sum()):
            x_RC = self._without_bad_rows(x_RC, where, first_row)
        if x_RC.numel() == 0:
            return
        least, largest = x_RC.aminmax()
        self.least, self.largest = min(self.least, float(least)), max(self.largest, float(largest))
        self._bins += magnitude_bins(x_RC)
        self._add_moments(x_RC)
        self._channel_largest = torch.maximum(self._channel_largest, x_RC.abs().amax(0))
        if "i8c" in self.formats:
            rotated = rotate(x_RC)
            self.rotated_largest = max(self.rotated_largest, float(rotated.abs().max()))
        for name in self.formats:
            expected, bound = integer_noise(rotated if name == "i8c" else x_RC, name)
            self._noise[name][0] += expected
            self._noise[name][1] += bound

    def merge(self, other: Accumulator) -> None:
        """Take in what another one, of the same tensor, has seen.

        Args:
            other: it is not changed.
        """
        assert (self.name, self.num_channels, self.formats) == (other.name, other.num_channels, other.formats)
        self.least, self.largest = min(self.least, other.least), max(self.largest, other.largest)
        self._combine(other.num_values, other._moments)
        self._bins += other._bins
        self._channel_largest = torch.maximum(self._channel_largest, other._channel_largest)
        self.rotated_largest = max(self.rotated_largest, other.rotated_largest)
        for name, sums in other._noise.items():
            self._noise[name] = [mine + theirs for mine, theirs in zip(self._noise[name], sums, strict=True)]
        self.num_nan += other.num_nan
        self.num_infinite += other.num_infinite
        self.not_finite = (self.not_finite + other.not_finite)[:MAX_NAMED]
        if other.cancellation is not None:
            self.cancellation = self.cancellation or Ratios()
            self.cancellation.bins += other.cancellation.bins
            self.cancellation.terms += other.cancellation.terms
            self.cancellation.sums += other.cancellation.sums

    @torch.no_grad()
    def add_cancellation(self, x_RK: torch.Tensor, weight_NK: torch.Tensor) -> None:
        """Take in the condition numbers of dot products, without biases.

        Args:
            x_RK: rows of inputs, finite or not.
            weight_NK: the weight.

        Source: Higham 2002, Accuracy and Stability of Numerical Algorithms, second edition, section 3.1: the relative
        error of an inner product is at most gamma_n |x|'|y| / |x'y|.
        """
        sizes = F.linear(x_RK.abs(), weight_NK.abs())
        ratios = sizes / F.linear(x_RK, weight_NK).abs()
        self.cancellation = self.cancellation or Ratios()
        self.cancellation.bins += magnitude_bins(ratios[torch.isfinite(ratios)])
        finite_RK = x_RK[torch.isfinite(x_RK).all(1)]
        self.cancellation.terms += float(F.linear(finite_RK.square(), weight_NK.square()).sum(dtype=torch.float64))
        self.cancellation.sums += float(F.linear(finite_RK, weight_NK).double().square().sum())

    def result(self) -> TensorStatistics:
        """Sum up what was seen so far."""
        mean, second, _, fourth = self._moments
        variance = second / self.num_values if self.num_values else 0.0
        kurtosis = fourth / self.num_values / variance**2 if variance > 0 else 0.0
        mean_square = variance + mean * mean
        outlier_channels = self._outlier_channels()
        share = share_above(self._bins, OUTLIER_FACTOR * math.sqrt(mean_square)) if mean_square > 0 else 0.0
        count = max(1, self.num_values)
        return TensorStatistics(
            name=self.name,
            kind=self.kind,
            num_channels=self.num_channels,
            num_values=self.num_values,
            least=self.least if self.num_values else 0.0,
            largest=self.largest if self.num_values else 0.0,
            mean=mean,
            variance=variance,
            kurtosis=_bounded(kurtosis),
            histogram=by_powers_of_two(self._bins),
            outlier_share=share,
            outlier_channels=tuple(outlier_channels[:MAX_NAMED]),
            num_outlier_channels=len(outlier_channels),
            noise={
                name: Noise(expected=_bounded(e / count), bound=_bounded(b / count))
                for name, (e, b) in self._noise.items()
            },
            rotated_largest=_bounded(self.rotated_largest),
            num_nan=self.num_nan,
            num_infinite=self.num_infinite,
            not_finite=tuple(self.not_finite),
            cancellation=self.cancellation.result() if self.cancellation is not None else None,
        )

    def _without_bad_rows(self, x_RC: torch.Tensor, where: str, first_row: int) -> torch.Tensor:
        """Count and name what is not finite; give the rows that are (sums of finite values may overflow, too)."""
        bad_RC = ~torch.isfinite(x_RC)
        self.num_nan += int(torch.isnan(x_RC).sum())
        self.num_infinite += int(torch.isinf(x_RC).sum())
        for row, channel in bad_RC.nonzero()[: MAX_NAMED - len(self.not_finite)].tolist():
            value = "NaN" if math.isnan(float(x_RC[row, channel])) else f"{float(x_RC[row, channel]):+}"
            self.not_finite.append(f"{value} at {where}[{first_row + row}, {channel}]")
        return x_RC[~bad_RC.any(1)]

    def _add_moments(self, x_RC: torch.Tensor) -> None:
        """Powers in float32 of distances scaled to at most 1, so that none overflows; sums of rows in float64."""
        if max(-self.least, self.largest) > _SUMMABLE:
            x_RC = x_RC.double()
        mean = float(x_RC.sum(1).double().sum()) / x_RC.numel()
        distance = x_RC - mean
        scale = float(distance.abs().max())
        if scale > 0:
            distance /= scale
        squared = distance * distance
        powers = (squared, squared * distance, squared * squared)
        second, third, fourth = (float(power.sum(1).double().sum()) for power in powers)
        # What rounding the mean to float32 has shifted by is far below the error of the sums.
        self._combine(x_RC.numel(), (mean, second * scale**2, third * scale**3, fourth * scale**4))

    def _combine(self, count: int, moments: tuple[float, float, float, float]) -> None:
        """Merge central moments.

        Source: Pébay 2008, Formulas for Robust, One-Pass Parallel Computation of Covariances and Arbitrary-Order
        Statistical Moments, Sandia report 2008-6212, equations 2.1, 3.1 (with p = 4).
        """
        if count == 0:
            return
        n, m = self.num_values, count
        if n == 0:
            self.num_values, self._moments = m, moments
            return
        (mean_a, a2, a3, a4), (mean_b, b2, b3, b4) = self._moments, moments
        total = n + m
        d = mean_b - mean_a
        self._moments = (
            mean_a + d * m / total,
            a2 + b2 + d**2 * n * m / total,
            a3 + b3 + d**3 * n * m * (n - m) / total**2 + 3 * d * (n * b2 - m * a2) / total,
            a4
            + b4
            + d**4 * n * m * (n * n - n * m + m * m) / total**3
            + 6 * d**2 * (n * n * b2 + m * m * a2) / total**2
            + 4 * d * (n * b3 - m * a3) / total,
        )
        self.num_values = total

    def _outlier_channels(self) -> list[int]:
        """Outlier channels, largest first."""
        largest_C = self._channel_largest
        bound = OUTLIER_FACTOR * float(largest_C.median())
        order = largest_C.argsort(descending=True)
        return [int(channel) for channel in order[: int((largest_C > bound).sum())]]


class Ratios:
    """Condition numbers that pass by: their bins, for quantiles, and sums of the squared terms and of squared sums."""

    def __init__(self) -> None:
        self.bins = torch.zeros(_BINS, dtype=torch.int64)
        self.terms = self.sums = 0.0

    def result(self) -> Cancellation:
        """Sum up what was seen so far."""
        return Cancellation(
            median=quantile(self.bins, 0.5),
            percentile_90=quantile(self.bins, 0.9),
            percentile_99=quantile(self.bins, 0.99),
            squares=_bounded(self.terms / self.sums) if self.sums > 0 else 0.0,
        )


def _bounded(value: float) -> float:
    """What is beyond a float, as sums over values near float32's largest may be, as the largest there is."""
    return value if math.isfinite(value) else sys.float_info.max


def magnitude_bins(x: torch.Tensor) -> torch.Tensor:
    """Count magnitudes by the exponent and the three upper fraction bits of a float32.

    Args:
        x: float32, finite.

    Returns:
        int64 [2048].
    """
    upper = (x.contiguous().view(torch.int32).reshape(-1) & 0x7FFFFFFF) >> (23 - _SUB_BITS)
    counts = torch.bincount(upper, minlength=_BINS)
    # Zeros share the first bin with the smallest subnormals; they are kept apart in a bin that no number has.
    zeros = int((x == 0).sum())
    counts[0] -= zeros
    counts[_BINS - 1] += zeros
    return counts


def by_powers_of_two(bins: torch.Tensor) -> Histogram:
    """Sum bins of an eighth of an octave to whole ones.

    Args:
        bins: from `magnitude_bins`.
    """
    by_exponent = bins.view(-1, 1 << _SUB_BITS).clone()
    num_zeros = int(by_exponent[-1, -1])
    by_exponent[-1, -1] = 0
    counts = by_exponent.sum(1)
    filled = counts[1:].nonzero()[:, 0].tolist()
    if not filled:
        return Histogram(first_exponent=0, counts=(), num_zeros=num_zeros, num_subnormal=int(counts[0]))
    first, last = filled[0] + 1, filled[-1] + 1
    return Histogram(
        first_exponent=first - 127,
        counts=tuple(counts[first : last + 1].tolist()),
        num_zeros=num_zeros,
        num_subnormal=int(counts[0]),
    )


def share_above(bins: torch.Tensor, bound: float) -> float:
    """Tell which share of the values has a magnitude above a bound, straight lines within a bin.

    Args:
        bins: from `magnitude_bins`.
        bound: positive.
    """
    total = int(bins.sum())
    if total == 0 or bound >= torch.finfo(torch.float32).max:
        return 0.0
    own = int(torch.tensor(bound).view(torch.int32) >> (23 - _SUB_BITS))
    lower, upper = _edge(own), _edge(own + 1)
    above = float(bins[own + 1 : _BINS - 1].sum()) + float(bins[own]) * (upper - bound) / (upper - lower)
    return above / total


def quantile(bins: torch.Tensor, share: float) -> float:
    """Find the magnitude that a share of the values does not exceed: the upper edge of its bin.

    Args:
        bins: from `magnitude_bins`.
        share: from 0 to 1.
    """
    counts = bins[:-1].cumsum(0) + bins[-1]
    total = int(counts[-1])
    if total == 0:
        return 0.0
    return _edge(int((counts < share * total).sum()) + 1)


def _edge(index: int) -> float:
    """Lower edge of a bin."""
    return float(torch.tensor(index << (23 - _SUB_BITS), dtype=torch.int32).view(torch.float32))


def integer_noise(x_RC: torch.Tensor, name: str) -> tuple[float, float]:
    """Predict what rounding to an integer format adds, from the range of each group of values alone.

    A step is the group's range over the number of steps. Errors that are spread evenly over it have the variance
    step^2 / 12 (Widrow and Kollar 2008, Quantization Noise, section 4.1), but no more than what there was: a group
    whose values are mostly below half a step loses them. The largest error is half a step, or, where scale and minimum
    are stored in float16, what their rounding moves the ends of the range by.

    Args:
        x_RC: float32 [R, C], finite; rotated where the format is i8c.
        name: i8c, int8 (a scale a row), i8g or i4g (groups of 32).

    Returns:
        Sums of squared errors over all values: expected, and at most.
    """
    rows, channels = x_RC.shape
    if name in ("i8c", "int8"):
        groups, size = x_RC, torch.full((rows, 1), float(channels))
    else:
        padded = F.pad(x_RC, (0, -channels % GROUP))
        groups = padded.reshape(-1, GROUP)
        size = torch.full((len(groups) // rows, 1), float(GROUP))
        size[-1] = float(channels - (len(size) - 1) * GROUP)
        size = size.repeat(rows, 1)
    stored = name in ("i8g", "i4g")  # scales as float16, which rounds them and loses small ones
    if name == "i4g":
        least, largest = groups.aminmax(dim=1, keepdim=True)
        step, bottom = (largest - least) / 15, least.half().float()
        scale = step.half().float()
        # The two ends of the range may lie outside of what the rounded minimum and scale reach.
        below, above = (least - bottom).abs(), (largest - bottom - 15 * scale).abs()
    else:
        step, bottom = groups.abs().amax(1, keepdim=True) / 127, torch.zeros(1)
        scale = step.half().float() if stored else step
        below, above = torch.zeros(1), 127 * (step - scale)
    missed = torch.maximum(below, above)
    energy = (groups.double() - bottom).square().sum(1, keepdim=True)
    half = scale.double() / 2
    expected = torch.minimum(size * half.square() / 3, energy)
    expected += torch.where(missed > half, missed.double().square(), 0.0)
    expected = torch.where(scale > 0, expected, energy)
    worst = torch.maximum(half, missed.double())
    worst = torch.where(scale > 0, worst, torch.maximum((largest - bottom).abs(), below)) if name == "i4g" else worst
    return float(expected.sum()), float((size * (_ROOM * worst).square()).sum())
