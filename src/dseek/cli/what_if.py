"""`dseek plan CONFIG --machine FILE`: what a model would do on a machine that is described, from `config.json` alone.

And `--pareto`, the front of time, memory and quality, for a described machine or for this one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dseek.cli.precision_options import precision_from
from dseek.core.errors import ConfigError
from dseek.core.logs import get_logger

if TYPE_CHECKING:
    from rich.console import Console

    from dseek.plan.devices import DeviceMachine
    from dseek.plan.outline import Outline
    from dseek.plan.pareto import FrontPoint
    from dseek.plan.training_memory import TrainingMemory
    from dseek.plan.what_if import Point

DEFAULT_CONTEXT = 2048
_IDLE = ("threads", "calibration", "prompt_tokens", "answer_tokens", "attention", "attention_window", "rope_scaling")
"""Options of `dseek plan` that a described machine does not know."""

MAX_SHOWN = 24
"""Rows of a table."""


def add_what_if_options(parser: argparse.ArgumentParser) -> None:
    """Add --machine, --train, --devices, --pareto and --plot.

    Args:
        parser: the verb's parser.
    """
    group = parser.add_argument_group("other machines, and the whole space")
    group.add_argument(
        "--machine",
        metavar="FILE",
        help="plan for a machine that is described: a JSON or TOML file, or a name such as a100x8 (MODEL may then be a "
        "config.json, or a name such as deepseek-v3); `this` is this one",
    )
    group.add_argument("--train", action="store_true", help="with --machine: the memory of training, way by way")
    group.add_argument("--devices", type=int, metavar="N", help="with --train: devices (default: the machine's)")
    group.add_argument(
        "--pareto", action="store_true", help="show what cannot be bettered in time, memory and quality together"
    )
    group.add_argument("--plot", metavar="FILE", help="with --pareto: draw the front, as SVG")


def check_what_if(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect.

    Args:
        args: parsed arguments.

    Raises:
        ConfigError: one of them needs another.
    """
    if args.plot and not args.pareto:
        raise ConfigError("--plot draws a front", needed="--pareto beside it")
    if args.machine is None and (args.train or args.devices is not None):
        raise ConfigError("--train and --devices are about a described machine", needed="--machine FILE")
    if args.devices is not None and not args.train:
        raise ConfigError("--devices is about training", needed="--train beside it")
    for option in ("save", "show_attention"):
        if getattr(args, option) is not None and (args.machine is not None or args.pareto):
            raise ConfigError(
                f"--{option.replace('_', '-')} beside --machine or --pareto, which make no plan that runs",
                remedy="leave it out, or plan without them",
            )
    if args.train and args.pareto:
        raise ConfigError("--train and --pareto are two different tables", remedy="ask for one of them")


def run_what_if(args: argparse.Namespace) -> int:
    """Plan for a described machine and print.

    Args:
        args: parsed arguments, with `machine`.

    Returns:
        0.

    Raises:
        DseekError: the configuration or the machine cannot be read, or nothing fits.
    """
    from dseek.plan import what_if
    from dseek.plan.outline import read_outline

    idle = [name for name in _IDLE if getattr(args, name) is not None]
    if args.objective != "latency":
        idle.append("objective")
    if idle:
        flags = ", ".join("--" + name.replace("_", "-") for name in idle)
        get_logger(__name__).warning("%s: without effect on a plan for a described machine", flags)
    outline, machine = read_outline(args.model), _machine(args.machine)
    if args.train:
        return _train(args, outline, machine)
    context = args.context or DEFAULT_CONTEXT
    if context > outline.max_position_embeddings:
        raise ConfigError(f"a context of {context} tokens", needed=f"at most {outline.max_position_embeddings}")
    batches = (args.batch,) if args.batch else what_if.BATCHES
    wanted = precision_from(args)
    precisions: tuple[str, ...] = tuple(what_if.WEIGHT_BITS) if args.pareto else ("bf16",)
    if wanted["precision"] not in (None, "auto"):
        precisions = (wanted["precision"],)
    caches: tuple[str, ...] = tuple(what_if.CACHE_BYTES) if args.pareto else ("bf16",)
    if wanted["cache_dtype"] is not None:
        caches = (wanted["cache_dtype"],)
    points = what_if.search(
        outline, machine, context_tokens=context, batches=batches, precisions=precisions, cache_dtypes=caches
    )
    if args.pareto:
        return show_front(args, _judged(args, points, machine), f"{outline.name} on {machine.name}, seconds a token")
    rows = what_if.best_by_batch(points) if not args.batch else sorted(points, key=lambda point: point.token_s)
    chosen = what_if.best(points)
    if args.json:
        print(json.dumps(_plain(outline, machine, rows[:MAX_SHOWN], chosen, context)))
        return 0
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    _head(console, outline, machine, context)
    _table(console, rows[:MAX_SHOWN], chosen)
    console.print(
        f"least time a token: {chosen.batch} sequences at a time, {chosen.split.text()}: "
        f"{1e3 * chosen.token_s:.3g} ms a token, {chosen.tokens_s:,.0f} tokens/s",
        highlight=False,
    )
    return 0


