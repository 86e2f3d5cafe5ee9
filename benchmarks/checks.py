"""Is what was timed also right? Greedy answers and losses are judged by transformers in fp32 on the same weights.

An answer is judged by its regret: by how many nats its tokens are less likely, under the reference, than the tokens
the reference would have chosen. Rounding that flips near ties costs next to nothing, a wrong model costs several nats.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.errors import IncorrectError
from benchmarks.models import BenchModel, hf_folder
from benchmarks.peers.client import PeerProcess
from benchmarks.scoring import agreement, perplexity

OWN_REGRET = 0.1
"""Largest mean regret of dseek's answers, nats a token."""

PEER_REGRET = 1.0
"""The same for a peer: shows that it runs this model at all; its rounding is its own affair."""

QUICK_LOSS = 0.02
"""Largest change of the mean loss, in nats, over the short text that is checked beside every speed, beside twice the
standard error of that change: a short text cannot tell more."""


def check_answers(
    model: BenchModel,
    prompts: Sequence[list[int]],
    answers: dict[str, list[dict[str, Any]]],
    own_name: str,
    *,
    threads: int,
    max_prompts: int = 2,
    positions: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Judge what the engines said while they were timed.

    Args:
        model: the model.
        prompts: the prompts, by `prompt_idx`.
        answers: from `contest.generate_in_turn`.
        own_name: which of them is dseek's.
        threads: threads of the reference.
        max_prompts: how many prompts to judge.
        positions: to how many positions an engine extended the model, for those that did.

    Returns:
        Mean regret of each engine.

    Raises:
        IncorrectError: an engine's answers are unlikely.
    """
    means = {}
    of_engine = {name: (positions or {}).get(name) for name in answers}
    for reached in dict.fromkeys(of_engine.values()):
        with reference(model, threads=threads, positions=reached) as judge:
            for name in (name for name in answers if of_engine[name] == reached):
                regrets: list[float] = []
                for answer in answers[name][:max_prompts]:
                    prompt = prompts[answer["prompt_idx"]]
                    regrets += judge.call("regret", prompt=prompt, answer=answer["token_ids"])["regrets"]
                means[name] = statistics.fmean(regrets)
    for name, mean in means.items():
        limit = OWN_REGRET if name == own_name else PEER_REGRET
        if not mean <= limit:
            raise IncorrectError(f"{name}: the answers' mean regret is {mean:.3f} nats, at most {limit} is right")
    return {"regret": means}


def check_losses(
    own: PeerProcess,
    model: BenchModel,
    token_ids: list[int],
    window: int,
    *,
    threads: int,
    config: dict[str, Any] | None = None,
    positions: int | None = None,
) -> dict[str, Any]:
    """Compare dseek's perplexity over a short text with the reference's, at the precision that was timed.

    Args:
        own: dseek's worker, loaded.
        model: the model.
        token_ids: the text.
        window: tokens of one window.
        threads: threads of the reference.
        config: fields that the reference's configuration gets.
        positions: to how many positions dseek extended the model, or None.

    Returns:
        Both perplexities and how often the likeliest tokens agree.

    Raises:
        IncorrectError: they differ by more than `QUICK_LOSS` allows.
    """
    ours = own.call("nll", token_ids=token_ids, window=window)
    own.freeze()
    with reference(model, threads=threads, config=config, positions=positions) as judge:
        theirs = judge.call("nll", token_ids=token_ids, window=window)
    own_perplexity, wanted = perplexity(ours["losses"]), perplexity(theirs["losses"])
    changes = [own_loss - loss for own_loss, loss in zip(ours["losses"], theirs["losses"], strict=True)]
    doubt = statistics.stdev(changes) / math.sqrt(len(changes))
    if not abs(statistics.fmean(changes)) <= QUICK_LOSS + 2 * doubt:
        raise IncorrectError(f"perplexity {own_perplexity:.4f}, the fp32 reference has {wanted:.4f}")
    return {
        "perplexity": own_perplexity,
        "reference_perplexity": wanted,
        "argmax_agreement": agreement(ours["best"], theirs["best"]),
    }


def reference(
    model: BenchModel, *, threads: int, config: dict[str, Any] | None = None, positions: int | None = None
) -> PeerProcess:
    """Start transformers in fp32 on the model.

    Args:
        model: the model.
        threads: its threads.
        config: fields of the model's configuration to replace.
        positions: extend the model to so many, by YaRN as dseek does; None leaves it as it is.

    Returns:
        The process, a context manager that ends it.
    """
    print("benchmarks: loading the fp32 reference", file=sys.stderr)
    process = PeerProcess("transformers", threads=threads)
    options = {"config": config or {}} | ({} if positions is None else {"positions": positions})
    try:
        process.call("load", path=str(hf_folder(model)), threads=threads, context_tokens=0, options=options)
    except BaseException:
        process.close()
        raise
    return process


def check_equal(what: str, ours: Sequence[int], theirs: Sequence[int], *, hint: str) -> None:
    """Compare two lists of ids.

    Args:
        what: what they are.
        ours: dseek's.
        theirs: the peer's.
        hint: what a difference means.

    Raises:
        IncorrectError: they differ.
    """
    if list(ours) != list(theirs):
        raise IncorrectError(f"{what} differ ({hint}): {list(ours)[:12]} and {list(theirs)[:12]}")
