"""Options that several verbs share, so that they read, mean and fail the same everywhere."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dseek.cli.engine_options import engine_options_from
from dseek.cli.precision_options import add_precision_options, precision_from
from dseek.core.attention_pattern import KINDS, WINDOWS
from dseek.core.errors import DseekError

if TYPE_CHECKING:
    from dseek.engine.llm import LLM
    from dseek.engine.request import SamplingParams
    from dseek.models.files import ModelFiles
    from dseek.parallel.ranks import Ranks

ROPE_SCALINGS = ("auto", "yarn", "dynamic", "linear", "none")
"""Ways to go beyond the positions a model was made for, as in `dseek.models.long_positions`."""

ATTENTIONS = ("auto", *KINDS)
"""What attention may be asked for."""

SHARD_STRATEGIES = ("auto", "contiguous", "zigzag")
"""Ways to share a long prompt out to ranks, as in `dseek.parallel.strategy`."""


def positive_int(text: str) -> int:
    """Read a whole number of at least 1 (an argparse type).

    Args:
        text: what the user wrote.

    Returns:
        The number.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def positive_ints(text: str) -> tuple[int, ...]:
    """Read whole numbers of at least 1, separated by commas (an argparse type).

    Args:
        text: such as `128,1024`.

    Returns:
        The numbers in the order given.

    Raises:
        argparse.ArgumentTypeError: one of them is not a number of at least 1.
    """
    return tuple(positive_int(part.strip()) for part in text.split(","))


def share(text: str) -> float:
    """Read a number between 0 and 1 (an argparse type).

    Args:
        text: what the user wrote.

    Returns:
        The number.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below 1")
    return value


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the MODEL argument.

    Args:
        parser: the verb's parser.
    """
    parser.add_argument(
        "model", metavar="MODEL", help="a folder in Hugging Face layout, a .gguf file, an alias (smollm2) or a hub id"
    )


def add_position_options(parser: argparse._ActionsContainer) -> None:
    """Add the options that raise a model's limit of positions: --max-position-embeddings, --rope-scaling.

    Args:
        parser: the verb's parser, or a group of it.
    """
    parser.add_argument(
        "--max-position-embeddings",
        type=positive_int,
        metavar="N",
        help="let positions go up to N, beyond what the model was made for (ask for them with --context)",
    )
    parser.add_argument(
        "--rope-scaling",
        choices=ROPE_SCALINGS,
        help="how those positions are rotated (default: auto, which was chosen by measured perplexity)",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide how a model runs: --plan, precision, --threads, --context, positions
    and attention.

    Args:
        parser: the verb's parser.
    """
    group = parser.add_argument_group("how it runs")
    group.add_argument("--plan", metavar="FILE", help="run a plan saved by `dseek plan --save` and decide nothing anew")
    add_calibration_option(group)
    add_precision_options(group, "the plan's")
    group.add_argument("--threads", type=positive_int, metavar="N", help="threads (default: the plan's choice)")
    group.add_argument("--context", type=positive_int, metavar="N", help="tokens a conversation may hold")
    add_position_options(group)
    add_attention_options(group)


def add_calibration_option(parser: argparse._ActionsContainer) -> None:
    """Add --calibration.

    Args:
        parser: the verb's parser, or a group of it.
    """
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="plan with what `dseek calibrate` measured of this model (default: calibration.json beside it, if any)",
    )


def add_shard_option(parser: argparse.ArgumentParser) -> None:
    """Add --shard-strategy.

    Args:
        parser: the verb's parser.
    """
    parser.add_argument(
        "--shard-strategy",
        choices=SHARD_STRATEGIES,
        help="share long prompts out to the ranks that torchrun has started (default: each process runs alone)",
    )


def ranks_from(args: argparse.Namespace) -> Ranks | None:
    """Meet the other ranks, if `add_shard_option` parsed a strategy.

    Args:
        args: parsed arguments.

    Returns:
        This process among its peers, or None where it runs alone. Only rank 0 writes to stdout.

    Raises:
        DseekError: nothing says who the peers are, or one did not come.
    """
    if args.shard_strategy is None:
        return None
    from dseek.engine.sharding import meet

    return meet(args.shard_strategy)


def is_first(ranks: Ranks | None) -> bool:
    """Say whether this process speaks for all.

    Args:
        ranks: from `ranks_from`.
    """
    return ranks is None or ranks.rank == 0


def add_attention_options(parser: argparse._ActionsContainer) -> None:
    """Add the options about attention: --attention, --attention-window, --attention-top-blocks, --attention-far,
    --attention-min-share.

    Args:
        parser: the verb's parser, or a group of it.
    """
    parser.add_argument(
        "--attention",
        choices=ATTENTIONS,
        help="what a position attends to: everything, a window, or a window and the best blocks (default: auto)",
    )
    parser.add_argument(
        "--attention-window",
        choices=("auto", *map(str, WINDOWS)),
        metavar="N",
        help="tokens of the window: 64, 128, ... 4096, or auto, one a head (alone it means --attention window)",
    )
    parser.add_argument(
        "--attention-top-blocks",
        type=positive_int,
        metavar="K",
        help="blocks of 64 tokens that are selected (means --attention dynamic)",
    )
    parser.add_argument(
        "--attention-far",
        action=argparse.BooleanOptionalAction,
        help="let what is not selected count by its means, or leave it out (means --attention dynamic)",
    )
    parser.add_argument(
        "--attention-min-share",
        type=share,
        metavar="S",
        help="share of its attention, such as 0.02, for which a query opens a block (means --attention dynamic)",
    )


def attention_from(args: argparse.Namespace) -> dict[str, Any]:
    """Collect what `add_attention_options` parsed.

    Args:
        args: parsed arguments.

    Returns:
        Keyword arguments of `dseek.load`.
    """
    window = args.attention_window
    return {
        "attention": args.attention,
        "attention_window": window if window in (None, "auto") else int(window),
        "attention_top_blocks": args.attention_top_blocks,
        "attention_far": args.attention_far,
        "attention_min_share": args.attention_min_share,
    }


def add_request_options(parser: argparse.ArgumentParser, *aliases: str) -> None:
    """Add the options that say what a typical request is: --prompt-tokens, --answer-tokens.

    Args:
        parser: the verb's parser.
        aliases: older names of --prompt-tokens.
    """
    group = parser.add_argument_group("the typical request, which is planned for")
    group.add_argument(
        "--prompt-tokens",
        *aliases,
        type=positive_int,
        metavar="N",
        help="tokens of its prompt (default: what fills --context, else 512)",
    )
    group.add_argument(
        "--answer-tokens",
        type=positive_int,
        metavar="N",
        help="tokens of its answer (default: 128, or a fifth of a short --context)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json.

    Args:
        parser: the verb's parser.
    """
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, for machines")


def add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int, temperature: float) -> None:
    """Add the sampling options.

    Args:
        parser: the verb's parser.
        max_tokens: default length of an answer, in tokens.
        temperature: default temperature.
    """
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=positive_int, default=max_tokens, metavar="N", help="longest answer (default: %(default)s)"
    )
    group.add_argument(
        "--temperature", type=float, default=temperature, metavar="T", help="0 is greedy (default: %(default)s)"
    )
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens (0: all)")
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest tokens whose sum reaches P"
    )
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="drop tokens less likely than P times the likeliest"
    )
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1 makes seen tokens less likely"
    )
    group.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable (default: a fresh one)")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer before TEXT (may be repeated)"
    )


