"""`dseek eval MODEL --text FILE`: perplexity and next-token accuracy, by the kernels and precision of a real run."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dseek.cli.options import add_json, add_model, add_run_options, load_from, open_from, positive_int
from dseek.core.errors import RequestError

if TYPE_CHECKING:
    from dseek.models.files import ModelFiles
    from dseek.plan.plan import Plan

HELP = "perplexity and next-token accuracy on a text"

DEFAULT_WINDOW_TOKENS = 2048
"""Window where nobody asked for a length and the model claims at least so much."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments.

    Args:
        parser: the verb's parser.
    """
    add_model(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="the text, UTF-8; - reads stdin")
    parser.add_argument("--max-tokens", type=positive_int, metavar="N", help="use only the first N tokens of the text")
    add_run_options(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Score the text and print the scores.

    Args:
        args: parsed arguments.

    Returns:
        The exit status.

    Raises:
        DseekError: the model, the text or an option is unusable.
    """
    from dseek.cli.report import fallbacks
    from dseek.engine.evaluate import evaluate
    from dseek.engine.prompts import text_token_ids

    text = _read(args.text)
    files = open_from(args)
    with load_from(args, files, batch=1, **_job(args, files)) as llm:
        token_ids = text_token_ids(llm.files, text)[: args.max_tokens]
        window_tokens = min(args.context or llm.engine.context_tokens, llm.engine.context_tokens)
        progress = _Progress()
        scores = evaluate(llm, token_ids, window_tokens=window_tokens, progress=progress.show)
        progress.close()
        if args.json:
            found = {"model": llm.files.name, "text": args.text, "precision": llm.plan.precision}
            found |= {"kernels": llm.plan.kernels, "cache_dtype": llm.plan.cache_dtype, **asdict(scores)}
            print(json.dumps(found | {"tokens_s": scores.tokens_s, **fallbacks(llm)}))
        else:
            print(f"perplexity           {scores.perplexity:.4f}")
            print(f"next-token accuracy  {scores.accuracy:.2%}")
            print(f"tokens               {scores.num_tokens:,} in windows of {scores.window_tokens:,}")
            _print_speed(llm.plan, scores.tokens_s, scores.window_tokens)
    return 0


def _job(args: argparse.Namespace, files: ModelFiles) -> dict[str, Any]:
    """The window and what is planned for: what a run without options plans for, unless a context was asked for."""
    if args.plan is not None or args.context is not None:
        return {"context": args.context if args.plan is None else None}
    from dseek.plan.objective import Objective

    window_tokens = min(DEFAULT_WINDOW_TOKENS, files.shape.max_position_embeddings)
    prompt_tokens, answer_tokens = Objective().request(window_tokens)
    return {"context": window_tokens, "prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens}


def _read(name: str) -> str:
    """The text of a file or of stdin."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{name} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not text ({error})", needed="UTF-8") from error
    if not text:
        raise RequestError(f"{name} is empty", needed="a text of at least two tokens")
    return text


def _print_speed(plan: Plan, tokens_s: float, window_tokens: int) -> None:
    """How fast it was, beside the limit; the head's products for every position count in the time, not in the limit."""
    from dseek.cli.report import limits, plan_line, planned_machine

    bounds = limits(plan, planned_machine(plan))
    share = f", {bounds.prefill_share(tokens_s, window_tokens):.0%} of the limit" if bounds else ""
    print(f"dseek: {tokens_s:,.0f} tokens/s{share}; {plan_line(plan)}", file=sys.stderr)


class _Progress:
    """How far the evaluation is: a line that is overwritten on a terminal, else a line every ten seconds."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown_s = time.perf_counter()

    def show(self, num_done: int, num_tokens: int, perplexity: float) -> None:
        """Show a state.

        Args:
            num_done: tokens predicted.
            num_tokens: tokens to predict.
            perplexity: so far.
        """
        line = f"{num_done:,} of {num_tokens:,} tokens, perplexity {perplexity:.3f}"
        if self._terminal:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        elif time.perf_counter() - self._shown_s > 10:
            self._shown_s = time.perf_counter()
            print(f"dseek: {line}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clear the line."""
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
