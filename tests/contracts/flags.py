"""The command line as data: every verb, argument and flag, read from the parsers themselves.

`python -m tests.contracts.flags` prints it; `--write` (or `make flags`) replaces the frozen list, flags.json, that the
contract test compares with. A flag in the list is a promise: taking one out breaks somebody's script.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FROZEN = Path(__file__).with_name("flags.json")
"""The list that the test compares with."""


def collect() -> dict[str, list[dict[str, Any]]]:
    """Read the flags of every verb.

    Returns:
        Verb: its arguments in order of name; each with `names`, whether it is `required`, its `choices` and whether it
        takes a value (`takes`: None for any number of values or one, else argparse's `nargs`).
    """
    from dseek.cli.main import VERBS, build_parser

    return {verb: _arguments(build_parser(verb)) for verb in sorted(VERBS)}


def _arguments(parser: argparse.ArgumentParser) -> list[dict[str, Any]]:
    """Describe the arguments of one parser."""
    described = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        described.append(
            {
                "names": action.option_strings or [action.dest],
                "required": action.required,
                "choices": None if action.choices is None else [str(choice) for choice in action.choices],
                "takes": action.nargs,
            }
        )
    return sorted(described, key=lambda argument: argument["names"])


def render() -> str:
    """Write the flags as the JSON text that flags.json holds."""
    verbs = []
    for verb, arguments in collect().items():
        lines = ",\n".join(f"    {json.dumps(argument)}" for argument in arguments)
        verbs.append(f"  {json.dumps(verb)}: [\n{lines}\n  ]")
    return "{\n" + ",\n".join(verbs) + "\n}\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        FROZEN.write_text(render())
    else:
        print(render(), end="")