def sampling_from(args: argparse.Namespace) -> SamplingParams:
    """Collect what `add_sampling` parsed.

    Args:
        args: parsed arguments.

    Returns:
        Checked sampling parameters.

    Raises:
        RequestError: a value is out of its range.
    """
    from dseek.engine.request import SamplingParams

    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        max_new_tokens=args.max_tokens,
        stop=tuple(args.stop),
    )


def open_from(args: argparse.Namespace) -> ModelFiles:
    """Open the model that `add_model` and `add_position_options` parsed.

    Args:
        args: parsed arguments.

    Returns:
        Its files, with the positions that were asked for.

    Raises:
        DseekError: the model cannot be opened, or not with these positions.
    """
    from dseek.models.files import open_model
    from dseek.models.long_positions import extend_positions

    files = open_model(args.model)
    try:
        files.shape = extend_positions(files.shape, args.max_position_embeddings, args.rope_scaling)
    except DseekError:
        files.close()
        raise
    return files


def load_from(args: argparse.Namespace, files: ModelFiles | None = None, **overrides: Any) -> LLM:
    """Load the model that `add_model` and `add_run_options` parsed; measures the machine if nobody has yet.

    Args:
        args: parsed arguments.
        files: the model's opened files, if they are open already; they belong to the returned object.
        overrides: keyword arguments of `dseek.load` that replace or join those from the command line.

    Returns:
        The loaded model.

    Raises:
        DseekError: the model, the plan or an option is unusable.
    """
    from dseek.cli.measuring import measured_machine, shown_calibration
    from dseek.cli.past import corrected_machine
    from dseek.engine.llm import load

    options: dict[str, Any] = {
        **precision_from(args),
        "plan": args.plan,
        "context": args.context,
        "threads": args.threads,
        "calibration": args.calibration,
        "max_position_embeddings": args.max_position_embeddings,
        "rope_scaling": args.rope_scaling,
        **attention_from(args),
        **engine_options_from(args),
    }
    options["shard_strategy"] = getattr(args, "shard_strategy", None)
    options.update(overrides)
    # Where several ranks run, the first one plans for all.
    if options["plan"] is None and (options["shard_strategy"] is None or is_first(ranks_from(args))):
        options["machine"] = corrected_machine(measured_machine(), ignore=getattr(args, "no_history", False))
    with shown_calibration():
        return load(args.model if files is None else files, **options)
