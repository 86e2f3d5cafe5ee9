"""`dseek plan MODEL`: what would be run, how fast, in how much memory, and why so and not otherwise."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dseek.cli.options import (
    add_attention_options,
    add_calibration_option,
    add_json,
    add_model,
    add_position_options,
    add_request_options,
    attention_from,
    open_from,
    positive_int,
)
from dseek.cli.past import add_history_option, corrected_machine, note
from dseek.cli.precision_options import add_precision_options, precision_from
from dseek.cli.show_attention import add_show_attention, check_options, draw, summary_line
from dseek.cli.what_if import add_what_if_options, check_what_if, run_what_if, show_front

if TYPE_CHECKING:
    from rich.table import Table

    from dseek.core.shape import ModelShape
    from dseek.hardware.machine import Machine
    from dseek.plan.attention_wish import AttentionWish
    from dseek.plan.explain import Choice
    from dseek.plan.head_facts import HeadFacts
    from dseek.plan.objective import Objective
    from dseek.plan.plan import Plan

HELP = "plan a run of a model and explain the choices"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments.

    Args:
        parser: the verb's parser.
    """
    add_model(parser)
    parser.add_argument(
        "--objective",
        choices=("latency", "throughput", "memory"),
        default="latency",
        help="what counts: the soonest answer, the most tokens a second, the least memory (default: %(default)s)",
    )
    parser.add_argument("--context", type=positive_int, metavar="N", help="tokens a sequence may hold")
    add_position_options(parser)
    parser.add_argument("--batch", type=positive_int, metavar="N", help="sequences at a time")
    parser.add_argument(
        "--max-quality-loss",
        type=float,
        metavar="X",
        help="accepted rise of perplexity, as a fraction (default: 0.005)",
    )
    parser.add_argument("--memory-limit", type=_size, metavar="SIZE", help="memory allowed, such as 8GB or 900MB")
    add_precision_options(parser, "chosen")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="threads (default: chosen)")
    add_calibration_option(parser)
    parser.add_argument("--save", metavar="FILE", help="write the plan to a file that every command takes as --plan")
    add_request_options(parser, "--prompt")
    add_attention_options(parser.add_argument_group("attention"))
    add_show_attention(parser)
    add_what_if_options(parser)
    add_history_option(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Plan and print.

    Args:
        args: parsed arguments.

    Returns:
        0.

    Raises:
        DseekError: the model cannot be opened, a wish cannot be granted, the memory does not suffice, or the picture of
            attention cannot be drawn.
    """
    from dseek.cli.measuring import measured_machine, shown_calibration
    from dseek.engine.calibrated import calibrated
    from dseek.engine.head_facts import head_facts
    from dseek.plan.attention_wish import AttentionWish
    from dseek.plan.objective import DEFAULT_QUALITY_LOSS, Objective
    from dseek.plan.plan import make

    check_options(args)
    check_what_if(args)
    if args.machine is not None:
        return run_what_if(args)
    loss = DEFAULT_QUALITY_LOSS if args.max_quality_loss is None else args.max_quality_loss
    objective = Objective(
        kind=args.objective,
        context_tokens=args.context,
        batch=args.batch,
        prompt_tokens=args.prompt_tokens,
        answer_tokens=args.answer_tokens,
        max_quality_loss=loss,
        memory_limit_bytes=args.memory_limit,
    )
    asked = attention_from(args)
    wish = AttentionWish(
        kind=asked["attention"],
        window_tokens=asked["attention_window"],
        top_blocks=asked["attention_top_blocks"],
        far=asked["attention_far"],
        min_share=asked["attention_min_share"],
    )
    files = open_from(args)
    try:
        shape, encodings = files.shape, files.encodings()
        with shown_calibration():
            heads = head_facts(files, wish)
        measured = calibrated(files, args.calibration)
    finally:
        files.close()
    measured_here = measured_machine()
    machine = corrected_machine(measured_here, ignore=args.no_history)
    if args.pareto:
        return _pareto(args, shape, machine, objective, encodings, wish, heads, measured)
    plan = make(
        shape,
        machine,
        objective,
        encodings=encodings,
        model=args.model,
        **precision_from(args),
        num_threads=args.threads,
        attention=wish,
        heads=heads,
        **measured,
    )
    if args.save:
        plan.save(args.save)
    drawn = draw(args, plan) if args.show_attention is not None else None
    if args.json:
        shown = plan.to_json()
        print(shown if drawn is None else json.dumps(json.loads(shown) | {"shown_attention": drawn}, indent=1))
        return 0
    from rich.console import Console

    console = Console()
    console.print(_summary(plan, machine))
    if machine is not measured_here and (text := note(measured_here)):
        console.print(f"predictions are corrected {text}", highlight=False)
    for choice in plan.choices:
        console.print(_choice(choice))
    if drawn is not None:
        print(summary_line(drawn))
    return 0


def _pareto(
    args: argparse.Namespace,
    shape: ModelShape,
    machine: Machine,
    objective: Objective,
    encodings: Mapping[str, int],
    wish: AttentionWish,
    heads: HeadFacts,
    measured: Mapping[str, Any],
) -> int:
    """Show the front on this machine."""
    from dseek.plan.candidates import Wishes
    from dseek.plan.pareto import explore
    from dseek.plan.quality import MeasuredLosses

    wishes = Wishes(
        model=args.model,
        **{"cache_dtype": None, **precision_from(args)},
        num_threads=args.threads,
        prefill_chunk_tokens=None,
        kernels=None,
        attention=wish,
        heads=heads,
    )
    losses = measured.get("losses")
    losses = losses if isinstance(losses, MeasuredLosses) else MeasuredLosses(projections=losses or {})
    points = explore(shape, machine, objective, encodings, wishes, losses)
    what = "a token" if objective.kind == "throughput" else "a request"
    return show_front(args, points, f"{args.model} on this machine, seconds {what}")


def _size(text: str) -> int:
    """Read a size such as 8GB, 512MiB or 1000000 (an argparse type)."""
    lowered = text.strip().lower().removesuffix("b")
    scales = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    suffix = next((name for name in scales if lowered.endswith(name)), "")
    try:
        value = float(lowered.removesuffix(suffix)) * scales.get(suffix, 1)
        if 1 <= value < 2**60:
            return int(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8GB or 900MB")


def _summary(plan: Plan, machine: Machine) -> Table:
    from rich.table import Table

    from dseek.hardware.store import BUSY
    from dseek.plan.activation_limits import FACTOR
    from dseek.plan.attention_wish import dense_heads_text, patterns_text
    from dseek.plan.explain import size_text
    from dseek.plan.weights import formats_text

    predicted, rope = plan.predicted, plan.shape.rope
    # How much of the memory's bandwidth the decode step would use, where one sequence is decoded at a time.
    streamed_gbs = predicted.streamed_bytes * predicted.decode_tokens_s / plan.max_batch * 1e-9
    share = f" ({100 * streamed_gbs / machine.read_bandwidth_gbs:.0f} % of the read bandwidth)"
    # A plan file from elsewhere may leave the request open; `make` does not.
    prompt, answer = plan.objective.request(plan.context_tokens)
    memory = (
        f"{size_text(predicted.peak_bytes)}: weights {size_text(predicted.weights_bytes)}, cache "
        f"{size_text(predicted.cache_bytes)}, process and workspace {size_text(predicted.workspace_bytes)}"
    )
    dense_heads = dense_heads_text(plan.attention_patterns, plan.shape.num_kv_heads)
    rows: tuple[tuple[str, str], ...] = (
        ("objective", plan.objective.kind),
        ("typical request", f"prompt of {prompt} tokens, answer of {answer}, in a context of {plan.context_tokens}"),
        ("weights", f"{plan.precision}, stored as {formats_text(plan.layer_formats)}; tables {plan.embedding_format}"),
        ("positions", f"at most {plan.shape.max_position_embeddings}, rotary embedding: {rope.kind}"),
        ("attention", "; ".join(filter(None, (patterns_text(plan.attention_patterns), dense_heads)))),
        ("cache", f"{plan.cache_dtype}, {plan.num_pages} pages of {plan.page_tokens} tokens"),
        ("sequences x context", f"{plan.max_batch} x {plan.context_tokens}"),
        ("kernels, threads, chunk", f"{plan.kernels}, {plan.num_threads}, {plan.prefill_chunk_tokens} tokens"),
        ("prefill", f"{predicted.prefill_tokens_s:,.0f} tokens/s for a prompt of {prompt} tokens"),
        ("decode", f"{predicted.decode_tokens_s:,.0f} tokens/s after {prompt} tokens{share}"),
        ("memory", memory),
        ("loading", f"{predicted.load_s:.2f} s"),
    )
    watched = sum(any(limits.by_role().values()) for limits in plan.activation_limits)
    if watched:
        rows += (
            ("inputs", f"of {watched} layers are watched; beyond {FACTOR:g} times the calibrated, a wider format"),
        )
    if machine.other_load > BUSY:
        busy = f"others kept {machine.other_load:.1f} processors busy while the machine was measured"
        rows += (("beware", f"{busy}; when it is quiet, run `dseek doctor --refresh`"),)
    table = Table(title=f"Plan for {plan.model}", title_justify="left", show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    return table


def _choice(choice: Choice) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from dseek.plan.explain import loss_text, size_text

    table = Table(
        title=f"{choice.name}: {escape(choice.chosen)} - {escape(choice.why)}", title_justify="left", title_style="bold"
    )
    for name in ("value", "prefill, tokens/s", "decode, tokens/s", "memory", "quality loss", "why not"):
        table.add_column(name, justify="left" if name in ("value", "why not") else "right")
    for entry in choice.alternatives:
        table.add_row(
            escape(entry.value),
            f"{entry.prefill_tokens_s:,.0f}",
            f"{entry.decode_tokens_s:,.0f}",
            size_text(entry.peak_bytes),
            loss_text(entry.quality_loss),
            escape(entry.rejected) or "chosen",
            style="bold" if not entry.rejected else None,
        )
    return table
