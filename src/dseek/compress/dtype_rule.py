"""Which formats represent a tensor within an error bound, from its statistics alone.

A format is judged by three figures: whether the largest magnitude is beyond what it holds, the mean square of the
rounding errors that are to be expected, and a bound on that which no rounding exceeds.

*Floats* with p significant bits and the least normal exponent m round a value in [2^e, 2^(e+1)) by at most half a unit
in the last place, 2^(max(e, m) - p), and where errors are spread evenly by a third of that, squared, in the mean. Each
bin of the exponent histogram is charged with that; below half of the least subnormal, values are lost as a whole.
Source: Higham 2002, Accuracy and Stability of Numerical Algorithms, second edition, theorem 2.2 and section 2.1.

*Integers* have a step of their own for each group of values; the range of every group was seen when the statistics were
taken (`dseek.compress.statistics.integer_noise`).

*A dot product* y = sum x_i w_i of n rounded values is off by at most sum |x_i| |w_i| (r_x + r_w + r_x r_w), that is by
their relative errors times the condition number sum |x_i w_i| / |y| (Higham 2002, section 3.1). That is the bound where
errors are relative to each value, as those of floats are: `dot_product_bound`. With independent errors of mean zero,
squares add up instead (Wilkinson 1961, Error analysis of direct methods of matrix inversion, section 2; Higham and Mary
2019, A new approach to probabilistic rounding error analysis, theorem 2.4: n becomes its square root), so that

    E|dy|^2 / E|y|^2 = g (N_x + N_w),

with the noise-to-signal ratios N of inputs and weight. Where errors do not depend on the value, as those of integers
with one step for many values, g = n E[x^2] E[w^2] / E[y^2], which follows from the mean squares (`gain`). Where they
are relative to each value, as those of floats, it is the condition number in squares, E[sum x_i^2 w_i^2] / E[y^2],
which is larger where large inputs meet large weights, and was measured. `projection_noise` takes the one or the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dseek.core.errors import ConfigError
from dseek.models.calibration_file import TensorStatistics

FORMATS = ("i4g", "i8c", "i8g", "fp16", "bf16", "fp32")
"""Narrowest first; fp16 before bf16, since it is more exact where it holds the range."""

INPUT_FORMATS = {"i4g": "i8g", "i8g": "i8g", "i8c": "i8c", "fp16": "fp32", "bf16": "bf16", "fp32": "fp32"}
"""What the kernels round a projection's inputs to, beside a weight in a format (groups: with few rows)."""

FLOAT16_LARGEST = 65504.0
ROUNDS_TO_INFINITY = {"fp16": 65520.0, "bf16": 2.0**128 - 2.0**119, "fp32": math.inf}
SIGNIFICANT_BITS = {"fp16": 11, "bf16": 8, "fp32": 24}
LEAST_NORMAL_EXPONENT = {"fp16": -14, "bf16": -126, "fp32": -126}

DEFAULT_ERROR = 0.01
"""Largest relative error, root mean square, of a tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """What a format does to a tensor."""

    weight_format: str
    """One of `FORMATS`, or int8 for keys and values."""
    overflows: bool
    """Some values are beyond its largest number, or a group's scale is."""
    lost_share: float
    """Share of the values, not 0 themselves, that surely become 0."""
    expected: float
    """Root mean square of the errors to be expected, over that of the values."""
    bound: float
    """The same, at most."""

    @property
    def signal_to_noise_db(self) -> float:
        """Expected signal-to-noise ratio in decibels; infinite where nothing is rounded."""
        return -20 * math.log10(self.expected) if self.expected > 0 else math.inf


def rounding(tensor: TensorStatistics, weight_format: str) -> Rounding:
    """Predict what a format does to a tensor.

    Args:
        tensor: its statistics.
        weight_format: one of `FORMATS`, or int8 for keys and values.

    Returns:
        The prediction; where the format overflows, the errors are infinite.

    Raises:
        ConfigError: the format is none, or was not followed when the statistics were taken.
    """
    signal = tensor.mean_square
    if weight_format in SIGNIFICANT_BITS:
        overflows = tensor.magnitude >= ROUNDS_TO_INFINITY[weight_format]
        expected, bound, lost = _float_noise(tensor, weight_format)
    else:
        noise = tensor.noise.get(weight_format)
        if noise is None:
            raise ConfigError(
                f"{tensor.name} ({tensor.kind}) was not looked at for {weight_format!r}",
                needed="one of " + ", ".join((*SIGNIFICANT_BITS, *tensor.noise)),
            )
        # Scales of groups, and minima of the 4-bit ones, are stored in float16.
        largest = {"i4g": tensor.magnitude, "i8g": tensor.magnitude / 127}.get(weight_format, 0.0)
        overflows = largest > FLOAT16_LARGEST
        expected, bound, lost = noise.expected, noise.bound, 0.0
    if overflows:
        return Rounding(weight_format=weight_format, overflows=True, lost_share=lost, expected=math.inf, bound=math.inf)
    return Rounding(
        weight_format=weight_format,
        overflows=False,
        lost_share=lost,
        expected=math.sqrt(expected / signal) if signal > 0 else 0.0,
        bound=math.sqrt(bound / signal) if signal > 0 else 0.0,
    )


