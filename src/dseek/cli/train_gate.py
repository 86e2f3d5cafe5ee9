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

    from dseek.models.decoder import Decoder
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
    parser.add_argument(
        "--text",
        required=True,
        nargs="+",
        action="append",
        metavar="FILE",
        help="texts to learn from, UTF-8; given several times, samples are drawn from each list in turn",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for samples, state and gate.safetensors; goes on in it"
    )
    group = parser.add_argument_group("training")
    group.add_argument(
        "--tokens",
        type=positive_int,
        nargs="+",
        default=[8192],
        metavar="N",
        help="tokens of a sample; several lengths take turns (default: 8192)",
    )
    group.add_argument(
        "--max-position-embeddings",
        type=positive_int,
        metavar="N",
        help="positions that samples longer than the model was made for are run with, as `generate` would",
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
    group.add_argument(
        "--mean-window",
        type=positive_int,
        default=512,
        metavar="N",
        help="most tokens of the heads' windows in the mean over all heads (default: %(default)s)",
    )
    group.add_argument(
        "--density",
        type=float,
        default=0.2,
        metavar="D",
        help="share of all pairs that the heads may look at with a least share of 0.024; what each head gets of them "
        "is chosen by what it costs the model to see less (default: %(default)s)",
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

    from dseek.models.files import open_model
    from dseek.models.gate_file import FILE_NAME, fingerprint
    from dseek.models.long_positions import extend_positions
    from dseek.models.window_choice import WindowChoice
    from dseek.train import gate_training, head_shares, level_bias
    from dseek.train.sample_windows import sample_windows

    config = gate_training.GateTraining(gate_dim=args.gate_dim, num_passes=args.passes, seed=args.seed)
    shares = head_shares.HeadShares(density=args.density, seed=args.seed)
    window_choice = WindowChoice(mean_tokens=args.mean_window)
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
        longest = extend_positions(files.shape, args.max_position_embeddings).max_position_embeddings
        lengths = [min(length, longest) for length in args.tokens]
        texts = _texts(files, args.text, args.samples, lengths, args.seed)
        decoders = _Decoders(files, args.max_position_embeddings)
        samples = gate_training.make_samples(
            decoders.of, texts, folder / "samples", config, progress, model=f"{fingerprint(files)} {longest}"
        )
        shape = files.shape
        own = files.shape.max_position_embeddings
        short = [text[:own] for text in texts]
        biases = level_bias.learn_level_biases(
            decoders.of(own),
            short,
            folder / "level_bias.safetensors",
            level_bias.LevelBiasTraining(seed=args.seed),
            progress,
        )
        gates = gate_training.new_gates(shape, config)
        gate_training.train_gates(gates, samples, folder / "state.safetensors", config, progress)
        costs = head_shares.measure_heads(decoders.of(own), short, gates, folder / "heads", shares, progress)
        factors = head_shares.choose_shares(costs, shares.density)
        windows = sample_windows(samples, shape, window_choice)
        gate_training.save_gates(
            gates, factors, shape.rope.theta, fingerprint(files), folder / FILE_NAME, windows, level_biases=biases
        )
    print(folder / FILE_NAME)
    return 0


class _Decoders:
    """The frozen model, with the positions that a text's length needs.

    Args:
        files: the opened model.
        max_position_embeddings: positions of texts that are longer than the model was made for.
    """

    def __init__(self, files: ModelFiles, max_position_embeddings: int | None) -> None:
        self._files, self._positions = files, max_position_embeddings
        self._made: dict[bool, Decoder] = {}

    def of(self, num_tokens: int) -> Decoder:
        """Give the model for a text.

        Args:
            num_tokens: length of the text.
        """
        import torch

        from dseek.models.decoder import Decoder
        from dseek.models.long_positions import extend_positions

        own = self._files.shape
        extended = num_tokens > own.max_position_embeddings
        if extended not in self._made:
            try:
                if extended:
                    self._files.shape = extend_positions(own, self._positions)
                self._made[extended] = Decoder.from_files(self._files, torch.bfloat16).requires_grad_(False)
            finally:
                self._files.shape = own
        return self._made[extended]


def _texts(files: ModelFiles, lists: list[list[str]], count: int, lengths: list[int], seed: int) -> list[torch.Tensor]:
    """Draw token sequences: files of a list in a random order, joined until each sequence is long enough.

    Lists take turns, and once each of them had its turn the next length is due.
    """
    import torch

    from dseek.engine.prompts import text_token_ids

    if min(lengths) < LEAST_TOKENS:
        raise RequestError(f"samples of {min(lengths)} tokens", needed=f"at least {LEAST_TOKENS}")
    order = random.Random(seed)
    read: dict[str, list[int]] = {}
    texts = []
    for index in range(count):
        paths, num_tokens = lists[index % len(lists)], lengths[index // len(lists) % len(lengths)]
        ids: list[int] = []
        for path in order.sample(paths, len(paths)):
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
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int, figures: dict[str, float]) -> None:
            text = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            if not console.is_terminal:
                print(f"{what} {done} of {total} {text}".rstrip(), file=sys.stderr, flush=True)
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, description=f"{what} {text}".strip())
            if writer is not None:
                for name, value in figures.items():
                    writer.add_scalar(f"gate/{name}", value, done)

        try:
            yield show
        finally:
            if writer is not None:
                writer.close()
