"""`dseek train CONFIG`: pretrain or fine-tune a model as a TOML file says.

On one process, on those that torchrun started, or with `--nproc-per-node` on as many as that, kept alive by the
supervisor.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dseek.cli.options import add_json
from dseek.core.errors import ConfigError

if TYPE_CHECKING:
    from dseek.plan.training import TrainingChoice
    from dseek.train.config import TrainConfig
    from dseek.train.run import Ready
    from dseek.train.trainer import Trainer

HELP = "pretrain or fine-tune a model as a TOML file says"

STOPPED = 130
"""Exit status of a training that was asked to stop, saved its state, and can go on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments.

    Args:
        parser: the verb's parser.
    """
    parser.add_argument("config", metavar="CONFIG", help="a TOML file; recipes/ has some, docs/training.md every key")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of the file, such as max_steps=100 or data.max_length=512; may be given several times",
    )
    parser.add_argument(
        "--nproc-per-node",
        type=int,
        metavar="N",
        help="start N ranks on this host and keep them alive: where one is lost, all start again from the newest "
        "snapshot or checkpoint",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        metavar="M",
        help="with --nproc-per-node: restarts in a row without a new step, after which to give up (default 3)",
    )
    parser.add_argument(
        "--hang-timeout",
        type=float,
        metavar="SECONDS",
        help="with --nproc-per-node: a rank that shows no progress for so long is lost (default: 60, or ten times the "
        "longest wait so far, if that is more)",
    )
    parser.add_argument(
        "--inject-fault",
        action="append",
        default=[],
        metavar="KIND:RANK@STEP",
        help="let a rank fail when STEP steps are done, to see a recovery: kill, stop, exit, or slow (with :SECONDS "
        "behind it); strikes at the first start alone; may be given several times",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what is decided and the memory expected, and end")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Train; a stopped training goes on when it is started again.

    Args:
        args: parsed arguments.

    Returns:
        The exit status: 0 done, 130 stopped and saved.

    Raises:
        DseekError: the configuration, the model, a file or the memory is not what is needed.
    """
    from dseek.train import faults
    from dseek.train.config import load_config

    config = load_config(args.config, args.set)
    given = [faults.parse(text) for text in args.inject_fault]
    for fault in given:
        if fault.kind in faults.KINDS_OF_FILES:
            raise ConfigError(
                f"--inject-fault {fault}", needed="a fault that needs no files: kill, stop, exit, slow or cut"
            )
    if args.nproc_per_node is not None:
        from dseek.cli.train_supervised import run_supervised

        return run_supervised(args, config, given)
    for name in ("max_restarts", "hang_timeout"):
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} without --nproc-per-node", needed="both, or neither", remedy="torchrun has its own"
            )
    if config.method == "gate":
        return _train_gate(config)

    from dseek.cli.train_progress import shown_training
    from dseek.train.run import ready, train

    with ready(config) as training:
        if args.dry_run:
            if training.processes.is_first:
                _show_plan(training, as_json=args.json)
            return 0
        with shown_training(training) as listener, _stopping() as on_ready:
            result = train(training, listener, on_ready=on_ready, faults=given)
        if not training.processes.is_first:
            return STOPPED if result.was_stopped else 0
        predicted = training.choice.memory.peak_bytes
        if args.json:
            shown = dataclasses.asdict(result) | {"predicted_peak_bytes": predicted}
            print(json.dumps(shown | {"output_dir": str(result.output_dir)}, indent=1))
        elif result.was_stopped:
            print(f"{result.output_dir}: stopped after step {result.global_step} of {result.num_steps}, and saved")
        else:
            print(result.output_dir)
        if not args.json:
            from dseek.plan.explain import size_text

            print(
                f"peak memory {size_text(result.peak_bytes)}, predicted {size_text(predicted)} "
                f"({predicted / max(1, result.peak_bytes) - 1:+.0%})",
                file=sys.stderr,
            )
        return STOPPED if result.was_stopped else 0


@contextmanager
def _stopping() -> Iterator[Callable[[Trainer], None]]:
    """Let Ctrl-C and SIGTERM end the training after the step under way; a second Ctrl-C ends it at once."""
    trainers: list[Trainer] = []

    def stop(number: int, _: object) -> None:
        if not trainers or trainers[0].stop_wanted:
            raise KeyboardInterrupt
        # The signal may come while a line is being printed, and print cannot begin inside of itself.
        os.write(2, b"dseek: stopping after this step (again: at once, nothing saved)\n")
        trainers[0].stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield trainers.append
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_plan(training: Ready, *, as_json: bool) -> None:
    from dseek.core.config import to_plain
    from dseek.plan.explain import size_text

    choice = training.choice
    if as_json:
        print(json.dumps(to_plain(choice), indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Training of {training.config.model}", title_justify="left", show_header=False)
    for name, value in _plan_rows(training.config, choice):
        table.add_row(name, value)
    console = Console()
    console.print(table)
    for what, peak in choice.rejected[:6]:
        console.print(f"not {what}: {size_text(peak)}")


def _plan_rows(config: TrainConfig, choice: TrainingChoice) -> list[tuple[str, str]]:
    from dseek.plan.explain import size_text
    from dseek.plan.training import num_learned

    work, memory = choice.work, choice.memory
    logits = f"{work.logits_chunk_tokens} rows at a time" if work.logits_chunk_tokens else "all at once"
    tokens = work.num_tokens * work.num_batches * work.world_size
    return [
        ("learned", f"{num_learned(work):,} parameters of {work.shape.num_parameters():,} ({config.method})"),
        ("step", f"{tokens:,} tokens: {work.world_size} ranks x {work.num_batches} batches x {work.batch_rows} rows"),
        ("shared", work.shard_strategy),
        ("computed twice", f"{work.checkpointed_layers} of {work.shape.num_layers} blocks"),
        ("logits", logits),
        ("weights", size_text(memory.weights_bytes)),
        ("gradients", size_text(memory.gradients_bytes)),
        ("optimiser", f"{size_text(memory.optimizer_bytes)} ({config.optim})"),
        ("activations", size_text(memory.activations_bytes)),
        ("loss", size_text(memory.logits_bytes)),
        ("process", size_text(memory.process_bytes)),
        *([("snapshots", f"up to {size_text(memory.snapshots_bytes)}")] if work.snapshots else []),
        ("peak, predicted", size_text(memory.peak_bytes)),
    ]


def _train_gate(config: TrainConfig) -> int:
    """Hand over to `dseek train-gate`."""
    from dseek.cli import train_gate
    from dseek.train.documents import find_files

    parser = argparse.ArgumentParser(prog="dseek train")
    train_gate.add_arguments(parser)
    gate = config.gate
    arguments = [config.model, "--out", config.output_dir, "--text", *map(str, find_files(config.data.train))]
    arguments += ["--tokens", *map(str, gate.tokens), "--seed", str(config.seed)]
    for name in ("samples", "passes", "gate_dim", "mean_window", "density", "max_position_embeddings"):
        value: Any = getattr(gate, name)
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    if config.num_threads:
        arguments += ["--threads", str(config.num_threads)]
    if config.report_to == "tensorboard":
        arguments.append("--tensorboard")
    return train_gate.run(parser.parse_args(arguments))
