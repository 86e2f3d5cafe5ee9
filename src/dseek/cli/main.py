"""`dseek VERB ...`: finds the verb, imports it, runs it, and turns errors into one line and an exit status.

Only the verb that was called is imported, so that `dseek --help` is instant and `dseek generate` starts as fast as
its own imports allow. A verb is a module with `HELP`, `add_arguments(parser)` and `run(args) -> int`.

Exit status: 0 done, 1 the machine failed us, 2 the user's error, 130 interrupted, 141 the reader of our output left.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from dseek.core.errors import DseekError

VERBS: dict[str, tuple[str, str]] = {
    "doctor": ("dseek.cli.doctor", "measure this machine and show what it can do"),
    "pull": ("dseek.cli.pull", "bring a model to the local cache"),
    "plan": ("dseek.cli.plan", "plan a run of a model and explain the choices"),
    "generate": ("dseek.cli.generate", "answer one prompt"),
    "chat": ("dseek.cli.chat", "talk with a model in the terminal"),
    "serve": ("dseek.cli.serve", "serve a model over HTTP: an OpenAI-compatible API and a web page"),
    "bench-serve": (
        "dseek.cli.bench_serve",
        "replay a trace of arrivals against a server: time to first token, between tokens, goodput",
    ),
    "bench": ("dseek.cli.bench", "measure prefill and decode beside what the plan predicted"),
    "profile": ("dseek.cli.profile", "show where a run's time goes, beside the roofline, and what would help"),
    "tune": ("dseek.cli.tune", "find the batch size of least time a token by measurement"),
    "eval": ("dseek.cli.eval", "perplexity and next-token accuracy on a text"),
    "calibrate": ("dseek.cli.calibrate", "statistics of a model's numbers, and what narrower formats lose"),
    "quantize": ("dseek.cli.quantize", "write a model with integer weights, as compressed-tensors or GGUF"),
    "export": ("dseek.cli.export", "write a model as a Hugging Face folder or a GGUF file"),
    "translate": ("dseek.cli.translate", "translate lines of text with an encoder-decoder"),
    "train": ("dseek.cli.train", "pretrain or fine-tune a model as a TOML file says"),
    "checkpoint": ("dseek.cli.checkpoint", "list, verify, restore or clean up a training's checkpoints"),
    "train-gate": ("dseek.cli.train_gate", "train the gate that chooses blocks for dynamic attention"),
}
"""Verb: its module and the line that `dseek --help` shows (the module's `HELP` says the same)."""


def load_verb(verb: str) -> ModuleType:
    """Import the module of one verb.

    Args:
        verb: a key of `VERBS`.

    Returns:
        The module, with `HELP`, `add_arguments` and `run`.
    """
    return importlib.import_module(VERBS[verb][0])


def build_parser(verb: str) -> argparse.ArgumentParser:
    """Make the argument parser of one verb.

    Args:
        verb: a key of `VERBS`.

    Returns:
        A parser whose program name is `dseek VERB`.
    """
    module = load_verb(verb)
    parser = argparse.ArgumentParser(prog=f"dseek {verb}", description=module.HELP[:1].upper() + module.HELP[1:] + ".")
    module.add_arguments(parser)
    return parser


def usage() -> str:
    """Write the text of `dseek --help` without importing any verb."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {summary}" for verb, (_, summary) in VERBS.items())
    return (
        "usage: dseek VERB ...\n\n"
        "Run language models at the machine's limit: measure, plan, run.\n\n"
        f"verbs:\n{verbs}\n\n"
        "options:\n"
        "  -h, --help  this text; `dseek VERB --help` explains a verb\n"
        "  --version   the version"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except DseekError as error:
        sys.stdout.flush()
        print(f"dseek: error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("\ndseek: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(arguments: list[str]) -> int:
    """Run the verb that the arguments name."""
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if verb == "--version":
        from dseek import __version__

        print(f"dseek {__version__}")
        return 0
    if verb not in VERBS:
        print(f"dseek: error: no verb {verb!r}{_nearest(verb)}; see `dseek --help`", file=sys.stderr)
        return 2
    parser = build_parser(verb)
    args = parser.parse_args(arguments[1:])
    status = load_verb(verb).run(args)
    sys.stdout.flush()
    return int(status)


def _nearest(verb: str) -> str:
    """Name the verb that was probably meant, or nothing."""
    import difflib

    close = difflib.get_close_matches(verb, VERBS, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


if __name__ == "__main__":
    sys.exit(main())
