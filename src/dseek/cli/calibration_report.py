"""What `dseek calibrate` says of a calibration: where numbers are not finite, outliers, formats that fit, losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dseek.models.calibration_file import Calibration, TensorStatistics
from dseek.models.tensor_names import ROLE_MODULES

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
    from dseek.compress.dtype_rule import FORMATS, allowed, dot_product_bound, projection_noise

    narrowest: dict[str, Counter[str]] = {}
    for entry in tensors:
        fitting = allowed(entry, error_bound)
        name = fitting[0].weight_format if fitting else "none"
        narrowest.setdefault(entry.kind, Counter())[name] += 1
    for inputs, weight, outputs in _projections(tensors):
        within = (name for name in FORMATS if projection_noise(inputs, weight, outputs, name) <= error_bound)
        narrowest.setdefault("projection", Counter())[next(within, "none")] += 1
    num_inputs = {entry.name.removesuffix(".weight"): entry.num_channels for entry in tensors if entry.kind == "weight"}
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
                "bound_bf16": dot_product_bound(
                    e.cancellation.percentile_99, num_inputs.get(e.name, e.num_channels), "bf16", "bf16", probable=True
                ),
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


def _projections(
    tensors: tuple[TensorStatistics, ...],
) -> Iterator[tuple[TensorStatistics, TensorStatistics, TensorStatistics]]:
    """Inputs, weight and outputs of every projection that all three are known of."""
    known = {(entry.name, entry.kind): entry for entry in tensors}
    for entry in tensors:
        if entry.kind != "output":
            continue
        block, _, path = entry.name.rpartition(".layers.")[2].partition(".")
        for role, paths in ROLE_MODULES.items():
            inputs = known.get((f"model.layers.{block}.{role}", "input"))
            weight = known.get((entry.name + ".weight", "weight"))
            if path in paths and inputs is not None and weight is not None:
                yield inputs, weight, entry


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
    cancelling = new(
        "Dot products that cancel most: sum |x w| / |sum x w|",
        "layer",
        "median",
        "90 %",
        "99 %",
        "error in bf16, at 99 %",
    )
    for entry in found["cancellation"][:NUM_SHOWN]:
        columns = ("median", "percentile_90", "percentile_99", "bound_bf16")
        figures = (f"{entry[name]:.3g}" for name in columns)
        cancelling.add_row(entry["name"], *figures)
    losses = new("Loss, nats a token, summed over the layers", "format", "role", "loss", "measured")
    for name, roles in found["losses"].items():
        for role, entry in roles.items():
            losses.add_row(name, role, f"{entry['sum']:.2e}", str(entry["measured"]))
    for what in ("cache", "table"):
        for name, loss in found[f"{what}_losses"].items():
            losses.add_row(name, what, f"{loss:.2e}", "1")
    return [formats, outliers, cancelling, losses]
