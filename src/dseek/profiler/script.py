"""`deepseek-profiler SCRIPT ARGS...`: runs a Python script (or `-m MODULE`) and reports where its time went.

The script runs as `__main__` with its own arguments, as if Python had been called; its output goes where it always
does. What it raises ends it, is reported as Python does, and the profile up to there is still written. Exit status:
the script's own, 1 where it raised, 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from dseek.core.errors import ConfigError, DseekError
from dseek.profiler.outputs import add_outputs, write_outputs


def build_parser() -> argparse.ArgumentParser:
    """Make the argument parser."""
    parser = argparse.ArgumentParser(
        prog="deepseek-profiler",
        description="Run a Python script and report its hot operators beside the machine's roofline.",
        usage="%(prog)s [options] [-m] SCRIPT [ARGS ...]",
    )
    parser.add_argument("-m", dest="as_module", action="store_true", help="SCRIPT is a module's name, as for python -m")
    parser.add_argument(
        "--no-torch", action="store_true", help="do not record PyTorch's operators, only runs of dseek's own kernels"
    )
    parser.add_argument("--title", default="", help="name of the run in the reports (default: the script's)")
    add_outputs(parser)
    parser.add_argument("script", metavar="SCRIPT", help="a Python file, or a module with -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="arguments of the script")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Profile one script.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit status.
    """
    args = build_parser().parse_args(argv)
    try:
        return _run(args)
    except DseekError as error:
        sys.stdout.flush()
        print(f"deepseek-profiler: error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("\ndeepseek-profiler: interrupted", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    from dseek.profiler.session import ProfileSession

    script = Path(args.script)
    if not args.as_module and not script.is_file():
        raise ConfigError(f"{args.script} is no file", needed="a Python script, or -m and the name of a module")
    if not args.no_torch:
        # Before PyTorch is imported, whose profiler otherwise writes about itself.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        import torch  # noqa: F401  # imported ahead, so that its import is no part of the run
    session = ProfileSession(args.title or args.script, use_torch=not args.no_torch, timeline=bool(args.trace))
    status = 0
    kept_argv, kept_path = sys.argv, sys.path[0]
    sys.argv = [args.script, *args.arguments]
    try:
        with session:
            status = _status_of(args)
    finally:
        sys.argv, sys.path[0] = kept_argv, kept_path
    sys.stdout.flush()
    write_outputs(args, session.result)
    return status


def _status_of(args: argparse.Namespace) -> int:
    """Run the script and give its exit status."""
    try:
        if args.as_module:
            sys.path[0] = ""
            runpy.run_module(args.script, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(args.script).resolve().parent)
            runpy.run_path(args.script, run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
