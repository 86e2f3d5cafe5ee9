"""`dseek bench MODEL`: prefill and decode measured over contexts and batches, beside what the plan predicted.

Each case runs prompts of random tokens through the engine: the time until every prompt has its first token is the
prefill's, the median time of a step in which all sequences decode is the decode's. Of several repeats the median
counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dseek.cli.options import (
    add_json,
    add_model,
    add_run_options,
    add_shard_option,
    is_first,
    load_from,
    positive_int,
    positive_ints,
    ranks_from,
)
from dseek.cli.past import add_history_option, corrected_machine, remember
from dseek.core.errors import ConfigError

if TYPE_CHECKING:
    from dseek.cli.report import Limits
    from dseek.engine.llm import LLM
    from dseek.engine.request import SamplingParams
    from dseek.hardware.machine import Machine
    from dseek.plan.plan import Plan

DEFAULT_CONTEXTS = (128, 512, 2048)

HELP = "measure prefill and decode beside what the plan predicted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One measured combination."""

    context_tokens: int
    """Length of each prompt, and so the context decode begins with."""
    batch: int
    """Sequences at a time."""
    prefill_tokens_s: float
    """Prompt tokens a second, all sequences together."""
    prefill_predicted_tokens_s: float | None
    """What the plan expects; None where the machine was not measured."""
    prefill_limit_share: float | None
    """Share of the measured limit, a fraction."""
    decode_tokens_s: float
    """New tokens a second, all sequences together."""
    decode_predicted_tokens_s: float | None
    """What the plan expects."""
    decode_limit_share: float | None
    """Share of the measured limit, a fraction."""

    def errors(self) -> list[float]:
        """How far the predictions were off, as fractions of what was measured."""
        pairs = (
            (self.prefill_predicted_tokens_s, self.prefill_tokens_s),
            (self.decode_predicted_tokens_s, self.decode_tokens_s),
        )
        return [abs(predicted / measured - 1) for predicted, measured in pairs if predicted is not None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments.

    Args:
        parser: the verb's parser.
    """
    add_model(parser)
    parser.add_argument(
        "--contexts",
        type=positive_ints,
        metavar="N,N",
        help="prompt lengths, the longest of which is planned for (default: 128,512,2048, of which 512 is)",
    )
    parser.add_argument("--batches", type=positive_ints, default=(1, 8), metavar="N,N", help="sequences at once (1,8)")
    parser.add_argument(
        "--tokens", type=positive_int, default=32, metavar="N", help="decode steps of a case (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=positive_int, default=3, metavar="N", help="runs of a case (default: %(default)s)"
    )
    add_run_options(parser)
    add_shard_option(parser)
    add_history_option(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure all cases and print them.

    Args:
        args: parsed arguments.

    Returns:
        The exit status.

    Raises:
        DseekError: the model or an option is unusable, or a case does not fit the plan.
    """
    from dseek.cli.report import limits, planned_machine

    contexts = args.contexts or DEFAULT_CONTEXTS
    needed = max(contexts) + args.tokens
    ranks = ranks_from(args)
    # Every prompt is to be computed whole, whatever was measured before it.
    with load_from(args, batch=max(args.batches), prefix_cache=False, **_job(args, needed)) as llm:
        check_fits(llm.plan, needed, max(args.batches))
        measured = planned_machine(llm.plan)
        machine = None if measured is None else corrected_machine(measured, ignore=args.no_history)
        bounds = limits(llm.plan, measured)
        measure(llm, min(contexts), 1, 4, 1)  # Pages are mapped and clocks are up when it counts.
        show_progress = sys.stderr.isatty() and is_first(ranks)
        cases = []
        for context_tokens in contexts:
            for batch in args.batches:
                if show_progress:
                    print(f"\r\033[Kcontext {context_tokens}, batch {batch}", end="", file=sys.stderr, flush=True)
                prefill_s, decode_s = measure(llm, context_tokens, batch, args.tokens, args.repeats)
                cases.append(_case(llm.plan, machine, bounds, context_tokens, batch, prefill_s, decode_s))
        if show_progress:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        if measured is not None and ranks is None and not args.no_history:
            remember(llm.plan, measured, cases)
        if args.json and is_first(ranks):
            print(json.dumps(_summary(llm, bounds, cases)))
        elif is_first(ranks):
            _print_table(llm, bounds, cases)
    return 0


def _job(args: argparse.Namespace, needed_tokens: int) -> dict[str, Any]:
    """The context and what is planned for: the longest case if they were chosen, else as without any options."""
    if args.plan is not None or args.context is not None:
        return {"context": args.context if args.plan is None else None}
    if args.contexts is not None:
        return {"context": needed_tokens, "prompt_tokens": max(args.contexts)}
    from dseek.plan.objective import Objective

    prompt_tokens, answer_tokens = Objective().request(needed_tokens)
    return {"context": needed_tokens, "prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens}


def check_fits(plan: Plan, needed_tokens: int, batch: int) -> None:
    """Refuse cases that the plan has no room for.

    Args:
        plan: the plan.
        needed_tokens: positions of the longest case.
        batch: sequences of the largest case.

    Raises:
        ConfigError: there is no room.
    """
    if needed_tokens > plan.context_tokens:
        raise ConfigError(
            f"the longest case needs {needed_tokens} tokens",
            needed=f"at most the context's {plan.context_tokens}",
            remedy="shorten --contexts or --tokens, or raise --context",
        )
    if batch > plan.max_batch:
        raise ConfigError(f"a case has a batch of {batch}", needed=f"at most the plan's {plan.max_batch}")


def measure(llm: LLM, context_tokens: int, batch: int, num_steps: int, repeats: int) -> tuple[float, float]:
    """Measure one case.

    Args:
        llm: the model.
        context_tokens: length of each prompt.
        batch: sequences at a time.
        num_steps: decode steps.
        repeats: runs, of which the median counts.

    Returns:
        Seconds of the prefill of all prompts and of one decode step of all sequences.
    """
    from dseek.engine.request import SamplingParams

    params = SamplingParams(max_new_tokens=num_steps + 1, ignore_eos=True, detokenize=False)
    runs = [_run_once(llm, context_tokens, batch, params, repeat) for repeat in range(repeats)]
    return statistics.median(prefill for prefill, _ in runs), statistics.median(decode for _, decode in runs)


def _run_once(llm: LLM, context_tokens: int, batch: int, params: SamplingParams, seed: int) -> tuple[float, float]:
    """Seconds of one prefill and of the median decode step after it."""
    import numpy as np

    generator = np.random.default_rng(seed)
    prompts = generator.integers(0, llm.shape.vocab_size, (batch, context_tokens)).tolist()
    start_s = time.perf_counter()
    requests = [llm.submit(prompt, params) for prompt in prompts]
    try:
        while not all(request.first_token_s for request in requests):
            llm.engine.step()
        prefill_s = time.perf_counter() - start_s
        steps = []
        while not any(request.finished for request in requests):
            start_s = time.perf_counter()
            llm.engine.step()
            steps.append(time.perf_counter() - start_s)
    finally:
        for request in requests:
            llm.engine.abort(request)
    return prefill_s, statistics.median(steps) if steps else float("nan")


def _case(
    plan: Plan,
    machine: Machine | None,
    bounds: Limits | None,
    context_tokens: int,
    batch: int,
    prefill_s: float,
    decode_s: float,
) -> Case:
    """Put measured times beside predictions and limits."""
    num_prompt_tokens = batch * context_tokens
    predicted = None
    if machine is not None:
        predicted = plan.predict(machine, prompt_tokens=context_tokens, context_tokens=context_tokens, batch=batch)
    return Case(
        context_tokens=context_tokens,
        batch=batch,
        prefill_tokens_s=num_prompt_tokens / prefill_s,
        prefill_predicted_tokens_s=predicted.prefill_tokens_s if predicted else None,
        prefill_limit_share=bounds.prefill_share(num_prompt_tokens / prefill_s, num_prompt_tokens) if bounds else None,
        decode_tokens_s=batch / decode_s,
        decode_predicted_tokens_s=predicted.decode_tokens_s if predicted else None,
        decode_limit_share=bounds.decode_share(batch / decode_s, batch) if bounds else None,
    )


def _summary(llm: LLM, bounds: Limits | None, cases: list[Case]) -> dict[str, Any]:
    """Everything, for machines."""
    from dseek.cli.report import fallbacks

    errors = [error for case in cases for error in case.errors()]
    return {
        "model": llm.files.name,
        "machine_id": llm.plan.machine_id,
        "precision": llm.plan.precision,
        "kernels": llm.plan.kernels,
        "cache_dtype": llm.plan.cache_dtype,
        "num_threads": llm.plan.num_threads,
        "limits": asdict(bounds) if bounds else None,
        "median_prediction_error": statistics.median(errors) if errors else None,
        "cases": [asdict(case) for case in cases],
        **fallbacks(llm),
    }


def _print_table(llm: LLM, bounds: Limits | None, cases: list[Case]) -> None:
    """Everything, for people."""
    from rich.console import Console
    from rich.table import Table

    from dseek.cli.report import plan_line

    table = Table(title=f"{llm.files.name}: {plan_line(llm.plan)}", title_justify="left")
    for name in ("context", "batch", "prefill tokens/s", "predicted", "of limit"):
        table.add_column(name, justify="right")
    for name in ("decode tokens/s", "predicted", "of limit"):
        table.add_column(name, justify="right")
    for case in cases:
        table.add_row(
            f"{case.context_tokens:,}",
            str(case.batch),
            f"{case.prefill_tokens_s:,.0f}",
            *_beside(case.prefill_predicted_tokens_s, case.prefill_limit_share),
            f"{case.decode_tokens_s:,.0f}",
            *_beside(case.decode_predicted_tokens_s, case.decode_limit_share),
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    if bounds is not None:
        console.print(
            f"limits measured here: {bounds.bandwidth_gbs:.1f} GB/s read, {bounds.gflops:,.0f} GFLOP/s; "
            f"a step reads {bounds.streamed_bytes / 1e6:,.0f} MB of weights"
        )
        errors = [error for case in cases for error in case.errors()]
        console.print(f"predictions were off by {statistics.median(errors):.0%} (median)")
    else:
        console.print("this machine was not measured: `dseek doctor` does that")


def _beside(predicted: float | None, share: float | None) -> tuple[str, str]:
    """A prediction and a share, as cells."""
    return (
        "-" if predicted is None else f"{predicted:,.0f}",
        "-" if share is None else f"{share:.0%}",
    )
