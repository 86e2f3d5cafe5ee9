"""A profile as one HTML file: figures, roofline, time by layer, tables and cures. It asks for nothing from outside.

Light and dark follow the reader's system. The drawings are SVG inside the page; a pointer on a mark shows its figures,
which the tables hold as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dseek.profiler.advice import time_text
from dseek.profiler.layer_plot import REST, colour, layer_svg, phases, series
from dseek.profiler.records import OperatorRecord, Profile
from dseek.profiler.roofline_plot import COLOURS, roofline_svg
from dseek.profiler.text_report import cells

MAX_ROWS, MAX_ADVICE = 40, 20

HEADINGS = (
    "operator", "where", "phase", "format", "calls", "time", "of run", "GFLOP", "MB", "GFLOP/s", "GB/s", "of roof",
    "bound by",
)  # fmt: skip

_STYLE = """
:root { color-scheme: light dark; --page: #f9f9f7; --surface: #fcfcfb; --ink: #0b0b0b; --ink-2: #52514e;
  --muted: #898781; --grid: #e1e0d9; --base: #c3c2b7; --edge: rgba(11,11,11,.10);
  --series-1: #2a78d6; --series-2: #1baf7a; --series-3: #eda100; --series-4: #008300; --series-5: #4a3aa7;
  --series-6: #e34948; --series-7: #e87ba4; --series-rest: #b9b7ae; }
@media (prefers-color-scheme: dark) { :root { --page: #0d0d0d; --surface: #1a1a19; --ink: #ffffff; --ink-2: #c3c2b7;
  --muted: #898781; --grid: #2c2c2a; --base: #383835; --edge: rgba(255,255,255,.10);
  --series-1: #3987e5; --series-2: #199e70; --series-3: #c98500; --series-4: #008300; --series-5: #9085e9;
  --series-6: #e66767; --series-7: #d55181; --series-rest: #5c5b56; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 32px 24px 64px; background: var(--page); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 960px; margin: 0 auto; }
h1 { font-size: 22px; line-height: 1.3; margin: 0 0 4px; } h2 { font-size: 16px; margin: 0 0 12px; }
p { margin: 0 0 8px; color: var(--ink-2); }
section { background: var(--surface); border: 1px solid var(--edge); border-radius: 10px; padding: 20px;
  margin-top: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 20px; }
.tile { background: var(--surface); border: 1px solid var(--edge); border-radius: 10px; padding: 14px 16px; }
.tile b { display: block; font-size: 24px; font-weight: 600; line-height: 1.2; } .tile span { color: var(--ink-2); }
svg { width: 100%; height: auto; display: block; font: 11px system-ui, sans-serif; }
.grid { stroke: var(--grid); stroke-width: 1; } .base { stroke: var(--base); stroke-width: 1; }
.tick, .axis { fill: var(--muted); } .roof { stroke: var(--ink-2); stroke-width: 1.5; }
.rooflabel { fill: var(--ink-2); } .dot { stroke: var(--surface); stroke-width: 2; fill-opacity: .9; }
.dotlabel { fill: var(--ink); paint-order: stroke; stroke: var(--surface); stroke-width: 3px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0 0 10px; padding: 0; list-style: none;
  color: var(--ink-2); }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 12.5px; }
th { text-align: left; color: var(--ink-2); font-weight: 500; } th, td { padding: 5px 6px; white-space: nowrap;
  border-bottom: 1px solid var(--grid); } td:nth-child(n+5), th:nth-child(n+5) { text-align: right;
  font-variant-numeric: tabular-nums; } td:last-child, th:last-child { text-align: left; }
ol, ul.plain { margin: 0; padding-left: 20px; } li { margin: 2px 0; }
h3 { font-size: 13px; font-weight: 500; color: var(--ink-2); margin: 14px 0 4px; }
"""


def html_report(profile: Profile) -> str:
    """Write the report.

    Args:
        profile: what to report.

    Returns:
        A whole HTML document.
    """
    title = escape(profile.title or "Profile")
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main>",
        f"<h1>{title}</h1><p>{escape(profile.machine)}; threads: {profile.num_threads}</p>",
        _tiles(profile),
        _advice(profile),
        _roofline(profile),
        _layers(profile),
        _table("Operators, all layers together", profile.by_name()[:MAX_ROWS], profile.wall_s),
        _table("The hottest operators, each in its place", profile.operators[:MAX_ROWS], profile.wall_s),
        _notes(profile),
        "</main></body></html>\n",
    ]
    return "".join(parts)


def _tiles(profile: Profile) -> str:
    limited = [record for record in profile.operators if record.least_s is not None]
    least = sum(record.least_s or 0.0 for record in limited)
    figures = [
        (time_text(profile.wall_s), "time of the run"),
        (f"{profile.flops / profile.wall_s * 1e-9:,.1f} GFLOP/s", f"{profile.flops * 1e-9:,.3g} GFLOP"),
        (f"{profile.num_bytes / profile.wall_s * 1e-9:,.1f} GB/s", f"{profile.num_bytes * 1e-9:,.3g} GB moved"),
    ]
    if limited:
        figures.append((f"{least / profile.wall_s:.0%}", "of the roofline, all in all"))
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in figures
    )
    return f'<div class="tiles">{tiles}</div>'


def _advice(profile: Profile) -> str:
    if not profile.advice:
        return ""
    items = "".join(f"<li>{escape(advice.text)}</li>" for advice in profile.advice[:MAX_ADVICE])
    return f"<section><h2>What would help</h2><p>Priced by this machine's measured rates.</p><ol>{items}</ol></section>"


def _roofline(profile: Profile) -> str:
    drawing = roofline_svg(profile)
    if not drawing:
        return ""
    kinds = dict.fromkeys(record.kind for record in profile.by_name() if record.intensity is not None)
    names = {"linear": "products with weights", "attention": "attention", "memory": "norms, copies", "other": "other"}
    items = _legend([(names[kind], COLOURS[kind]) for kind in COLOURS if kind in kinds])
    text = "Each dot is an operator over all layers, larger the longer it took; the lines are what was measured here."
    return f"<section><h2>Roofline</h2><p>{text}</p>{items}{drawing}</section>"


def _layers(profile: Profile) -> str:
    shown = phases(profile)
    if not shown:
        return ""
    names = series(profile)
    items = _legend([(name, colour(names, name)) for name in [*names, REST]])
    drawings = "".join(f"<h3>{escape(phase)}</h3>{layer_svg(profile, phase)}" for phase in shown)
    return f"<section><h2>Time by layer</h2>{items}{drawings}</section>"


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<li><i style="background:var({variable})"></i>{escape(name)}</li>' for name, variable in entries)
    return f'<ul class="legend">{items}</ul>'


def _table(title: str, records: Sequence[OperatorRecord], wall_s: float) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(record, wall_s)) + "</tr>" for record in records
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<section><h2>{title}</h2><div class="scroll">{table}</div></section>'


def _notes(profile: Profile) -> str:
    if not profile.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in profile.notes)
    return f'<section><h2>Notes</h2><ul class="plain">{items}</ul></section>'
