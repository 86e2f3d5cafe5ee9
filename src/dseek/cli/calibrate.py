"""`dseek calibrate MODEL --text FILES --out FILE`: what a model's numbers look like, and what narrower formats lose."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dseek.cli.options import add_json, add_model, positive_int, share
from dseek.core.errors import RequestError

if TYPE_CHECKING:
    from dseek.models.files import ModelFiles

HELP = "statistics of a model's numbers, and what narrower formats lose"

FORMATS = ("i4g", "i8c", "i8g", "bf16", "f16")

DEFAULT_WINDOW_TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments.

    Args:
        parser: the verb's parser.
    """
    add_model(parser)
    parser.add_argument("--text", required=True, nargs="+", metavar="FILE", help="texts to calibrate with, UTF-8")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="the calibration, JSON; one of the same texts is gone on with"
    )
    parser.add_argument(
        "--max-tokens", type=positive_int, default=8192, metavar="N", help="tokens of all texts (default: %(default)s)"
    )
    parser.add_argument(
        "--window",
        type=positive_int,
        metavar="N",
        help="tokens of a piece of text (default: 512, if the model has them)",
    )
    parser.add_argument("--threads", type=positive_int, metavar="N", help="threads (default: PyTorch's own choice)")
    group = parser.add_argument_group("what narrower formats lose")
    group.add_argument(
        "--sensitivity",
        nargs="?",
        const="estimate",
        choices=("estimate", "measure"),
        help="find it out: `estimate` from Fisher's information and some passes (the default of the option), `measure` "
        "with a pass for every projection and format; a stopped sweep goes on where it was",
    )
    group.add_argument(
        "--sensitivity-tokens",
        type=positive_int,
        default=1024,
        metavar="N",
        help="tokens it is found out with (default: %(default)s)",
    )
    group.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="of these formats (default: all)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the tokens that are drawn (default: 0)")
    group = parser.add_argument_group("the report")
    group.add_argument(
        "--error-bound",
        type=share,
        default=0.01,
        metavar="X",
        help="largest relative error, root mean square, for which a format represents a tensor (default: %(default)s)",
    )
    group.add_argument("--picture", metavar="FILE", help="draw it as a PNG file (needs the extra `plot`)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Calibrate, write the file, report.

    Args:
        args: parsed arguments.

    Returns:
        The exit status.

    Raises:
        DseekError: the model, a text, the file or an option is unusable.
    """
    if args.picture is not None:
        from dseek.cli.calibration_picture import check_plotting

        check_plotting()
    import torch

    from dseek.cli.calibration_report import print_report, summary
    from dseek.compress.calibration import CalibrationSettings, calibrate, cut
    from dseek.engine.prompts import text_token_ids
    from dseek.models.files import open_model

    settings = CalibrationSettings(
        max_tokens=args.max_tokens,
        sensitivity=args.sensitivity,
        sensitivity_tokens=args.sensitivity_tokens,
        formats=tuple(args.formats),
        seed=args.seed,
    )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with open_model(args.model) as files, _shown() as progress:
        settings = dataclasses.replace(settings, window_tokens=_window(files, args.window))
        texts = [(name, text_token_ids(files, _read(name))) for name in args.text]
        windows = cut(texts, settings)
        calibration, tensors = calibrate(files, windows, args.text, Path(args.out), settings, progress)
    found = summary(calibration, tensors, args.error_bound)
    if args.picture is not None:
        from dseek.cli.calibration_picture import draw_calibration

        draw_calibration(calibration, tensors, args.picture)
        found["picture"] = args.picture
    if args.json:
        print(json.dumps({"model": args.model, "file": args.out, **found}))
    else:
        print_report(found, args.out)
    return 0


def _window(files: ModelFiles, asked: int | None) -> int:
    """Tokens of a window."""
    longest = files.shape.max_position_embeddings
    if asked is not None and asked > longest:
        raise RequestError(f"windows of {asked} tokens", needed=f"at most {longest}, what the model was made for")
    return asked or min(DEFAULT_WINDOW_TOKENS, longest)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"the text {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not text ({error})", needed="UTF-8") from None


@contextmanager
def _shown() -> Iterator[Callable[[str, int, int], None]]:
    """Show progress on stderr: a bar on a terminal, else a line when something new begins."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
                if not console.is_terminal:
                    print(f"dseek: {what}, {total} in all", file=sys.stderr, flush=True)
            bar.update(tasks[what], completed=done)

        yield show
