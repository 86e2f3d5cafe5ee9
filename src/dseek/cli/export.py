"""`dseek export MODEL --out OUT`: write a model in the formats that other engines read."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dseek.cli import quantize
from dseek.cli.options import add_json, add_model
from dseek.cli.precision_options import add_quantization_option
from dseek.core.errors import ConfigError

if TYPE_CHECKING:
    from dseek.export.wide import Progress

HELP = "write a model as a Hugging Face folder or a GGUF file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments.

    Args:
        parser: the verb's parser.
    """
    add_model(parser)
    quantize.add_output(parser, ("safetensors", "gguf"))
    parser.add_argument(
        "--dtype",
        choices=quantize.DTYPES,
        help="of the weights, or of those that stay wide (default: the source's if 16-bit, else float32; in "
        "a GGUF file float16)",
    )
    add_quantization_option(parser, "integer weights, as `dseek quantize` makes them")
    quantize.add_method(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write the model and name what was written.

    Args:
        args: parsed arguments.

    Returns:
        The exit status.

    Raises:
        DseekError: the model or an option is unusable.
    """
    if args.enable_quantization is not None:
        if args.format == "safetensors":
            args.format = "compressed-tensors"
        return quantize.run(args)
    _refuse_methods(args)
    target = Path(args.out)
    is_gguf = quantize.wants_gguf(args, target)
    quantize.require_free(target)
    partial = target.with_name(target.name + ".partial")
    from dseek.export.wide import write_wide_folder, write_wide_gguf
    from dseek.models.files import open_model
    from dseek.models.folder_writer import default_dtype

    with open_model(args.model) as files, _shown() as progress:
        dtype = args.dtype or ("float16" if is_gguf else default_dtype(files))
        try:
            if is_gguf:
                write_wide_gguf(files, dtype, partial, progress)
            else:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                write_wide_folder(files, dtype, partial, progress)
            os.replace(partial, target)
        finally:
            _remove(partial)
    paths = [target] if target.is_file() else list(target.iterdir())
    num_bytes = sum(path.stat().st_size for path in paths)
    if args.json:
        found = {"out": str(target), "format": "gguf" if is_gguf else "safetensors", "dtype": dtype}
        print(json.dumps(found | {"num_bytes": num_bytes}))
    else:
        print(target)
        print(f"dseek: {dtype}; {num_bytes / 1e6:,.1f} MB", file=sys.stderr)
    return 0


def _refuse_methods(args: argparse.Namespace) -> None:
    """What says how integers are chosen means nothing without them."""
    plain = argparse.ArgumentParser()
    quantize.add_method(plain)
    defaults = vars(plain.parse_args([]))
    given = [f"--{name.replace('_', '-')}" for name, default in defaults.items() if getattr(args, name) != default]
    if given:
        raise ConfigError(
            f"{', '.join(given)} without --enable_quantization", remedy="add --enable_quantization int8 or int4"
        )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _shown() -> Iterator[Progress]:
    """Show on a terminal how many tensors are written."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("tensors", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
