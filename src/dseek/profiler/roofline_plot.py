"""The roofline as an inline SVG: roofs in logarithmic axes, operators as dots, larger the longer they took.

Colours are CSS variables of the page, so that the same drawing serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from dseek.profiler.advice import time_text
from dseek.profiler.records import OperatorRecord, Profile

WIDTH, HEIGHT = 860, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 18, 46
MAX_DOTS, MAX_LABELS = 40, 8

COLOURS = {"linear": "--series-1", "attention": "--series-2", "memory": "--series-3", "other": "--series-4"}
"""Colour of each kind of operator."""


class _Axes:
    """Maps operations a byte and GFLOP/s to the drawing."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.x_low, self.x_high = _decades(xs)
        self.y_low, self.y_high = _decades(ys)

    def x(self, value: float) -> float:
        share = (math.log10(value) - self.x_low) / (self.x_high - self.x_low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (math.log10(value) - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def roofline_svg(profile: Profile) -> str:
    """Draw the roofline.

    Args:
        profile: with its roofs.

    Returns:
        An `<svg>` element, or nothing where the machine was not measured or no operator has known work.
    """
    roofs = profile.roofs
    dots = [record for record in profile.by_name() if record.intensity is not None and record.seconds > 0][:MAX_DOTS]
    if roofs is None or not dots:
        return ""
    peaks = _peaks_shown(profile, dots)
    xs = [record.intensity or 1.0 for record in dots]
    xs += [peak / roofs.bandwidth_gbs for peak in peaks.values()]
    ys = [record.flops / record.seconds * 1e-9 for record in dots] + list(peaks.values())
    axes = _Axes(xs, ys)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Roofline">',
        *_grid(axes),
        *_roofs(axes, roofs.bandwidth_gbs, peaks),
        *_dots(axes, dots, profile.wall_s),
        "</svg>",
    ]
    return "".join(parts)


def _peaks_shown(profile: Profile, dots: Sequence[OperatorRecord]) -> dict[str, float]:
    """The peaks of the formats that ran, and the one of fp32."""
    assert profile.roofs is not None
    wanted = {record.dtype for record in dots} | {"f32", "fp32"}
    found: dict[str, float] = {}
    for name, peak in profile.roofs.peaks_gflops.items():
        # fp32 and f32 are PyTorch's and dseek's names of one thing; the higher roof is the roof.
        shown = {"f32": "fp32", "f16": "fp16"}.get(name, name)
        if name in wanted or shown in wanted:
            found[shown] = max(found.get(shown, 0.0), peak)
    return found or dict(list(profile.roofs.peaks_gflops.items())[:1])


def _decades(values: Sequence[float]) -> tuple[float, float]:
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = max(0.15, 0.06 * (high - low))
    return low - margin, high + margin


def _grid(axes: _Axes) -> list[str]:
    parts = []
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for power in range(math.ceil(axes.x_low), math.floor(axes.x_high) + 1):
        x = axes.x(10.0**power)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{_number(power)}</text>')
    for power in range(math.ceil(axes.y_low), math.floor(axes.y_high) + 1):
        y = axes.y(10.0**power)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(power)}</text>')
    middle_x, middle_y = (LEFT + right) / 2, (TOP + bottom) / 2
    parts.append(
        f'<text class="axis" x="{middle_x:.0f}" y="{HEIGHT - 6}" text-anchor="middle">operations a byte</text>'
    )
    parts.append(
        f'<text class="axis" x="14" y="{middle_y:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 14 {middle_y:.0f})">GFLOP/s</text>'
    )
    return parts


def _roofs(axes: _Axes, bandwidth_gbs: float, peaks: dict[str, float]) -> list[str]:
    parts = []
    left, right = 10**axes.x_low, 10**axes.x_high
    top = max(peaks.values())
    start = max(left, 10**axes.y_low / bandwidth_gbs)
    end = top / bandwidth_gbs
    parts.append(
        f'<line class="roof" x1="{axes.x(start):.1f}" y1="{axes.y(start * bandwidth_gbs):.1f}" '
        f'x2="{axes.x(end):.1f}" y2="{axes.y(top):.1f}"/>'
    )
    at = start * (end / start) ** 0.5
    parts.append(
        f'<text class="rooflabel" x="{axes.x(at) - 6:.1f}" y="{axes.y(at * bandwidth_gbs) - 10:.1f}" '
        f'text-anchor="end">{bandwidth_gbs:.1f} GB/s</text>'
    )
    last_y = -math.inf
    for name, peak in sorted(peaks.items(), key=lambda item: -item[1]):
        y = axes.y(peak)
        parts.append(
            f'<line class="roof" x1="{axes.x(peak / bandwidth_gbs):.1f}" y1="{y:.1f}" '
            f'x2="{axes.x(right):.1f}" y2="{y:.1f}"/>'
        )
        # Labels stand outside the plot, below each other where roofs are close.
        last_y = max(y + 4, last_y + 15)
        parts.append(
            f'<text class="rooflabel" x="{WIDTH - RIGHT + 8}" y="{last_y:.1f}">'
            f"{escape(name)}: {peak:,.0f} GFLOP/s</text>"
        )
    return parts


def _dots(axes: _Axes, dots: Sequence[OperatorRecord], wall_s: float) -> list[str]:
    parts: list[str] = []
    taken: list[tuple[float, float]] = []
    for index, record in enumerate(dots):
        rate = record.flops / record.seconds * 1e-9
        x, y = axes.x(record.intensity or 1.0), axes.y(rate)
        radius = 4 + 14 * math.sqrt(min(1.0, record.seconds / wall_s))
        share = record.roof_share
        reached = "" if share is None else f", {share:.0%} of the {record.roof} roof"
        title = f"{record.name} ({record.phase}): {time_text(record.seconds)}, {rate:.3g} GFLOP/s{reached}"
        parts.append(
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" '
            f'style="fill:var({COLOURS.get(record.kind, "--series-4")})"><title>{escape(title)}</title></circle>'
        )
        if index >= MAX_LABELS:
            continue
        # To the right of the dot, or to the left where the roofs' labels begin.
        is_left = x > LEFT + 0.7 * (WIDTH - LEFT - RIGHT)
        label_x, label_y = (x - radius - 5 if is_left else x + radius + 5), y + 4
        while any(abs(label_y - other_y) < 13 and abs(label_x - other_x) < 150 for other_x, other_y in taken):
            label_y += 13
        if label_y < HEIGHT - BOTTOM - 2:
            taken.append((label_x, label_y))
            label = f"{record.name} ({record.phase})" if record.phase else record.name
            anchor = "end" if is_left else "start"
            parts.append(
                f'<text class="dotlabel" x="{label_x:.1f}" y="{label_y:.1f}" text-anchor="{anchor}">'
                f"{escape(label[:34])}</text>"
            )
    return parts


def _number(power: int) -> str:
    return f"{10.0**power:,.0f}" if power >= 0 else f"{10.0**power:g}"
