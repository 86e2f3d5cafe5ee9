"""Time by layer as an inline SVG: a stacked bar a layer, a colour an operator, one drawing a phase."""

from __future__ import annotations

from collections import defaultdict
from html import escape

from dseek.profiler.advice import time_text
from dseek.profiler.records import Profile

WIDTH, HEIGHT = 860, 220
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 34
NUM_SERIES = 7
"""Operators with a colour of their own; the others share one."""

REST = "everything else"


def phases(profile: Profile) -> list[str]:
    """List the phases that have layers, the longest first.

    Args:
        profile: the profile.
    """
    totals: dict[str, float] = defaultdict(float)
    for record in profile.operators:
        if record.layer is not None:
            totals[record.phase] += record.seconds
    return sorted(totals, key=lambda phase: -totals[phase])


def series(profile: Profile) -> list[str]:
    """List the operators that have a colour of their own, the longest in all layers first; the same in all phases.

    Args:
        profile: the profile.
    """
    totals: dict[str, float] = defaultdict(float)
    for record in profile.operators:
        if record.layer is not None and record.name != "wait":
            totals[record.name] += record.seconds
    return sorted(totals, key=lambda name: -totals[name])[:NUM_SERIES]


def layer_svg(profile: Profile, phase: str) -> str:
    """Draw one phase.

    Args:
        profile: the profile.
        phase: one of `phases`.

    Returns:
        An `<svg>` element.
    """
    names = series(profile)
    layers: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for record in profile.operators:
        if record.layer is not None and record.phase == phase:
            layers[record.layer][record.name if record.name in names else REST] += record.seconds
    highest = max(sum(parts.values()) for parts in layers.values())
    count = max(layers) + 1
    step = (WIDTH - LEFT - RIGHT) / count
    scale = (HEIGHT - TOP - BOTTOM) / highest
    bottom = HEIGHT - BOTTOM
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Time by layer, {escape(phase)}">']
    for share in (0.25, 0.5, 0.75, 1.0):
        y = bottom - share * highest * scale
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{time_text(share * highest)}</text>'
        )
    every = max(1, -(-count // 24))
    for layer in sorted(layers):
        x, y = LEFT + layer * step, float(bottom)
        for name in [*names, REST]:
            seconds = layers[layer].get(name, 0.0)
            height = seconds * scale
            if height <= 0:
                continue
            y -= height
            title = f"layer {layer}, {name}: {time_text(seconds)}"
            # A gap of one between parts, in the page's colour, keeps neighbours apart.
            parts.append(
                f'<rect x="{x + 0.12 * step:.1f}" y="{y:.2f}" width="{0.76 * step:.1f}" '
                f'height="{max(0.0, height - 1):.2f}" '
                f'style="fill:var({colour(names, name)})"><title>{escape(title)}</title></rect>'
            )
        if layer % every == 0:
            parts.append(
                f'<text class="tick" x="{x + step / 2:.1f}" y="{bottom + 16}" text-anchor="middle">{layer}</text>'
            )
    parts.append(f'<line class="base" x1="{LEFT}" y1="{bottom}" x2="{WIDTH - RIGHT}" y2="{bottom}"/></svg>')
    return "".join(parts)


def colour(names: list[str], name: str) -> str:
    """Return the CSS variable of an operator's colour.

    Args:
        names: from `series`.
        name: the operator.
    """
    return f"--series-{names.index(name) + 1}" if name in names else "--series-rest"
