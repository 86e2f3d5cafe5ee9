"""Reads times off a `Machine`'s curves, at sizes between the measured ones.

Over rows and contexts, time is interpolated along straight lines in the logarithms of both, and beyond the last point
grows in proportion to the work. Between shapes, it is the time *a weight* (or a visible pair of positions) that is
interpolated: each measured shape counts by the inverse fourth power of its distance in the logarithms of the sizes, so
that a measured shape gives its own time exactly.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dseek.core.errors import ConfigError
from dseek.hardware.machine import AttentionCurve, LinearCurve, Machine, Overheads
from dseek.plan.formats import MEASURED_AS, cache_bytes_per_token, packed_bytes


def interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Interpolate y at x along straight lines in log x and log y.

    Args:
        xs: positive, rising.
        ys: positive, one for each of `xs`.
        x: where, positive.

    Returns:
        The value; below the first point the first value, beyond the last one growing in proportion to x.
    """
    if x <= xs[0]:
        return ys[0]
    if x >= xs[-1]:
        return ys[-1] * x / xs[-1]
    upper = bisect.bisect_left(xs, x)
    share = math.log(x / xs[upper - 1]) / math.log(xs[upper] / xs[upper - 1])
    return ys[upper - 1] * math.pow(ys[upper] / ys[upper - 1], share)


