"""Options about the numbers a model runs with: --precision, --enable_quantization and --cache-dtype."""

from __future__ import annotations

import argparse
from typing import Any

from dseek.core.errors import ConfigError

PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8", "int4")
"""Precision modes, as in DSEEK_PRECISION_MODE."""

QUANTIZATIONS = ("int8", "int4")
"""What --enable_quantization takes."""

CACHE_DTYPES = ("fp32", "bf16", "int8")
"""Dtypes of the cache of keys and values, as in `dseek.plan.formats`."""


def add_precision_options(parser: argparse._ActionsContainer, default: str) -> None:
    """Add the three options.

    Args:
        parser: the verb's parser, or a group of it.
        default: what decides where nothing is said, for the help.
    """
    parser.add_argument(
        "--precision", choices=PRECISIONS, help=f"weights' precision (default: DSEEK_PRECISION_MODE, else {default})"
    )
    add_quantization_option(parser, "the same as --precision with that value")
    parser.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES, help=f"dtype of the cache of keys and values (default: {default})"
    )


def add_quantization_option(parser: argparse._ActionsContainer, meaning: str, *, required: bool = False) -> None:
    """Add --enable_quantization, with a dash between the words too.

    Args:
        parser: the verb's parser, or a group of it.
        meaning: what it does there.
        required: whether it must be given.
    """
    parser.add_argument(
        "--enable_quantization", "--enable-quantization", choices=QUANTIZATIONS, required=required, help=meaning
    )


def precision_from(args: argparse.Namespace) -> dict[str, Any]:
    """Collect what `add_precision_options` parsed.

    Args:
        args: parsed arguments.

    Returns:
        Keyword arguments of `dseek.load`.

    Raises:
        ConfigError: --precision and --enable_quantization ask for different things.
    """
    precision: str | None = args.precision
    wanted: str | None = args.enable_quantization
    if wanted is not None and precision not in (None, wanted):
        raise ConfigError(
            f"--enable_quantization {wanted} and --precision {precision} were given",
            needed="one of them, or the same in both",
        )
    return {"precision": wanted or precision, "cache_dtype": args.cache_dtype}
