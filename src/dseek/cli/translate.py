"""`dseek translate MODEL --text FILE`: lines of one language in, lines of another out."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from dseek.cli.options import add_json, positive_int
from dseek.core.errors import RequestError

HELP = "translate lines of text with an encoder-decoder"
PRECISIONS = ("fp32", "int8")
"""What products may be computed in; as `dseek.engine.translation` has it, which would import PyTorch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments.

    Args:
        parser: the verb's parser.
    """
    parser.add_argument("model", metavar="MODEL", help="a folder of a Marian model in Hugging Face layout")
    parser.add_argument("--text", required=True, metavar="FILE", help="lines to translate, UTF-8; - reads stdin")
    parser.add_argument("--out", metavar="FILE", help="write the translations there instead of to stdout")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="int8 rounds weights and activations (default: fp32)"
    )
    parser.add_argument("--batch", type=positive_int, default=32, metavar="N", help="lines that run together (32)")
    parser.add_argument(
        "--max-tokens", type=positive_int, metavar="N", help="most tokens of a line (default: twice the source and 16)"
    )
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="threads (default: DSEEK_NUM_THREADS, or all)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Translate and print.

    Args:
        args: parsed arguments.

    Returns:
        The exit status.

    Raises:
        DseekError: the model, the text or an option is unusable.
    """
    from dseek.core import environment
    from dseek.core.files import atomic_write_text
    from dseek.engine.translation import load_translator

    lines = _read(args.text)
    folder = Path(args.model)
    if not folder.is_dir():
        raise RequestError(f"{args.model} is no folder", needed="a folder of a Marian model, with config.json")
    threads = args.threads or environment.get("DSEEK_NUM_THREADS")
    translator = load_translator(folder, args.precision, threads=threads)
    started = time.perf_counter()
    answers = translator.translate(lines, batch_size=args.batch, max_new_tokens=args.max_tokens, progress=_progress)
    seconds = time.perf_counter() - started
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    if args.json:
        pairs = [{"source": line, "target": answer} for line, answer in zip(lines, answers, strict=True)]
        text = json.dumps({"model": args.model, "precision": args.precision, "seconds": seconds, "lines": pairs}) + "\n"
    else:
        text = "".join(f"{answer}\n" for answer in answers)
    if args.out is None:
        print(text, end="")
    else:
        atomic_write_text(args.out, text)
    print(f"dseek: {len(lines)} lines in {seconds:.2f} s, {args.precision}", file=sys.stderr)
    return 0


def _read(name: str) -> list[str]:
    """The lines of a file or of stdin; only a line feed ends one, so that there are as many as in the file."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{name} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not text ({error})", needed="UTF-8") from error
    lines = text.removesuffix("\n").split("\n")
    if lines == [""]:
        raise RequestError(f"{name} is empty", needed="a text, one sentence a line")
    return lines


def _progress(num_done: int, num_lines: int) -> None:
    """Show on a terminal how many lines are done."""
    if sys.stderr.isatty():
        print(f"\r\033[K{num_done:,} of {num_lines:,} lines", end="", file=sys.stderr, flush=True)
