"""`dseek tune MODEL`: measures how many sequences at a time give the least time a token here, beside the prediction.

The same question that `dseek plan MODEL --machine FILE` answers for a machine that is only described.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from dseek.cli.bench import measure
from dseek.cli.options import add_json, add_model, add_run_options, load_from, positive_int, positive_ints
from dseek.cli.past import add_history_option

if TYPE_CHECKING:
    from rich.table import Table

HELP = "find the batch size of least time a token by measurement"

TIE = 1.03
"""Batches within so much of the least time are as good; the smallest of them is taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """One batch size."""

    batch: int
    """Sequences at a time."""
    step_s: float
    """Time until every sequence has its next token."""
    token_s: float
    """The same, a token."""
    predicted_token_s: float | None
    """What the plan expects; None where the machine was not measured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments.

    Args:
        parser: the verb's parser.
    """
    add_model(parser)
    parser.add_argument(
        "--batches", type=positive_ints, default=(1, 2, 4, 8, 16, 32), metavar="N,N", help="sizes to try (1,2,4,...32)"
    )
    parser.add_argument(
        "--prompt-tokens", type=positive_int, default=128, metavar="N", help="prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=positive_int, default=16, metavar="N", help="decode steps of a run (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=positive_int, default=3, metavar="N", help="runs of a size (default: 3)")
    parser.add_argument("--save", metavar="FILE", help="write a plan for the best size, for --plan")
    add_run_options(parser)
    add_history_option(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure every size and name the best.

    Args:
        args: parsed arguments.

    Returns:
        The exit status.

    Raises:
        DseekError: the model or an option is unusable, or the memory does not suffice for the largest size.
    """
    import dataclasses

    from dseek.cli.bench import check_fits
    from dseek.cli.report import planned_machine
    from dseek.plan.layout import PAGE_TOKENS

    needed = args.prompt_tokens + args.tokens + 1
    job = {} if args.plan is not None else {"context": args.context or needed}
    tried = []
    with load_from(args, batch=max(args.batches), objective="throughput", **job) as llm:
        check_fits(llm.plan, needed, max(args.batches))
        machine = planned_machine(llm.plan)
        for batch in sorted(set(args.batches)):
            if sys.stderr.isatty():
                print(f"\r\033[Kbatch {batch}", end="", file=sys.stderr, flush=True)
            _, step_s = measure(llm, args.prompt_tokens, batch, args.tokens, args.repeats)
            predicted = None
            if machine is not None:
                expected = llm.plan.predict(
                    machine, prompt_tokens=args.prompt_tokens, context_tokens=args.prompt_tokens, batch=batch
                )
                predicted = 1 / expected.decode_tokens_s
            tried.append(Tried(batch=batch, step_s=step_s, token_s=step_s / batch, predicted_token_s=predicted))
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        chosen = best_of(tried)
        if args.save:
            pages = chosen.batch * -(-llm.plan.context_tokens // PAGE_TOKENS)
            dataclasses.replace(llm.plan, max_batch=chosen.batch, num_pages=pages).save(args.save)
        if args.json:
            print(json.dumps({"best_batch": chosen.batch, "tried": [asdict(entry) for entry in tried]}))
            return 0
        from rich.console import Console

        console = Console()
        console.print(_table(tried, chosen))
        console.print(f"least time a token: {chosen.batch} at a time, {1 / chosen.token_s:,.0f} tokens/s")
    return 0


def best_of(tried: list[Tried]) -> Tried:
    """Take the smallest size within 3 % of the least time a token.

    Args:
        tried: at least one.
    """
    least = min(entry.token_s for entry in tried)
    return min((entry for entry in tried if entry.token_s <= TIE * least), key=lambda entry: entry.batch)


def _table(tried: list[Tried], chosen: Tried) -> Table:
    from rich.table import Table

    table = Table(title="Batches", title_justify="left")
    for name in ("batch", "ms a step", "ms a token", "predicted", "tokens/s"):
        table.add_column(name, justify="right")
    for entry in tried:
        predicted = "-" if entry.predicted_token_s is None else f"{1e3 * entry.predicted_token_s:.3g}"
        table.add_row(
            str(entry.batch),
            f"{1e3 * entry.step_s:.3g}",
            f"{1e3 * entry.token_s:.3g}",
            predicted,
            f"{1 / entry.token_s:,.0f}",
            style="bold" if entry is chosen else None,
        )
    return table
