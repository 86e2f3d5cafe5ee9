"""A profile for the terminal: the hot operators, the layers, and what would help."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dseek.profiler.advice import time_text
from dseek.profiler.records import OperatorRecord, Profile

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MAX_ADVICE = 8


def print_report(profile: Profile, console: Console, *, top: int) -> None:
    """Print a profile.

    Args:
        profile: what to print.
        console: where to.
        top: rows of each table at most.
    """
    from rich.markup import escape

    rates = (
        f"{profile.flops / profile.wall_s * 1e-9:,.1f} GFLOP/s, {profile.num_bytes / profile.wall_s * 1e-9:,.1f} GB/s"
    )
    console.print(
        f"[bold]{escape(profile.title)}[/bold]: {time_text(profile.wall_s)}, {rates} on {escape(profile.machine)}"
    )
    if profile.roofs is not None:
        peaks = ", ".join(f"{name} {rate:,.0f}" for name, rate in sorted(profile.roofs.peaks_gflops.items()))
        console.print(f"roofs: {profile.roofs.bandwidth_gbs:.1f} GB/s; GFLOP/s: {peaks}")
    console.print(_table(profile, profile.by_name()[:top], "Operators, all layers together"))
    console.print(_table(profile, profile.operators[:top], "The hottest operators, each in its place"))
    layers = profile.by_layer()
    if layers:
        slowest = sorted(layers, key=lambda record: -record.seconds)[:top]
        console.print(_table(profile, slowest, f"Layers (the slowest of {len(layers)})"))
    for advice in profile.advice[:MAX_ADVICE]:
        console.print(f"- {escape(advice.text)}", highlight=False)
    if len(profile.advice) > MAX_ADVICE:
        console.print(f"- and {len(profile.advice) - MAX_ADVICE} more (--json and --html have all)")
    for note in profile.notes:
        console.print(f"note: {escape(note)}", highlight=False)


def _table(profile: Profile, records: tuple[OperatorRecord, ...] | list[OperatorRecord], title: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("operator", "where", "phase", "format"):
        table.add_column(name, overflow="fold")
    for name in ("calls", "time", "of run", "GFLOP", "MB", "GFLOP/s", "GB/s", "of roof"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bound by")
    for record in records:
        table.add_row(*map(escape, cells(record, profile.wall_s)))
    return table


def cells(record: OperatorRecord, wall_s: float) -> tuple[str, ...]:
    """Write one operator as the cells of a table.

    Args:
        record: the operator.
        wall_s: time of the run.

    Returns:
        Operator, where, phase, format, calls, time, share of the run, 10^9 operations, 10^6 bytes, their rates, share
        of the roof and which one it is; a dash where something is not known.
    """
    share = record.roof_share
    known = record.seconds > 0
    return (
        record.name,
        record.place,
        record.phase,
        record.dtype or "-",
        str(record.calls),
        time_text(record.seconds),
        f"{record.seconds / wall_s:.1%}",
        f"{record.flops * 1e-9:.3g}" if record.flops else "-",
        f"{record.num_bytes * 1e-6:.3g}" if record.num_bytes else "-",
        f"{record.flops / record.seconds * 1e-9:.3g}" if record.flops and known else "-",
        f"{record.num_bytes / record.seconds * 1e-9:.3g}" if record.num_bytes and known else "-",
        "-" if share is None else f"{share:.0%}",
        record.roof or "-",
    )