def show_front(args: argparse.Namespace, points: Sequence[FrontPoint], title: str) -> int:
    """Print a front and draw it where that was asked for.

    Args:
        args: parsed arguments, with `json` and `plot`.
        points: judged.
        title: what it is of.

    Returns:
        0.

    Raises:
        ConfigError: the drawing cannot be written.
    """
    from dseek.core.files import atomic_write_text
    from dseek.plan.explain import loss_text, size_text

    if args.plot:
        from dseek.plan.pareto_plot import pareto_svg

        try:
            atomic_write_text(args.plot, pareto_svg(points, title))
        except OSError as error:
            raise ConfigError(f"the front cannot be drawn to {args.plot}: {error.strerror or error}") from None
    if args.json:
        print(json.dumps({"title": title, "points": [dataclasses.asdict(point) for point in points]}))
        return 0
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    front = [point for point in points if point.on_front]
    shown = front if len(front) <= MAX_SHOWN else front[:: -(-len(front) // MAX_SHOWN)]
    shown = [point for point in front if point in shown or point.is_chosen]
    table = Table(title=f"{title}: {len(front)} of {len(points)} cannot be bettered", title_justify="left")
    for name in ("way", "seconds", "memory", "quality loss", "why"):
        table.add_column(name, justify="left" if name in ("way", "why") else "right")
    for point in shown:
        table.add_row(
            escape(point.name),
            f"{point.seconds:.4g}",
            size_text(point.memory_bytes),
            loss_text(point.quality_loss),
            escape(point.why),
            style="bold" if point.is_chosen else None,
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if not any(point.is_chosen for point in points):
        raise ConfigError(
            "nothing on the front is allowed", remedy="accept more with --max-quality-loss, or allow more memory"
        )
    return 0


def _machine(where: str) -> DeviceMachine:
    from dseek.plan.devices import from_measured, load_machine

    if where == "this" and not Path(where).exists():
        from dseek.cli.measuring import measured_machine

        return from_measured(measured_machine())
    return load_machine(where)


def _judged(args: argparse.Namespace, points: Sequence[Point], machine: DeviceMachine) -> list[FrontPoint]:
    from dseek.plan.objective import DEFAULT_QUALITY_LOSS
    from dseek.plan.pareto import judge
    from dseek.plan.what_if import MEMORY_SHARE

    loss = DEFAULT_QUALITY_LOSS if args.max_quality_loss is None else args.max_quality_loss
    entries = [
        (
            f"{point.precision}, cache {point.cache_dtype}, batch {point.batch}, {point.split.text()}",
            point.token_s,
            point.memory_bytes,
            point.quality_loss,
        )
        for point in points
    ]
    limit = args.memory_limit or MEMORY_SHARE * machine.device.memory_bytes
    return judge(entries, memory_limit_bytes=limit, max_quality_loss=loss)


def _plain(
    outline: Outline, machine: DeviceMachine, rows: Sequence[Point], chosen: Point, context: int
) -> dict[str, Any]:
    def plain(point: Point) -> dict[str, Any]:
        return {**dataclasses.asdict(point), "memory_bytes": point.memory_bytes, "tokens_s": point.tokens_s}

    return {
        "model": outline.name,
        "machine": machine.name,
        "source": machine.source,
        "num_parameters": outline.num_parameters(),
        "num_active_parameters": outline.num_parameters(active=True),
        "training_flops_per_token": outline.training_flops_per_token(context),
        "context_tokens": context,
        "best": plain(chosen),
        "points": [plain(point) for point in rows],
    }


def _head(console: Console, outline: Outline, machine: DeviceMachine, context: int) -> None:
    active = outline.num_parameters(active=True)
    cache = 2 * outline.cache_elements_per_token()
    sizes = f"{outline.num_parameters() / 1e9:.4g}B parameters, {active / 1e9:.4g}B of them for a token"
    lines = (
        f"{outline.name}: {sizes}, {2 * active / 1e9:.4g} GFLOP a token without attention",
        f"cache of {cache / 1e3:.4g} kB a token in bf16",
        f"on {machine.name}: {machine.source}",
        f"estimates, for {context} tokens of context a sequence; nothing of this was measured",
    )
    for line in lines:
        console.print(line, highlight=False)


def _table(console: Console, rows: Sequence[Point], chosen: Point) -> None:
    from rich.table import Table

    from dseek.plan.explain import size_text

    table = Table(title="Decode", title_justify="left")
    for name in ("batch", "split", "weights", "ms a step", "of it links", "ms a token", "tokens/s", "memory a device"):
        table.add_column(name, justify="left" if name == "split" else "right")
    table.add_column("prompt, s", justify="right")
    for point in rows:
        table.add_row(
            str(point.batch),
            point.split.text(),
            point.precision,
            f"{1e3 * point.step_s:.3g}",
            f"{point.communication_s / point.step_s:.0%}",
            f"{1e3 * point.token_s:.3g}",
            f"{point.tokens_s:,.0f}",
            size_text(point.memory_bytes),
            f"{point.prompt_s:.3g}",
            style="bold" if point == chosen else None,
        )
    console.print(table)


def _train(args: argparse.Namespace, outline: Outline, machine: DeviceMachine) -> int:
    from dseek.plan import training_memory

    devices = machine.num_devices if args.devices is None else args.devices
    sequence = args.context or min(DEFAULT_CONTEXT, outline.max_position_embeddings)
    rows = training_memory.table(outline, machine, num_devices=devices, batch=args.batch or 1, sequence_tokens=sequence)
    if args.json:
        plain = [{**dataclasses.asdict(row), "device_bytes": row.device_bytes} for row in rows]
        print(json.dumps({"model": outline.name, "num_devices": devices, "ways": plain}))
        return 0
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(
        f"{outline.name}, {outline.num_parameters() / 1e9:.4g}B parameters P, N = {devices} x {machine.device.name}; "
        f"{args.batch or 1} sequences of {sequence} tokens a device, recomputed layer by layer",
        highlight=False,
    )
    console.print(_train_table(rows))
    for line in training_memory.FORMULAS:
        console.print(line, highlight=False)
    return 0


def _train_table(rows: Sequence[TrainingMemory]) -> Any:
    from rich.table import Table

    from dseek.plan.explain import size_text

    table = Table(title="Memory of a device", title_justify="left")
    for name in ("ZeRO", "offload", "tiles", "weights", "gradients", "optimiser", "activations", "working", "together"):
        table.add_column(name, justify="right")
    for name in ("pinned host", "transfer, s a step", "fits"):
        table.add_column(name, justify="right")
    for row in rows:
        parts = (row.weights_bytes, row.gradients_bytes, row.optimizer_bytes, row.activations_bytes, row.working_bytes)
        table.add_row(
            str(row.stage),
            row.offload,
            str(row.tiles),
            *map(size_text, parts),
            size_text(row.device_bytes),
            size_text(row.host_bytes),
            f"{row.transfer_s:.3g}",
            "yes" if row.fits else "no",
        )
    return table
