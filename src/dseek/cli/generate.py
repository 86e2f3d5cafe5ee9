"""`dseek generate MODEL PROMPT`: one answer on stdout as it comes, its speed beside the machine's limit on stderr."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from dseek.cli.engine_options import add_speculation_option, guesses, guesses_line
from dseek.cli.options import (
    add_json,
    add_model,
    add_run_options,
    add_sampling,
    add_shard_option,
    is_first,
    load_from,
    open_from,
    ranks_from,
    sampling_from,
)
from dseek.core.errors import RequestError

if TYPE_CHECKING:
    from dseek.engine.llm import LLM
    from dseek.engine.request import Request
    from dseek.models.files import ModelFiles
    from dseek.parallel.ranks import Ranks

HELP = "answer one prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments.

    Args:
        parser: the verb's parser.
    """
    add_model(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="the text to go on from; - reads it from stdin")
    parser.add_argument(
        "--chat", action="store_true", help="ask the prompt as a question, by the model's chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions before the question (implies --chat)")
    parser.add_argument("--quiet", action="store_true", help="print no speeds on stderr")
    add_sampling(parser, max_tokens=128, temperature=0.0)
    add_run_options(parser)
    add_speculation_option(parser)
    add_shard_option(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Answer the prompt.

    Args:
        args: parsed arguments.

    Returns:
        The exit status.

    Raises:
        DseekError: the model, an option or the prompt is unusable.
    """
    from dseek.engine.prompts import chat_token_ids, text_token_ids

    started_s = time.perf_counter()
    params = sampling_from(args)
    ranks = ranks_from(args)
    prompt = _read_prompt(args.prompt, ranks)

    # 1. The prompt and the answer's length decide what is planned for, so they come before the plan.
    files = open_from(args)
    if args.chat or args.system is not None:
        token_ids = chat_token_ids(files, _messages(args.system, prompt))
    else:
        token_ids = text_token_ids(files, prompt)
    if not token_ids:
        raise RequestError("the prompt has no tokens", needed="at least one")

    # 2. Load and answer.
    with load_from(args, files, batch=1, **_request(args, files, len(token_ids))) as llm:
        load_s = time.perf_counter() - started_s
        request = llm.submit(token_ids, params)
        for piece in llm.pieces(request):
            if not args.json and is_first(ranks):
                sys.stdout.write(piece)
                sys.stdout.flush()
        if is_first(ranks):
            _finish(args, llm, request, load_s)
    return 0


def _read_prompt(prompt: str, ranks: Ranks | None) -> str:
    """The prompt, from stdin where it is a dash; ranks may share one stdin, which the first then reads for all."""
    if prompt != "-":
        return prompt
    text = None
    if is_first(ranks):
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise RequestError(f"stdin is not text ({error})", needed="UTF-8") from error
    if ranks is None:
        return text or ""
    from dseek.parallel.meeting import expecting

    with expecting("the prompt"):
        return ranks.broadcast_text(text)


def _messages(system: str | None, prompt: str) -> list[dict[str, str]]:
    """The conversation that asks the prompt."""
    messages = [{"role": "user", "content": prompt}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _request(args: argparse.Namespace, files: ModelFiles, num_prompt_tokens: int) -> dict[str, Any]:
    """What is planned for: this prompt, its answer and, unless asked for, just the context they need."""
    if args.plan is not None:
        return {"context": args.context}
    context = args.context or _context(args, files, num_prompt_tokens)
    if num_prompt_tokens >= context:
        return {"context": context}  # the engine refuses the prompt, with its own numbers
    answer_tokens = min(args.max_tokens, context - num_prompt_tokens)
    return {"context": context, "prompt_tokens": num_prompt_tokens, "answer_tokens": answer_tokens}


def _context(args: argparse.Namespace, files: ModelFiles, num_prompt_tokens: int) -> int:
    """Just the context this prompt and its answer need."""
    longest = files.shape.max_position_embeddings
    if num_prompt_tokens >= longest:
        raise RequestError(
            f"the prompt has {num_prompt_tokens} tokens", needed=f"fewer than the {longest} the model was made for"
        )
    return min(num_prompt_tokens + args.max_tokens, longest)


def _finish(args: argparse.Namespace, llm: LLM, request: Request, load_s: float) -> None:
    """Print what comes after the answer."""
    from dseek.cli.report import fallback_line, fallbacks, plan_line, planned_machine, speed_line, speeds

    output = request.output()
    machine = planned_machine(llm.plan)
    if args.json:
        found: dict[str, Any] = {
            "model": llm.files.name,
            "text": output.text,
            "token_ids": output.token_ids,
            "finish_reason": output.finish_reason,
            "precision": llm.plan.precision,
            "kernels": llm.plan.kernels,
            "num_threads": llm.plan.num_threads,
            "load_s": load_s,
            **fallbacks(llm),
            **guesses(llm),
            **speeds(output, llm.plan, machine),
        }
        print(json.dumps(found))
        return
    print(flush=True)
    if not args.quiet:
        print(f"dseek: {speed_line(output, llm.plan, machine)}{guesses_line(llm)}", file=sys.stderr)
        print(f"dseek: {plan_line(llm.plan)}; ready after {load_s:.2f} s{fallback_line(llm)}", file=sys.stderr)
