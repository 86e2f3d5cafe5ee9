"""`dseek plan MODEL --show-attention PROMPT`: what heads attend to, and what the plan keeps of it, as a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dseek.cli.options import open_from
from dseek.core.errors import ConfigError, RequestError
from dseek.core.files import atomic_write_bytes
from dseek.core.logs import get_logger

if TYPE_CHECKING:
    from dseek.core.shape import ModelShape
    from dseek.engine.attention_map import AttentionMap
    from dseek.plan.plan import Plan

DEFAULT_PICTURE = "attention.png"

MAX_LAYERS = 8
"""Layers in one picture."""


def add_show_attention(parser: argparse.ArgumentParser) -> None:
    """Add --show-attention and what it is drawn by: --layer, --head, --picture.

    Args:
        parser: the verb's parser.
    """
    group = parser.add_argument_group("a picture of attention")
    group.add_argument(
        "--show-attention",
        metavar="PROMPT",
        help="draw what heads attend to over PROMPT and what the plan keeps; @FILE reads a file, - stdin",
    )
    group.add_argument(
        "--layer",
        type=_indices,
        metavar="N,N",
        help="layers to draw, the first is 0 (default: the first, the middle and the last one)",
    )
    group.add_argument("--head", type=_index, metavar="N", help="query head to draw (default: 0)")
    group.add_argument(
        "--picture", metavar="FILE", help=f"PNG file to write, replaced if there (default: {DEFAULT_PICTURE})"
    )


def check_options(args: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is opened or measured; warn of options without effect.

    Args:
        args: parsed arguments.

    Raises:
        ConfigError: matplotlib is missing, or the picture's name is none for a PNG file.
    """
    if args.show_attention is None:
        for name in ("layer", "head", "picture"):
            if getattr(args, name) is not None:
                get_logger(__name__).warning("--%s has no effect without --show-attention", name)
        return
    from dseek.cli import attention_picture

    attention_picture.require_matplotlib()
    path = _path(args)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise ConfigError(f"the picture would be {path}", needed="the name of a .png file")


def draw(args: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """Map the attention, write the picture, and say what is in it.

    Args:
        args: parsed arguments, with --show-attention.
        plan: whose patterns are drawn.

    Returns:
        Plain values: `picture` (the file), `prompt_tokens`, `head`, `mass_kept` and `pairs_skipped` (fractions over all
        drawn layers), and `layers`, each with its own figures.

    Raises:
        DseekError: a layer, the head, the prompt or the gate beside the model is unusable, or the picture cannot be
            written.
    """
    layers, head = _layers(args.layer, plan.shape), _head(args.head, plan.shape)
    text = read_prompt(args.show_attention)
    with open_from(args) as files:
        from dseek.engine.prompts import text_token_ids

        token_ids = text_token_ids(files, text)
        if not 1 <= len(token_ids) <= plan.context_tokens:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens",
                needed=f"1 to the {plan.context_tokens} of the plan's context",
                remedy="shorten it or raise --context" if token_ids else "give a text",
            )
        import torch

        from dseek.cli.attention_picture import to_png
        from dseek.engine.attention_map import attention_maps

        torch.set_num_threads(plan.num_threads)
        try:
            maps = attention_maps(
                files,
                token_ids,
                plan.attention_patterns,
                layers=layers,
                head=head,
                context_tokens=plan.context_tokens,
                progress=_show_progress,
            )
        finally:
            _clear_progress()
        title = f"{files.name}: attention over {len(token_ids):,} tokens"
    _notice_dense(maps)
    path = _path(args)
    try:
        atomic_write_bytes(path, to_png(maps, title))
    except OSError as error:
        raise ConfigError(f"the picture cannot be written to {path}: {error.strerror or error}") from None
    return _found(maps, path)