def _float_noise(tensor: TensorStatistics, name: str) -> tuple[float, float, float]:
    """Mean squares of the errors, expected and at most, and the share of values that become 0."""
    bits, least = SIGNIFICANT_BITS[name], LEAST_NORMAL_EXPONENT[name]
    total = max(1, tensor.num_values)
    if name == "fp32":
        return 0.0, 0.0, 0.0
    expected = bound = 0.0
    num_lost = 0
    bins = [(tensor.histogram.first_exponent + index, count) for index, count in enumerate(tensor.histogram.counts)]
    bins.append((-127, tensor.histogram.num_subnormal))
    for exponent, count in bins:
        half_unit = math.ldexp(1.0, max(exponent, least) - bits)
        if math.ldexp(1.0, exponent + 1) <= half_unit:
            # All of the bin rounds to 0: the error is the value itself, 7/3 of the bin's least square in the mean.
            num_lost += count
            expected += count * math.ldexp(1.0, 2 * exponent) * 7 / 3
            bound += count * math.ldexp(1.0, 2 * exponent + 2)
        else:
            expected += count * half_unit**2 / 3
            bound += count * half_unit**2
    return expected / total, bound / total, num_lost / total


def allowed(tensor: TensorStatistics, largest_error: float, formats: Sequence[str] = FORMATS) -> list[Rounding]:
    """List the formats that represent a tensor within an error, narrowest first.

    Args:
        tensor: its statistics.
        largest_error: relative, root mean square; what is expected counts.
        formats: to choose from, in this order; what was not followed for this tensor is passed over.

    Returns:
        Those that hold the range, lose nothing whole that counts, and stay within the error.
    """
    known = [name for name in formats if name in SIGNIFICANT_BITS or name in tensor.noise]
    found = [rounding(tensor, name) for name in known]
    return [entry for entry in found if not entry.overflows and entry.expected <= largest_error]


def gain(inputs: TensorStatistics, weight: TensorStatistics, outputs: TensorStatistics) -> float:
    """Tell how much relative noise grows from a projection's inputs and weight to its outputs, in squares.

    Args:
        inputs: of the projection.
        weight: [N, n].
        outputs: without a bias; with one the figure is that of what is added to it.

    Returns:
        1 where products add up as if they had random signs; more where they cancel.
    """
    if outputs.mean_square <= 0:
        return math.inf
    return weight.num_channels * inputs.mean_square * weight.mean_square / outputs.mean_square


def projection_noise(
    inputs: TensorStatistics, weight: TensorStatistics, outputs: TensorStatistics, weight_format: str
) -> float:
    """Predict the relative error of a projection's outputs, root mean square, in a weight format.

    Args:
        inputs: of the projection.
        weight: its weight.
        outputs: of the projection.
        weight_format: one of `FORMATS`; inputs are rounded as `INPUT_FORMATS` says.

    Returns:
        The error; infinite where something overflows.
    """
    rounded_inputs = rounding(inputs, INPUT_FORMATS[weight_format])
    rounded_weight = rounding(weight, weight_format)
    squares = rounded_inputs.expected**2 + rounded_weight.expected**2
    if not math.isfinite(squares):
        return math.inf
    grown = gain(inputs, weight, outputs)
    if weight_format in SIGNIFICANT_BITS and outputs.cancellation is not None:
        grown = outputs.cancellation.squares
    return math.sqrt(grown * squares)


def dot_product_bound(
    condition: float, num_inputs: int, inputs_format: str, weight_format: str, *, probable: bool = False
) -> float:
    """Bound the relative error of a dot product of values rounded to floats, summed up in float32.

    Args:
        condition: sum |x_i w_i| / |sum x_i w_i|.
        num_inputs: n.
        inputs_format: fp16, bf16 or fp32; no value over- or underflows.
        weight_format: likewise.
        probable: bound what is probable (all but one of a hundred thousand sums of independent errors), not all that is
            possible: the error of summation grows with the square root of n.

    Returns:
        At most this. Source: Higham 2002, section 3.1, lemma 3.1 and equation 3.5; for what is probable, Higham and
        Mary 2019, theorem 2.4 with lambda = 5.
    """
    x, w = (2.0 ** -SIGNIFICANT_BITS[name] if name != "fp32" else 0.0 for name in (inputs_format, weight_format))
    unit = 2.0 ** -SIGNIFICANT_BITS["fp32"]
    steps = 5.0 * math.sqrt(num_inputs) if probable else float(num_inputs)
    summed = steps * unit / (1 - steps * unit)
    return condition * ((1 + x) * (1 + w) * (1 + summed) - 1)
