"""`dseek train-gate MODEL --text FILES --out DIR`: learn which blocks a frozen model's attention needs."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dseek.cli.options import add_model, positive_int
from dseek.core.errors import ConfigError, RequestError

if TYPE_CHECKING:
    import torch

    from dseek.models.files import ModelFiles
    from dseek.train.gate_training import Progress

HELP = "train the gate that chooses blocks for dynamic attention"

LEAST_TOKENS = 1024
"""Shorter texts have too few blocks to choose from."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments.

    Args:
        parser: the verb's parser.
    """
    add_model(parser)
    parser.add_argument("--text", required=True, nargs="+", metavar="FILE", help="texts to learn from, UTF-8")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for samples, state and gate.safetensors; goes on in it"
    )
    group = parser.add_argument_group("training")
    group.add_argument(
        "--tokens", type=positive_int, default=8192, metavar="N", help="tokens of each sample (default: %(default)s)"
    )
    group.add_argument(
        "--samples", type=positive_int, default=24, metavar="N", help="texts that are sampled (default: %(default)s)"
    )
    group.add_argument(
        "--passes", type=positive_int, default=16, metavar="N", help="passes over the samples (default: %(default)s)"
    )
    group.add_argument(
        "--gate-dim", type=positive_int, default=32, metavar="N", help="width of the gate (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, rows and order (default: 0)")
    group.add_argument("--threads", type=positive_int, metavar="N", help="threads (default: PyTorch's own choice)")
    group.add_argument("--tensorboard", action="store_true", help="write curves for TensorBoard into DIR/runs")


def run(args: argparse.Namespace) -> int:
    """Make samples, train, write the gate with its level biases; a stopped run goes on when it is started again.

    Args:
        args: parsed arguments.

    Returns:
        The exit status.

    Raises:
        DseekError: the model, a text or an option is unusable.
    """
    import torch

    from dseek.models.decoder import Decoder
    from dseek.models.files import open_model
    from dseek.models.gate_file import FILE_NAME, fingerprint
    from dseek.train import gate_training, level_bias

    config = gate_training.GateTraining(gate_dim=args.gate_dim, num_passes=args.passes, seed=args.seed)
    if config.gate_dim % 16:
        raise ConfigError(f"the gate's width is {config.gate_dim}", needed="a multiple of 16")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    folder = Path(args.out)
    with open_model(args.model) as files, _shown(folder if args.tensorboard else None) as progress:
        if files.shape.sliding_window is not None:
            raise ConfigError(
                f"{files.name} has a sliding window", needed="a model whose layers attend to everything before them"
            )
        texts = _texts(files, args.text, args.samples, min(args.tokens, files.shape.max_position_embeddings), args.seed)
        decoder = Decoder.from_files(files, torch.bfloat16).requires_grad_(False)
        shape = files.shape
        samples = gate_training.make_samples(decoder, texts, folder / "samples", config, progress)
        biases = level_bias.learn_level_biases(
            decoder,
            texts,
            folder / "level_bias.safetensors",
            level_bias.LevelBiasTraining(seed=args.seed),
            progress,
        )
        del decoder
        gates = gate_training.new_gates(shape, config)
        gate_training.train_gates(gates, samples, folder / "state.safetensors", config, progress)
        dense = gate_training.dense_heads(gates, samples, config)
        gate_training.save_gates(
            gates, dense, shape.rope.theta, fingerprint(files), folder / FILE_NAME, level_biases=biases
        )
    print(folder / FILE_NAME)
    return 0


def _texts(files: ModelFiles, paths: list[str], count: int, num_tokens: int, seed: int) -> list[torch.Tensor]:
    """Draw token sequences: files in a random order, joined until each is long enough."""
    import torch

    from dseek.engine.prompts import text_token_ids

    if num_tokens < LEAST_TOKENS:
        raise RequestError(f"samples of {num_tokens} tokens", needed=f"at least {LEAST_TOKENS}")
    order, read = random.Random(seed), {}
    texts = []
    for _ in range(count):
        ids: list[int] = []
        pool = order.sample(paths, len(paths))
        for path in pool:
            if path not in read:
                read[path] = text_token_ids(files, _read(path))
            ids += read[path]
            if len(ids) >= num_tokens:
                break
        if len(ids) < num_tokens:
            raise RequestError(
                f"the texts have {len(ids)} tokens together",
                needed=f"at least {num_tokens}, one sample",
                remedy="give more or longer files, or a smaller --tokens",
            )
        texts.append(torch.tensor(ids[:num_tokens], dtype=torch.int64))
    return texts


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RequestError(f"the text {path} cannot be read: {error.strerror or error}") from None


@contextmanager
def _shown(folder: Path | None) -> Iterator[Progress]:
    """Show progress on stderr, and write curves for TensorBoard if a folder is given."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    writer: Any = None
    if folder is not None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "--tensorboard needs the package tensorboard", remedy="pip install tensorboard, or leave it out"
            ) from None
        writer = SummaryWriter(str(folder / "runs"))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int, figures: dict[str, float]) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            text = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            bar.update(tasks[what], completed=done, description=f"{what} {text}".strip())
            if writer is not None:
                for name, value in figures.items():
                    writer.add_scalar(f"gate/{name}", value, done)

        try:
            yield show
        finally:
            if writer is not None:
                writer.close()
