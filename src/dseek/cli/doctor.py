"""`dseek doctor`: what this machine is and what it was measured to do."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dseek.cli.options import add_json

if TYPE_CHECKING:
    from rich.table import Table

    from dseek.hardware.machine import Machine

HELP = "measure this machine and show what it can do"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments.

    Args:
        parser: the verb's parser.
    """
    parser.add_argument("--refresh", action="store_true", help="measure again, though there are kept measurements")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure or read the kept measurements, and print them.

    Args:
        args: parsed arguments.

    Returns:
        0.

    Raises:
        ConfigError: nothing can be measured here.
    """
    from dseek.cli.measuring import measured_machine

    machine = measured_machine(refresh=args.refresh)
    if args.json:
        print(machine.to_json())
        return 0
    from rich.console import Console

    console = Console()
    console.print(_about(machine))
    for table in (_products(machine), _linears(machine), _attention(machine)):
        if table.row_count:
            console.print(table)
    return 0


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right")
    return table


def _about(machine: Machine) -> Table:
    from rich.table import Table

    from dseek.plan.explain import size_text

    table = Table(title="This machine", title_justify="left", show_header=False)
    caches = ", ".join(f"L{cache.level} {size_text(cache.num_bytes)}" for cache in machine.caches)
    devices = ", ".join(f"{device.name} ({device.kind})" for device in machine.accelerators)
    bandwidth = "; ".join(f"{entry.gbs:.0f} GB/s over {size_text(entry.num_bytes)}" for entry in machine.bandwidths)
    rows = (
        ("processor", machine.cpu_name),
        ("instruction sets", " ".join(machine.features) or "none that matter"),
        ("kernels", machine.kernel_variant),
        ("cores, threads used", f"{machine.num_cores}, {machine.num_threads}"),
        ("caches", caches or "unknown"),
        ("memory", f"{size_text(machine.memory_bytes)}, {size_text(machine.memory_limit_bytes)} usable"),
        ("accelerators", devices or "none"),
        ("read bandwidth", bandwidth),
        ("other load", f"{machine.other_load:.2f} processors while this was measured"),
        ("machine id", machine.machine_id),
    )
    for name, value in rows:
        table.add_row(name, value)
    return table


def _products(machine: Machine) -> Table:
    """GEMM rates of PyTorch, dtype by shape class."""
    classes = ("matvec", "thin", "square")
    table = _table("Matrix products in PyTorch, GFLOP/s (GOP/s)", "dtype", *classes)
    rates = {(rate.dtype, rate.shape_class): rate.gflops for rate in machine.gemm}
    for dtype in dict.fromkeys(rate.dtype for rate in machine.gemm):
        table.add_row(dtype, *(f"{rates.get((dtype, name), 0.0):,.0f}" for name in classes))
    return table


def _linears(machine: Machine) -> Table:
    """Rates of the native linear layers: one row in GB/s of weights with its share of the limit, many in GFLOP/s."""
    from dseek.plan.formats import packed_bytes

    table = _table(
        "Linear layers in dseek's kernels", "weights", "shape", "1 row, GB/s", "of the limit", "32 rows, GOP/s", "512"
    )
    for curve in machine.linears:
        if curve.kernels != "native" or curve.num_rows[-1] < 512:
            continue
        num_bytes = packed_bytes(curve.weight_format, curve.num_outputs, curve.num_inputs)
        gbs = num_bytes / curve.seconds[0] * 1e-9
        times = dict(zip(curve.num_rows, curve.seconds, strict=True))
        work = 2e-9 * curve.num_outputs * curve.num_inputs
        table.add_row(
            curve.weight_format,
            f"{curve.num_outputs} x {curve.num_inputs}",
            f"{gbs:.0f}",
            f"{100 * gbs / machine.read_bandwidth_gbs:.0f} %",
            *(f"{work * rows / times[rows]:,.0f}" if rows in times else "" for rows in (32, 512)),
        )
    return table


def _attention(machine: Machine) -> Table:
    """Attention: microseconds a decode step and layer, GFLOP/s of prefill."""
    table = _table("Attention, one layer", "kernels", "cache", "heads", "rows", "context", "time, us", "GFLOP/s")
    for curve in machine.attentions:
        for context, seconds in zip(curve.contexts, curve.seconds, strict=True):
            pairs = curve.num_rows * (context - curve.num_rows) + curve.num_rows * (curve.num_rows + 1) // 2
            gflops = 4e-9 * pairs * curve.num_heads * curve.head_dim / seconds
            table.add_row(
                curve.kernels,
                curve.cache_dtype,
                f"{curve.num_heads}/{curve.num_kv_heads} of {curve.head_dim}",
                str(curve.num_rows),
                str(context),
                f"{1e6 * seconds:,.0f}",
                f"{gflops:,.0f}",
            )
    return table
