"""A calibration as a picture: magnitudes of weights and inputs by layer, outliers, and losses by layer and role."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from dseek.core.errors import ConfigError
from dseek.models.calibration_file import Calibration, TensorStatistics
from dseek.models.tensor_names import ROLE_MODULES


def check_plotting() -> None:
    """Make sure that something can be drawn.

    Raises:
        ConfigError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--picture needs matplotlib", remedy="pip install 'dseek[plot]', or leave it out")


def draw_calibration(calibration: Calibration, tensors: tuple[TensorStatistics, ...], path: str) -> None:
    """Draw a calibration.

    Args:
        calibration: the calibration.
        tensors: its statistics.
        path: the PNG file, replaced as a whole.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    check_plotting()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _histograms(axes[0][0], [entry for entry in tensors if entry.kind == "weight"], "weights")
    _histograms(axes[0][1], [entry for entry in tensors if entry.kind == "input"], "inputs of projections")
    _ranges(axes[1][0], tensors, calibration.num_layers)
    _losses(axes[1][1], calibration)
    figure.suptitle(f"Calibration over {calibration.source.num_tokens:,} tokens")
    target = Path(path)
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(part, format="png")
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"the picture cannot be written to {path}: {error.strerror or error}") from None


def _histograms(axes: Any, entries: list[TensorStatistics], title: str) -> None:
    """Share of the values in each power of two, all tensors of a kind together."""
    counts: dict[int, int] = {}
    for entry in entries:
        for index, count in enumerate(entry.histogram.counts):
            exponent = entry.histogram.first_exponent + index
            counts[exponent] = counts.get(exponent, 0) + count
    total = max(1, sum(counts.values()))
    exponents = sorted(counts)
    axes.bar(exponents, [counts[exponent] / total for exponent in exponents], width=0.9)
    axes.set_yscale("log")
    axes.set_title(f"Magnitudes of {title}")
    axes.set_xlabel("power of two")
    axes.set_ylabel("share of the values")
    for where, name in ((-14, "least normal fp16"), (16, "above fp16")):
        if exponents and exponents[0] <= where <= exponents[-1] + 1:
            axes.axvline(where, color="red", linewidth=0.8)
            axes.annotate(name, (where, 1), fontsize=7, color="red", rotation=90, va="top")


def _ranges(axes: Any, tensors: tuple[TensorStatistics, ...], num_layers: int) -> None:
    """Largest magnitude over the root mean square of each role's inputs, by layer."""
    known = {entry.name: entry for entry in tensors if entry.kind == "input"}
    for role in ROLE_MODULES:
        places = [(layer, known.get(f"model.layers.{layer}.{role}")) for layer in range(num_layers)]
        points = [
            (layer, e.magnitude / e.mean_square**0.5) for layer, e in places if e is not None and e.mean_square > 0
        ]
        axes.plot([layer for layer, _ in points], [ratio for _, ratio in points], marker=".", label=role)
    axes.set_yscale("log")
    axes.set_title("Largest input over the root mean square")
    axes.set_xlabel("layer")
    axes.legend(fontsize=8)


def _losses(axes: Any, calibration: Calibration) -> None:
    """Losses by layer, a line for each role, of the format that loses most."""
    projections = calibration.losses.projections
    axes.set_xlabel("layer")
    if not projections:
        axes.set_title("Losses were not looked for")
        return
    worst = max(projections, key=lambda name: sum(v or 0.0 for values in projections[name].values() for v in values))
    for role, by_layer in projections[worst].items():
        axes.plot(
            range(calibration.num_layers), [max(value or 0.0, 1e-9) for value in by_layer], marker=".", label=role
        )
    axes.set_yscale("log")
    axes.set_title(f"Loss in {worst}, nats a token")
    axes.legend(fontsize=8)
