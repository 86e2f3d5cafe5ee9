"""`dseek profile MODEL`: answers a prompt and says where the time went, operator by operator and layer by layer."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dseek.cli.options import add_model, add_run_options, load_from, open_from, positive_int
from dseek.core.errors import RequestError
from dseek.profiler.outputs import add_outputs, write_outputs

if TYPE_CHECKING:
    from dseek.models.files import ModelFiles

HELP = "show where a run's time goes, beside the roofline, and what would help"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments.

    Args:
        parser: the verb's parser.
    """
    add_model(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="answer this text (default: random tokens)")
    parser.add_argument(
        "--prompt-tokens", type=positive_int, default=128, metavar="N", help="random tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=positive_int, default=32, metavar="N", help="tokens of the answer (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=positive_int, default=1, metavar="N", help="answers at once (default: %(default)s)"
    )
    parser.add_argument(
        "--no-warm-up", action="store_true", help="profile the first run, when pages are not mapped yet"
    )
    add_run_options(parser)
    add_outputs(parser)


def run(args: argparse.Namespace) -> int:
    """Run the model under the profiler and report.

    Args:
        args: parsed arguments.

    Returns:
        The exit status.

    Raises:
        DseekError: the model, an option or a report's place is unusable.
    """
    from dseek.cli.report import plan_line, planned_machine
    from dseek.engine.runner import torch_modules
    from dseek.profiler.session import ProfileSession

    files = open_from(args)
    prompts = _prompts(args, files)
    tokens = len(prompts[0])
    job = {} if args.plan is not None else {"context": args.context or tokens + args.max_tokens}
    if args.plan is None and tokens + args.max_tokens <= job["context"]:
        job |= {"prompt_tokens": tokens, "answer_tokens": args.max_tokens}
    with load_from(args, files, batch=args.batch, **job) as llm:
        sampling = {"max_new_tokens": args.max_tokens, "ignore_eos": True, "detokenize": False}
        if not args.no_warm_up:
            llm.generate(prompts, **{**sampling, "max_new_tokens": min(2, args.max_tokens)})
        title = f"{llm.files.name}, {args.batch} x {tokens} tokens and {args.max_tokens} more, {plan_line(llm.plan)}"
        session = ProfileSession(
            title,
            machine=planned_machine(llm.plan),
            use_torch=llm.plan.kernels == "torch",
            timeline=bool(args.trace),
            modules=torch_modules(llm.engine.runner),
        )
        with session:
            llm.generate(prompts, **sampling)
    write_outputs(args, session.result)
    return 0


def _prompts(args: argparse.Namespace, files: ModelFiles) -> list[list[int]]:
    """Token ids of every prompt."""
    if args.prompt is not None:
        from dseek.engine.prompts import text_token_ids

        token_ids = text_token_ids(files, args.prompt)
        if not token_ids:
            raise RequestError("the prompt has no tokens", needed="at least one")
        return [list(token_ids)] * args.batch
    import numpy as np

    generator = np.random.default_rng(0)
    return generator.integers(0, files.shape.vocab_size, (args.batch, args.prompt_tokens)).tolist()
