"""Options about the engine's loop, which change how fast an answer comes and not what it says."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dseek.engine.llm import LLM


def add_speculation_option(parser: argparse._ActionsContainer) -> None:
    """Add --speculate.

    Args:
        parser: the verb's parser, or a group of it.
    """
    parser.add_argument(
        "--speculate",
        type=int,
        default=0,
        metavar="N",
        help="guess N tokens at a time from what stood before and check them in one step (default: 0, none)",
    )


def add_prefix_cache_option(parser: argparse._ActionsContainer) -> None:
    """Add --no-prefix-cache, and the opposite.

    Args:
        parser: the verb's parser, or a group of it.
    """
    parser.add_argument(
        "--prefix-cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep what was computed for prompts that begin alike (default: yes)",
    )


def engine_options_from(args: argparse.Namespace) -> dict[str, Any]:
    """Collect what the options above parsed, as far as the verb has them.

    Args:
        args: parsed arguments.

    Returns:
        Keyword arguments of `dseek.load`.
    """
    return {name: getattr(args, name) for name in ("prefix_cache", "speculate") if hasattr(args, name)}


def guesses(llm: LLM) -> dict[str, int]:
    """Tell how speculation went, as `--json` has it.

    Args:
        llm: the model that ran.

    Returns:
        `drafted_tokens` and `accepted_tokens` of all requests so far; nothing where none was asked for.
    """
    counters = llm.engine.counters
    if llm.engine.options.speculate == 0:
        return {}
    return {"drafted_tokens": counters.drafted_tokens, "accepted_tokens": counters.accepted_tokens}


def guesses_line(llm: LLM) -> str:
    """Tell it for people; empty where nothing was guessed.

    Args:
        llm: the model that ran.
    """
    counters = llm.engine.counters
    if not counters.drafted_tokens:
        return ""
    return f"; {counters.accepted_tokens} of {counters.drafted_tokens} guessed tokens were right"
