"""`dseek train-gate MODEL --text FILES --out DIR`: learn which blocks a frozen model's attention needs."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dseek.cli.options import add_model, positive_int
from dseek.core.errors import ConfigError, RequestError

if TYPE_CHECKING:
    import torch

    from dseek.models.decoder import Decoder
    from dseek.models.files import ModelFiles
    from dseek.models.window_choice import WindowChoice
    from dseek.train.gate_training import GateTraining, Progress

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
    group.add_argument(
        "--head-texts",
        type=positive_int,
        default=6,
        metavar="N",
        help="samples on which it is measured what heads need (default: %(default)s)",
    )
    group.add_argument(
        "--gate", metavar="FILE", help="a trained gate, which is kept: only what heads need is measured anew"
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of the frozen model (default: bfloat16 where the processor multiplies it, else float32)",
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
    from dseek.train import gate_training, head_shares

    config = gate_training.GateTraining(gate_dim=args.gate_dim, num_passes=args.passes, seed=args.seed)
    shares = head_shares.HeadShares(density=args.density, num_texts=args.head_texts, seed=args.seed)
    window_choice = WindowChoice(mean_tokens=args.mean_window)
    if config.gate_dim % 16:
        raise ConfigError(f"the gate's width is {config.gate_dim}", needed="a multiple of 16")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    folder = Path(args.out)
    with open_model(args.model) as files, _shown(folder if args.tensorboard else None) as progress:
        shape = files.shape
        if shape.sliding_window is not None:
            raise ConfigError(
                f"{files.name} has a sliding window", needed="a model whose layers attend to everything before them"
            )
        longest = extend_positions(shape, args.max_position_embeddings).max_position_embeddings
        lengths = [min(length, longest) for length in args.tokens]
        texts = _texts(files, args.text, args.samples, lengths, args.seed)
        decoders = _Decoders(files, args.max_position_embeddings, _dtype(args.dtype))
        own = shape.max_position_embeddings
        short = [text[:own] for text in texts]
        if args.gate is not None:
            trained = _Trained.of_file(Path(args.gate), files)
        else:
            trained = _train(config, window_choice, decoders, texts, short, longest, folder, progress)
        costs = head_shares.measure_heads(decoders.of(own), short, trained.gates, folder / "heads", shares, progress)
        gate_training.save_gates(
            trained.gates,
            head_shares.choose_shares(costs, shares.density),
            shape.rope.theta,
            fingerprint(files),
            folder / FILE_NAME,
            trained.windows,
            level_biases=trained.level_biases,
        )
    print(folder / FILE_NAME)
    return 0


def _dtype(name: str) -> torch.dtype:
    """The dtype of the frozen model: PyTorch's products of bfloat16 are slow without instructions for them."""
    import torch

    from dseek.hardware.probe import probe

    if name == "auto":
        name = "bfloat16" if "avx512_bf16" in probe().features else "float32"
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


@dataclass(frozen=True, slots=True)
class _Trained:
    """What does not hang on what heads need."""

    gates: torch.nn.ModuleList
    windows: torch.Tensor | None
    level_biases: Sequence[torch.Tensor]

    @classmethod
    def of_file(cls, path: Path, files: ModelFiles) -> _Trained:
        """Read what a gate's file holds."""
        import torch

        from dseek.models.gate_file import fingerprint, read_gates
        from dseek.train.gate_training import gates_of

        stored = read_gates(path, files.shape)
        if stored.model != fingerprint(files):
            raise ConfigError(f"{path} was trained for another model than {files.name}")
        biases = [torch.from_numpy(layer.level_bias) for layer in stored.layers if layer.level_bias is not None]
        return cls(gates_of(stored), torch.tensor(stored.windows) if stored.windows else None, biases)


def _train(
    config: GateTraining,
    window_choice: WindowChoice,
    decoders: _Decoders,
    texts: list[torch.Tensor],
    short: list[torch.Tensor],
    longest: int,
    folder: Path,
    progress: Progress,
) -> _Trained:
    """Make samples and train on them; goes on with what the folder holds."""
    from dseek.models.gate_file import fingerprint
    from dseek.train import gate_training, level_bias
    from dseek.train.sample_windows import sample_windows

    shape = decoders.files.shape
    samples = gate_training.make_samples(
        decoders.of, texts, folder / "samples", config, progress, model=f"{fingerprint(decoders.files)} {longest}"
    )
    biases = level_bias.learn_level_biases(
        decoders.of(shape.max_position_embeddings),
        short,
        folder / "level_bias.safetensors",
        level_bias.LevelBiasTraining(seed=config.seed),
        progress,
    )
    gates = gate_training.new_gates(shape, config)
    gate_training.train_gates(gates, samples, folder / "state.safetensors", config, progress)
    windows = sample_windows(samples, shape, window_choice)
    return _Trained(gates, windows, biases)


class _Decoders:
    """The frozen model, with the positions that a text's length needs.

    Args:
        files: the opened model.
        max_position_embeddings: positions of texts that are longer than the model was made for.
        dtype: of its weights and activations.
    """

    def __init__(self, files: ModelFiles, max_position_embeddings: int | None, dtype: torch.dtype) -> None:
        self.files, self._positions, self._dtype = files, max_position_embeddings, dtype
        self._made: dict[bool, Decoder] = {}

    def of(self, num_tokens: int) -> Decoder:
        """Give the model for a text.

        Args:
            num_tokens: length of the text.
        """
        from dseek.models.decoder import Decoder
        from dseek.models.long_positions import extend_positions

        own = self.files.shape
        extended = num_tokens > own.max_position_embeddings
        if extended not in self._made:
            try:
                if extended:
                    self.files.shape = extend_positions(own, self._positions)
                self._made[extended] = Decoder.from_files(self.files, self._dtype).requires_grad_(False)
            finally:
                self.files.shape = own
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