def interpolate_level(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Interpolate as `interpolate` does, but stay at the last value beyond the last point.

    Args:
        xs: positive, rising.
        ys: positive, one for each of `xs`.
        x: where, positive.

    Returns:
        The value.
    """
    return interpolate(xs, ys, min(x, xs[-1]))


def blend(points: Sequence[tuple[Sequence[float], float]], place: Sequence[float]) -> float:
    """Interpolate a positive value between scattered places.

    Args:
        points: places (positive coordinates) and their positive values.
        place: where.

    Returns:
        The geometric mean of the values, weighted by the inverse fourth power of the distance in log coordinates.
    """
    total = weighted = 0.0
    for coordinates, value in points:
        squared = sum(math.log(a / b) ** 2 for a, b in zip(coordinates, place, strict=True))
        if squared < 1e-12:
            return value
        weight = squared**-2
        total += weight
        weighted += weight * math.log(value)
    return math.exp(weighted / total)


STREAMED_ROWS = 64
"""Up to so many rows the way of a weight from memory is seen."""


@dataclass(slots=True)
class ColdWarm:
    """Time of a call with what it reads far and near."""

    cold_s: float
    warm_s: float


class Rates:
    """Times on one machine with one set of kernels.

    Args:
        machine: the measurements.
        kernels: native or torch.
        num_threads: threads of the run; fewer than the machine's scale every time as measured.

    Raises:
        ConfigError: the machine was not measured with these kernels.
    """

    def __init__(self, machine: Machine, kernels: str, num_threads: int) -> None:
        self._linears: dict[str, list[LinearCurve]] = defaultdict(list)
        for curve in machine.linears:
            if curve.kernels == kernels:
                self._linears[curve.weight_format].append(curve)
        for name, base in MEASURED_AS.items():
            if base in self._linears:
                self._linears[name] = self._linears[base]
        self._attentions: dict[str, dict[tuple[int, int, int], list[AttentionCurve]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for entry in machine.attentions:
            if entry.kernels == kernels:
                heads = (entry.num_heads, entry.num_kv_heads, entry.head_dim)
                self._attentions[entry.cache_dtype][heads].append(entry)
        costs = [entry for entry in machine.overheads if entry.kernels == kernels]
        if not self._linears or not self._attentions or not costs or not machine.bandwidths:
            raise ConfigError(
                f"this machine's {kernels} kernels were not measured", remedy="run `dseek doctor --refresh`"
            )
        self.overheads: Overheads = costs[0]
        self._bandwidth_sizes = [float(entry.num_bytes) for entry in machine.bandwidths]
        self._bandwidth_seconds = [entry.num_bytes / entry.gbs * 1e-9 for entry in machine.bandwidths]
        self._memory_s_per_byte = 1e-9 / machine.read_bandwidth_gbs
        self._cold_s_per_byte = self.stream_s_per_byte(machine.cold_bytes)
        scalings = machine.scalings
        threads = [float(entry.num_threads) for entry in scalings]
        self._matvec_scale = _scale(threads, [entry.matvec for entry in scalings], num_threads)
        self._matmul_scale = _scale(threads, [entry.matmul for entry in scalings], num_threads)
        self._attention_scale = _scale(threads, [entry.attention for entry in scalings], num_threads)
        self._memory: dict[tuple[object, ...], float] = {}

    def has_format(self, weight_format: str) -> bool:
        """Tell whether linear layers in a `weight_format`, or in one that stands for it, were measured."""
        return weight_format in self._linears

    def has_cache(self, cache_dtype: str) -> bool:
        """Tell whether attention over a `cache_dtype` was measured."""
        return cache_dtype in self._attentions

    def stream_s_per_byte(self, working_set_bytes: float) -> float:
        """Time to read a byte when that many bytes are read in turn, again and again.

        Args:
            working_set_bytes: all that is read between two readings of the same byte.

        Returns:
            Seconds.
        """
        if working_set_bytes >= self._bandwidth_sizes[-1]:
            return self._memory_s_per_byte
        seconds = interpolate(self._bandwidth_sizes, self._bandwidth_seconds, working_set_bytes)
        return seconds / max(working_set_bytes, self._bandwidth_sizes[0])

    def linear_s(
        self, weight_format: str, num_rows: int, num_outputs: int, num_inputs: int, working_set_bytes: float
    ) -> float:
        """Time of one linear layer.

        The measured cold time holds for the working set it was measured with; another is read faster or slower, by as
        much as the measured bandwidths differ. No time is below the warm one.

        Args:
            weight_format: a measured format.
            num_rows: rows of the input.
            num_outputs: output channels.
            num_inputs: inputs.
            working_set_bytes: what a whole step reads.

        Returns:
            Seconds.
        """
        key = (weight_format, num_rows, num_outputs, num_inputs, working_set_bytes)
        known = self._memory.get(key)
        if known is None:
            time = self._linear_time(weight_format, num_rows, num_outputs, num_inputs)
            num_bytes = packed_bytes(weight_format, num_outputs, num_inputs)
            slower = num_bytes * (self.stream_s_per_byte(working_set_bytes) - self._cold_s_per_byte)
            share = min(1.0, math.log(num_rows) / math.log(512))
            scale = self._matvec_scale ** (1 - share) * self._matmul_scale**share
            # The more rows share a reading of the weight, the less it matters.
            seconds = time.cold_s + slower if num_rows <= STREAMED_ROWS else time.cold_s
            known = max(time.warm_s, seconds) * scale
            self._memory[key] = known
        return known

    def _linear_time(self, weight_format: str, num_rows: int, num_outputs: int, num_inputs: int) -> ColdWarm:
        cold, warm = [], []
        for curve in self._linears[weight_format]:
            size = curve.num_outputs * curve.num_inputs
            place = (curve.num_outputs, curve.num_inputs)
            if num_rows > 4 * curve.num_rows[-1]:
                # A curve that ends early (a head's) says nothing about many rows.
                continue
            cold.append((place, interpolate(curve.num_rows, curve.seconds, num_rows) / size))
            warm.append((place, interpolate(curve.num_rows, curve.warm_seconds, num_rows) / size))
        if not cold:
            longest = max(self._linears[weight_format], key=lambda curve: curve.num_rows[-1])
            size = longest.num_outputs * longest.num_inputs
            seconds = interpolate(longest.num_rows, longest.seconds, num_rows) / size
            return ColdWarm(cold_s=seconds * num_outputs * num_inputs, warm_s=seconds * num_outputs * num_inputs)
        place = (num_outputs, num_inputs)
        size = num_outputs * num_inputs
        return ColdWarm(cold_s=blend(cold, place) * size, warm_s=blend(warm, place) * size)

    def attention_s(
        self,
        cache_dtype: str,
        num_rows: int,
        context: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        working_set_bytes: float,
        *,
        seen_tokens: float | None = None,
    ) -> float:
        """Time of causal attention of one sequence in one layer.

        Decode is corrected for the working set as `linear_s` is; prefill is never faster than its cache can be read.

        Args:
            cache_dtype: a measured cache dtype.
            num_rows: query rows, the newest positions.
            context: positions in the cache, the queries' own included.
            num_heads: query heads.
            num_kv_heads: key/value heads.
            head_dim: width of a head.
            working_set_bytes: what a whole step reads.
            seen_tokens: positions that a row looks at, its own included, in the mean over rows; None: all it may.

        Returns:
            Seconds.
        """
        key = (cache_dtype, num_rows, context, num_heads, num_kv_heads, head_dim, working_set_bytes, seen_tokens)
        known = self._memory.get(key)
        if known is None:
            pairs = float(visible_pairs(num_rows, context))
            at = float(context)
            if seen_tokens is not None:
                # As if the rows were the newest of a context in which they see so much.
                pairs, at = num_rows * seen_tokens, seen_tokens + (num_rows - 1) / 2
            cold, warm = [], []
            for heads, curves in self._attentions[cache_dtype].items():
                # Time for each visible pair of positions, query head and channel.
                place = (heads[0], heads[0] / heads[1], heads[2])
                pair = _pair_seconds(curves, num_rows, at)
                cold.append((place, pair.cold_s / (heads[0] * heads[2])))
                warm.append((place, pair.warm_s / (heads[0] * heads[2])))
            where = (num_heads, num_heads / num_kv_heads, head_dim)
            size = pairs * num_heads * head_dim
            warm_s = blend(warm, where) * size
            num_bytes = at * cache_bytes_per_token(cache_dtype, num_kv_heads, head_dim)
            stream = self.stream_s_per_byte(working_set_bytes)
            seconds = num_bytes * stream
            if num_rows == 1:
                seconds = blend(cold, where) * size + num_bytes * (stream - self._cold_s_per_byte)
            known = max(warm_s, seconds) * self._attention_scale
            self._memory[key] = known
        return known


def _pair_seconds(curves: Sequence[AttentionCurve], num_rows: int, context: float) -> ColdWarm:
    """Time a visible pair with given heads: along each curve's contexts, then between the curves' rows."""
    ordered = sorted(curves, key=lambda curve: curve.num_rows)
    rows = [float(curve.num_rows) for curve in ordered]
    cold, warm = [], []
    for curve in ordered:
        # A curve of r rows is read where each row sees as much as it does in the case asked for.
        at = max(curve.num_rows, context - num_rows / 2 + curve.num_rows / 2)
        pairs = [float(visible_pairs(curve.num_rows, point)) for point in curve.contexts]
        wanted = visible_pairs(curve.num_rows, round(at))
        cold.append(interpolate(pairs, curve.seconds, wanted) / wanted)
        warm.append(interpolate(pairs, curve.warm_seconds, wanted) / wanted)
    return ColdWarm(cold_s=interpolate_level(rows, cold, num_rows), warm_s=interpolate_level(rows, warm, num_rows))


def visible_pairs(num_rows: int, context: int) -> int:
    """Count the pairs of a query row and a position it may see.

    Args:
        num_rows: query rows, the newest positions.
        context: all positions.

    Returns:
        rows x older positions, and the causal triangle.
    """
    return num_rows * (context - num_rows) + num_rows * (num_rows + 1) // 2


def _scale(threads: Sequence[float], factors: Sequence[float], num_threads: int) -> float:
    """Time with `num_threads` as a multiple of the time with all; more threads than were measured help nothing."""
    if not threads or num_threads >= threads[-1]:
        return 1.0
    return interpolate(threads, factors, num_threads)
