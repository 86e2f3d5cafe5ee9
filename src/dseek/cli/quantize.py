"""`dseek quantize MODEL --enable_quantization int8|int4 --out OUT`: write a model with integer weights."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dseek.cli.options import add_json, add_model, positive_int
from dseek.cli.precision_options import add_quantization_option
from dseek.core.errors import ConfigError, RequestError

if TYPE_CHECKING:
    import torch

    from dseek.compress.ptq import Progress, PtqConfig
    from dseek.models.files import ModelFiles

HELP = "write a model with integer weights, as compressed-tensors or GGUF"

METHODS = ("auto", "rtn", "gptq", "smoothquant", "awq", "smoothquant+gptq", "awq+gptq")
FORMATS = ("compressed-tensors", "gguf")
DTYPES = ("float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments.

    Args:
        parser: the verb's parser.
    """
    add_model(parser)
    add_quantization_option(parser, "what the weights become", required=True)
    add_output(parser, FORMATS)
    parser.add_argument("--dtype", choices=DTYPES, help="of all that stays wide (default: the source's, else float32)")
    add_method(parser)
    add_json(parser)


def add_output(parser: argparse.ArgumentParser, formats: Sequence[str]) -> None:
    """Add --out and --format.

    Args:
        parser: the verb's parser.
        formats: of a folder, then of a file.
    """
    parser.add_argument(
        "--out", required=True, metavar="OUT", help="folder to write, or a .gguf file; a stopped run goes on"
    )
    parser.add_argument(
        "--format", choices=formats, help=f"how it is stored (default: by the name of OUT, else {formats[0]})"
    )


def add_method(parser: argparse.ArgumentParser) -> None:
    """Add the options about how integers are chosen.

    Args:
        parser: the verb's parser.
    """
    group = parser.add_argument_group("how integers are chosen")
    group.add_argument(
        "--method",
        choices=METHODS,
        default="auto",
        help="rounding to nearest, GPTQ, factors against outliers, or both (default: with texts GPTQ, with factors "
        "before it beside int8 activations; without, rtn)",
    )
    group.add_argument(
        "--text", nargs="+", action="append", metavar="FILE", help="texts to calibrate with, UTF-8, like those to come"
    )
    group.add_argument(
        "--samples", type=positive_int, default=64, metavar="N", help="stretches of them (default: %(default)s)"
    )
    group.add_argument(
        "--tokens", type=positive_int, default=1024, metavar="N", help="tokens of a stretch (default: %(default)s)"
    )
    group.add_argument(
        "--group-size",
        type=positive_int,
        metavar="N",
        help="inputs that share a scale, a multiple of 32 (default: int4 and GGUF 32; int8 a scale a channel, with "
        "int8 activations)",
    )
    group.add_argument(
        "--symmetric",
        action=argparse.BooleanOptionalAction,
        help="int4 without or with zero points (default: without in compressed-tensors, Q4_1 in GGUF)",
    )
    group.add_argument(
        "--act-order",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let GPTQ round the inputs with the largest activations first",
    )
    group.add_argument(
        "--damping", type=float, default=0.01, metavar="D", help="of GPTQ, a share of H's mean diagonal (default: 0.01)"
    )
    group.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="projections that stay wide, such as '*.down_proj' (may be repeated)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the stretches' places (default: 0)")
    group.add_argument("--threads", type=positive_int, metavar="N", help="threads (default: PyTorch's own choice)")


def run(args: argparse.Namespace) -> int:
    """Quantise, write, and name what was written.

    Args:
        args: parsed arguments.

    Returns:
        The exit status.

    Raises:
        DseekError: the model, a text or an option is unusable.
    """
    import torch

    from dseek.compress.ptq import quantize_layers
    from dseek.models.files import open_model

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    target = Path(args.out)
    is_gguf = wants_gguf(args, target)
    require_free(target)
    # Everything is put together beside the target, so that it is there whole or not at all.
    partial = target.with_name(target.name + ".partial")
    with open_model(args.model) as files:
        dtype = _dtype(args, files, is_gguf)
        texts = _texts(args, files)
        config = _config(args, is_gguf, dtype, texts is not None)
        with _shown() as progress:
            quantize_layers(files, config, texts, partial / "work", progress)
        _write(files, config, dtype, partial, target, is_gguf)
        found = _report(files, config, partial / "work", target, is_gguf)
    shutil.rmtree(partial)
    if args.json:
        print(json.dumps(found))
    else:
        print(target)
        _tell(found)
    return 0


def wants_gguf(args: argparse.Namespace, target: Path) -> bool:
    """Tell whether a GGUF file was asked for.

    Args:
        args: parsed arguments.
        target: what is to be written.

    Raises:
        ConfigError: --format and the name say different things.
    """
    named = target.suffix == ".gguf"
    asked = named if args.format is None else args.format == "gguf"
    if asked != named:
        raise ConfigError(
            f"--format {args.format} was asked for, and --out {target}",
            needed="a .gguf file" if asked else "a folder",
        )
    return asked


