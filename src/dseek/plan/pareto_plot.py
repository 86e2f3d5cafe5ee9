"""A front as an SVG file: time over memory, colour for quality, the front joined by a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from dseek.plan.explain import loss_text, size_text
from dseek.plan.pareto import FrontPoint

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 90, 30, 50, 60
LOSSES = ((0.001, "#2a78d6"), (0.005, "#1baf7a"), (0.05, "#eda100"), (math.inf, "#e34948"))
"""Colours of losses up to so much."""


def pareto_svg(points: Sequence[FrontPoint], title: str) -> str:
    """Draw a front.

    Args:
        points: judged points, at least one.
        title: heads the drawing.

    Returns:
        An SVG document.
    """
    xs, ys = [math.log10(point.memory_bytes) for point in points], [math.log10(point.seconds) for point in points]
    x_low, x_high, y_low, y_high = _range(xs) + _range(ys)

    def place(point: FrontPoint) -> tuple[float, float]:
        x = (math.log10(point.memory_bytes) - x_low) / (x_high - x_low)
        y = (math.log10(point.seconds) - y_low) / (y_high - y_low)
        return LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
            f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="#fcfcfb"/>'
            f'<text x="{LEFT}" y="24" font-size="15" fill="#0b0b0b">{escape(title)}</text>'
        )
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = LEFT + share * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
        memory, seconds = 10 ** (x_low + share * (x_high - x_low)), 10 ** (y_low + share * (y_high - y_low))
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" stroke="#e1e0d9"/>')
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#e1e0d9"/>')
        parts.append(_text(x, HEIGHT - BOTTOM + 18, size_text(memory), "middle"))
        parts.append(_text(LEFT - 8, y + 4, f"{seconds:.3g} s", "end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, "memory", "middle"))
    for point in sorted(points, key=lambda point: point.on_front):
        x, y = place(point)
        radius, opacity = (6, 1.0) if point.on_front else (3, 0.35)
        ring = ' stroke="#0b0b0b" stroke-width="2.5"' if point.is_chosen else ' stroke="#fcfcfb"'
        text = f"{point.name}: {point.seconds:.3g} s, {size_text(point.memory_bytes)}, {loss_text(point.quality_loss)}"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius + 2 * point.is_chosen}" '
            f'fill="{_colour(point.quality_loss)}" fill-opacity="{opacity}"{ring}>'
            f"<title>{escape(text)} - {escape(point.why)}</title></circle>"
        )
        if point.is_chosen:
            anchor = "end" if x > WIDTH / 2 else "start"
            parts.append(_text(x + (-12 if anchor == "end" else 12), y - 10, point.name, anchor, "#0b0b0b"))
    low = 0.0
    for index, (high, colour) in enumerate(LOSSES):
        label = f"above {loss_text(low)}" if math.isinf(high) else f"up to {loss_text(high)}"
        x = LEFT + 150 * index
        parts.append(f'<circle cx="{x}" cy="38" r="5" fill="{colour}"/>{_text(x + 10, 42, label + " lost", "start")}')
        low = high
    return "".join(parts) + "</svg>\n"


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#52514e") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = max(0.02, 0.05 * (high - low))
    return low - margin, high + margin


def _colour(loss: float) -> str:
    return next(colour for high, colour in LOSSES if loss <= high + 1e-12)