def summary_line(found: dict[str, Any]) -> str:
    """Say in one line what `draw` found.

    Args:
        found: what it returned.

    Returns:
        Such as `attention.png: head 0 of layers 0, 15, 29 keeps 97.1 % of the dense attention over 8,000 tokens and
        skips 63.0 % of its pairs`.
    """
    layers = ", ".join(str(entry["layer"]) for entry in found["layers"])
    means = f" (and {_percent(found['mass_in_means'])} by means)" if found["mass_in_means"] else ""
    return (
        f"{found['picture']}: head {found['head']} of layer{'s' if len(found['layers']) > 1 else ''} {layers} keeps "
        f"{_percent(found['mass_kept'])} of the dense attention{means} over {found['prompt_tokens']:,} tokens "
        f"and skips {_percent(found['pairs_skipped'])} of its pairs"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def read_prompt(prompt: str) -> str:
    """Read a prompt that may be in a file or come from stdin.

    Args:
        prompt: the text itself, `@FILE`, or `-` for stdin.

    Returns:
        The text.

    Raises:
        RequestError: the file cannot be read, or is not UTF-8.
    """
    name = "stdin" if prompt == "-" else prompt.removeprefix("@")
    try:
        if prompt == "-":
            return sys.stdin.read()
        return Path(name).read_text(encoding="utf-8") if prompt.startswith("@") else prompt
    except OSError as error:
        raise RequestError(
            f"{name} cannot be read: {error.strerror or error}",
            remedy="name a text file after the @; a text that begins with @ can come from stdin, as -",
        ) from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not text ({error})", needed="UTF-8") from None


def _found(maps: list[AttentionMap], path: Path) -> dict[str, Any]:
    """The figures, as plain values."""
    from dseek.plan.attention_wish import pattern_text

    layers = [
        {
            "layer": found.layer,
            "attention": pattern_text(found.pattern),
            "chosen_by": found.chosen_by,
            "level_bias": found.level_bias,
            "mass_kept": found.kept,
            "mass_in_means": found.in_means,
            "pairs": found.pairs,
            "dense_pairs": found.dense_pairs,
            "pairs_skipped": found.skipped,
        }
        for found in maps
    ]
    return {
        "picture": str(path),
        "prompt_tokens": maps[0].num_tokens,
        "head": maps[0].head,
        "mass_kept": sum(found.kept for found in maps) / len(maps),
        "mass_in_means": sum(found.in_means for found in maps) / len(maps),
        "pairs_skipped": 1.0 - sum(found.pairs for found in maps) / sum(found.dense_pairs for found in maps),
        "layers": layers,
    }


def _notice_dense(maps: list[AttentionMap]) -> None:
    """Say on stderr where there is nothing to leave out."""
    dense = [str(found.layer) for found in maps if found.pattern.kind == "dense"]
    if not dense:
        return
    which = (
        f"layer{'s' if len(dense) > 1 else ''} {', '.join(dense)}" if len(dense) < len(maps) else "every layer drawn"
    )
    print(
        f"dseek: the plan's attention is dense in {which}, so all of it is kept there; "
        "--attention dynamic draws what a choice of blocks would keep",
        file=sys.stderr,
    )


def _layers(asked: tuple[int, ...] | None, shape: ModelShape) -> list[int]:
    """The layers to draw, rising."""
    last = shape.num_layers - 1
    layers = sorted({0, shape.num_layers // 2, last} if asked is None else set(asked))
    if layers[-1] > last:
        raise ConfigError(f"--layer names layer {layers[-1]}", needed=f"0 to {last}, the model's layers")
    if len(layers) > MAX_LAYERS:
        raise ConfigError(f"--layer names {len(layers)} layers", needed=f"at most {MAX_LAYERS} in one picture")
    return layers


def _head(asked: int | None, shape: ModelShape) -> int:
    """The head to draw."""
    head = asked or 0
    if head >= shape.num_heads:
        raise ConfigError(f"--head is {head}", needed=f"0 to {shape.num_heads - 1}, the model's query heads")
    return head


def _path(args: argparse.Namespace) -> Path:
    """Where the picture goes."""
    return Path(DEFAULT_PICTURE if args.picture is None else args.picture)


def _show_progress(layer: int, last: int) -> None:
    """Overwrite a line on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[Klayer {layer} of {last}", end="", file=sys.stderr, flush=True)


def _clear_progress() -> None:
    """Take the line away."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _index(text: str) -> int:
    """Read a whole number of at least 0 (an argparse type)."""
    if text.strip().isascii() and text.strip().isdigit() and len(text) < 10:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")


def _indices(text: str) -> tuple[int, ...]:
    """Read whole numbers of at least 0, separated by commas (an argparse type)."""
    return tuple(_index(part) for part in text.split(","))
