"""The reports that a command line asks for: options that `dseek profile` and `deepseek-profiler` share."""

from __future__ import annotations

import argparse
import json
import sys

from dseek.profiler.records import Profile


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add --html, --trace, --tensorboard, --step, --top and --json.

    Args:
        parser: gets the options.
    """
    group = parser.add_argument_group("reports")
    group.add_argument(
        "--html", metavar="FILE", help="write a report with the roofline, one file that needs no network"
    )
    group.add_argument("--trace", metavar="FILE", help="write a timeline that Perfetto and chrome://tracing open")
    group.add_argument("--tensorboard", metavar="DIR", help="write scalars of each layer for TensorBoard")
    group.add_argument(
        "--step", type=_count, default=0, metavar="N", help="step of those scalars (default: %(default)s)"
    )
    group.add_argument("--top", type=_count, default=12, metavar="N", help="rows of each table (default: %(default)s)")
    group.add_argument("--json", action="store_true", help="print one JSON object on stdout, for machines")


def _count(text: str) -> int:
    """Read a whole number from 0 on (an argparse type)."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**31 - 1}")
    return value


def write_outputs(args: argparse.Namespace, profile: Profile) -> None:
    """Print and write what was asked for.

    Args:
        args: parsed arguments.
        profile: what to report.

    Raises:
        ConfigError: a file cannot be written.
    """
    from dseek.profiler.trace import write_file

    if args.html:
        from dseek.profiler.html_report import html_report

        write_file(args.html, html_report(profile), "the report")
    if args.trace:
        from dseek.profiler.trace import write_trace

        write_trace(profile, args.trace)
    if args.tensorboard:
        from dseek.profiler.tensorboard import write_scalars

        write_scalars(profile, args.tensorboard, step=args.step)
    if args.json:
        from dseek.profiler.json_report import as_plain

        print(json.dumps(as_plain(profile)))
        return
    from rich.console import Console

    from dseek.profiler.text_report import print_report

    console = Console(width=None if sys.stdout.isatty() else 160)
    print_report(profile, console, top=max(1, args.top))
