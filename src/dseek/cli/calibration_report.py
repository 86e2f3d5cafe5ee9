"""What `dseek calibrate` says of a calibration: where numbers are not finite, outliers, formats that fit, losses."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from dseek.models.calibration_file import Calibration, TensorStatistics

if TYPE_CHECKING:
    from rich.table import Table

NUM_SHOWN = 8
"""Rows of each list."""


def summary(calibration: Calibration, tensors: tuple[TensorStatistics, ...], error_bound: float) -> dict[str, Any]:
    """Sum up a calibration.

    Args:
        calibration: the calibration.
        tensors: its statistics.
        error_bound: largest relative error for which a format represents a tensor.

    Returns:
        Plain data, as `--json` prints it.
    """
    from dseek.compress.dtype_rule import allowed

    narrowest: dict[str, Counter[str]] = {}
    for entry in tensors:
        fitting = allowed(entry, error_bound)
        name = fitting[0].weight_format if fitting else "none"
        narrowest.setdefault(entry.kind, Counter())[name] += 1
    with_outliers = sorted((e for e in tensors if e.num_outlier_channels), key=lambda e: -e.magnitude)
    cancelling = sorted(
        (e for e in tensors if e.cancellation is not None),
        key=lambda e: -(e.cancellation.median if e.cancellation else 0),
    )
    losses = calibration.losses
    return {
        "num_tokens": calibration.source.num_tokens,
        "num_tensors": len(tensors),
        "not_finite": [
            {"name": e.name, "kind": e.kind, "nan": e.num_nan, "infinite": e.num_infinite, "where": list(e.not_finite)}
            for e in tensors
            if e.num_nan or e.num_infinite
        ],
        "outliers": [
            {
                "name": e.name,
                "kind": e.kind,
                "largest": e.magnitude,
                "rms": e.mean_square**0.5,
                "kurtosis": e.kurtosis,
                "share": e.outlier_share,
                "num_channels": e.num_outlier_channels,
                "channels": list(e.outlier_channels),
            }
            for e in with_outliers
        ],
        "cancellation": [
            {
                "name": e.name,
                "median": e.cancellation.median,
                "percentile_90": e.cancellation.percentile_90,
                "percentile_99": e.cancellation.percentile_99,
            }
            for e in cancelling
            if e.cancellation is not None
        ],
        "error_bound": error_bound,
        "narrowest_format": {kind: dict(counts) for kind, counts in narrowest.items()},
        "losses": {
            name: {
                role: {"sum": sum(v for v in by_layer if v is not None), "measured": sum(losses.measured[name][role])}
                for role, by_layer in roles.items()
            }
            for name, roles in losses.projections.items()
        },
        "cache_losses": dict(losses.caches),
        "table_losses": dict(losses.tables),
    }


def print_report(found: dict[str, Any], path: str) -> None:
    """Print a summary for people.

    Args:
        found: from `summary`.
        path: where the calibration is.
    """
    from rich.console import Console

    console = Console()
    console.print(f"{found['num_tensors']:,} tensors, {found['num_tokens']:,} tokens; kept in {path}")
    for entry in found["not_finite"]:
        console.print(
            f"[bold red]not finite[/]: {entry['name']} ({entry['kind']}): {entry['nan']} NaN, {entry['infinite']} "
            f"infinite; {'; '.join(entry['where'][:3])}"
        )
    if not found["not_finite"]:
        console.print("every number is finite")
    for table in _tables(found):
        if table.row_count:
            console.print(table)


def _tables(found: dict[str, Any]) -> list[Table]:
    from rich.table import Table

    def new(title: str, *columns: str) -> Table:
        table = Table(title=title, title_justify="left")
        for index, name in enumerate(columns):
            table.add_column(name, justify="left" if index == 0 else "right")
        return table

    formats = new(
        f"Narrowest format within a relative error of {found['error_bound']:g}", "tensors", "format", "how many"
    )
    for kind, counts in found["narrowest_format"].items():
        for name, count in sorted(counts.items(), key=lambda item: -item[1]):
            formats.add_row(kind, name, str(count))
    outliers = new("Outlier channels", "tensor", "largest", "rms", "kurtosis", "channels")
    for entry in found["outliers"][:NUM_SHOWN]:
        named = ", ".join(map(str, entry["channels"][:4])) + (", ..." if entry["num_channels"] > 4 else "")
        figures = (f"{entry[name]:.3g}" for name in ("largest", "rms", "kurtosis"))
        outliers.add_row(f"{entry['name']} ({entry['kind']})", *figures, f"{entry['num_channels']}: {named}")
    cancelling = new("Dot products that cancel most: sum |x w| / |sum x w|", "layer", "median", "90 %", "99 %")
    for entry in found["cancellation"][:NUM_SHOWN]:
        figures = (f"{entry[name]:.3g}" for name in ("median", "percentile_90", "percentile_99"))
        cancelling.add_row(entry["name"], *figures)
    losses = new("Loss, nats a token, summed over the layers", "format", "role", "loss", "measured")
    for name, roles in found["losses"].items():
        for role, entry in roles.items():
            losses.add_row(name, role, f"{entry['sum']:.2e}", str(entry["measured"]))
    for what in ("cache", "table"):
        for name, loss in found[f"{what}_losses"].items():
            losses.add_row(name, what, f"{loss:.2e}", "1")
    return [formats, outliers, cancelling, losses]