def require_free(target: Path) -> None:
    """Refuse to write over something.

    Args:
        target: what is to be written.

    Raises:
        ConfigError: it is there, and no empty folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists already", needed="a name that is free", remedy="remove it, or take another")


def _dtype(args: argparse.Namespace, files: ModelFiles, is_gguf: bool) -> str:
    from dseek.models.folder_writer import default_dtype

    if is_gguf:
        if args.dtype is not None:
            raise ConfigError("--dtype was given for a GGUF file, whose norms are float32", remedy="leave --dtype out")
        return "float16"
    return args.dtype or default_dtype(files)


def _config(args: argparse.Namespace, is_gguf: bool, dtype: str, has_texts: bool) -> PtqConfig:
    """The scheme and the method that were asked for, or that suit."""
    from dseek.compress.ptq import PtqConfig, best_method
    from dseek.compress.ptq_gguf import encoding_of
    from dseek.compress.ptq_gptq import GptqConfig
    from dseek.compress.ptq_rounding import Scheme

    eight = args.enable_quantization == "int8"
    group_size = args.group_size if args.group_size is not None or (eight and not is_gguf) else 32
    if eight and args.symmetric is False:
        raise ConfigError("int8 with zero points was asked for", remedy="leave --no-symmetric out")
    scheme = Scheme(
        num_bits=8 if eight else 4,
        group_size=group_size,
        symmetric=eight or (not is_gguf if args.symmetric is None else args.symmetric),
        activation_bits=8 if eight and group_size is None else None,
    )
    if is_gguf:
        encoding_of(scheme)
    method = args.method
    if method == "auto":
        method = best_method(scheme) if has_texts else "rtn"
        if not has_texts:
            print("dseek: no --text was given: weights are rounded to nearest", file=sys.stderr)
    elif method == "rtn" and has_texts:
        print("dseek: rounding to nearest does not look at --text", file=sys.stderr)
    return PtqConfig(
        scheme=scheme,
        method=method,
        gptq=GptqConfig(damping=args.damping, act_order=args.act_order),
        # A group's scale is read as a half everywhere, so it is one from the beginning.
        scale_dtype=dtype if group_size is None or dtype == "bfloat16" else "float16",
        ignore=tuple(args.ignore),
    )


def _texts(args: argparse.Namespace, files: ModelFiles) -> torch.Tensor | None:
    """Stretches of the calibration texts, those of each list in equal parts."""
    import torch

    from dseek.compress.ptq_calibration import cut_texts
    from dseek.engine.prompts import text_token_ids

    if args.text is None:
        return None
    num_tokens = min(args.tokens, files.shape.max_position_embeddings)
    pieces = []
    for paths in args.text:
        ids: list[int] = []
        for path in paths:
            ids += text_token_ids(files, _read(path))
        if len(ids) < num_tokens:
            raise RequestError(
                f"the texts {', '.join(paths[:3])} have {len(ids)} tokens",
                needed=f"at least {num_tokens}, one stretch",
                remedy="give more or longer files, or a smaller --tokens",
            )
        pieces.append(cut_texts(ids, -(-args.samples // len(args.text)), num_tokens, args.seed))
    return torch.cat(pieces)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RequestError(f"the text {path} cannot be read: {error.strerror or error}") from None


def _write(files: ModelFiles, config: PtqConfig, dtype: str, partial: Path, target: Path, is_gguf: bool) -> None:
    """Write beside the target, then put it in its place."""
    from dseek.compress.ptq_folder import write_folder
    from dseek.compress.ptq_gguf import write_gguf

    result = partial / ("result.gguf" if is_gguf else "result")
    if is_gguf:
        write_gguf(files, config, partial / "work", result)
    else:
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        write_folder(files, config, dtype, partial / "work", result)
    os.replace(result, target)


def _report(files: ModelFiles, config: PtqConfig, work: Path, target: Path, is_gguf: bool) -> dict[str, Any]:
    from dseek.compress.ptq import read_layer

    errors: dict[str, list[float]] = {}
    for layer in range(files.shape.num_layers):
        for name, error in read_layer(work, layer).errors.items():
            errors.setdefault(name.split(".")[-2], []).append(error)
    scheme = config.scheme
    paths = [target] if target.is_file() else list(target.iterdir())
    return {
        "out": str(target),
        "format": "gguf" if is_gguf else "compressed-tensors",
        "bits": scheme.num_bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "activation_bits": scheme.activation_bits,
        "method": config.method,
        "num_bytes": sum(path.stat().st_size for path in paths),
        "output_error": {role: sum(values) / len(values) for role, values in errors.items()},
    }


def _tell(found: dict[str, Any]) -> None:
    groups = f"groups of {found['group_size']}" if found["group_size"] else "a scale a channel"
    activations = ", activations int8 by token" if found["activation_bits"] else ""
    zero_points = "" if found["symmetric"] else ", zero points"
    print(
        f"dseek: {found['bits']} bits, {groups}{zero_points}{activations}, {found['method']}; "
        f"{found['num_bytes'] / 1e6:,.1f} MB",
        file=sys.stderr,
    )
    if found["output_error"]:
        parts = ", ".join(f"{role} {error:.2e}" for role, error in found["output_error"].items())
        print(f"dseek: share of the outputs' energy that changed, mean over layers: {parts}", file=sys.stderr)


@contextmanager
def _shown() -> Iterator[Progress]:
    """Show progress on stderr: bars on a terminal, else a line for each finished layer."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int, figures: dict[str, float]) -> None:
            text = ", ".join(f"{name} {value:.1e}" for name, value in figures.items())
            if not console.is_terminal and what == "layers":
                print(f"dseek: {done} of {total} layers {text}".rstrip(), file=sys.stderr, flush=True)
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, description=f"{what} {text}".strip())

        yield show
