"""Needles in a haystack: the sentences that dynamic attention retrieves of those that dense attention does."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import checks, models
from benchmarks.errors import IncorrectError
from benchmarks.needles import Needle, hide, make_needles
from benchmarks.peers.client import PeerProcess
from benchmarks.result import Outcome
from benchmarks.rows import Settings
from benchmarks.rows.attention_quality import (
    DENSE,
    MODEL,
    SEED,
    Budget,
    attending,
    dynamic_wish,
    encode,
    held_out_sequences,
)

LENGTHS, SMOKE_LENGTHS = (4096, 6144, 8192), (1024, 1536)
"""Tokens of a prompt with its answer."""
DEPTHS = tuple(step / 10 for step in range(11))
NEEDLES = 3
"""Needles at each length and depth, each in a haystack of its own."""
MIN_FOUND = 0.5
"""Least share that dense attention must find for the row to say anything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One prompt and what it asks for."""

    length: int
    depth: float
    needle: Needle
    prompt: list[int]
    answer: list[int]


def needle(settings: Settings) -> Outcome:
    """Needles at all depths, counted where dense attention finds them."""
    lengths, depths = (LENGTHS, DEPTHS) if not settings.smoke else (SMOKE_LENGTHS, (0.0, 0.5, 1.0))
    budget = Budget()
    trials = make_trials(lengths, depths, settings.pick(NEEDLES, 1))
    found: dict[str, list[bool]] = {}
    facts: dict[str, Any] = {}
    skipped: list[float] = []
    for name, wish in (("dense", DENSE), ("dynamic", dynamic_wish(budget))):
        answers, facts[name], shares = ask(settings, name, wish, trials)
        found[name] = [answer["token_ids"] == trial.answer for answer, trial in zip(answers, trials, strict=True)]
        if name == "dynamic":
            skipped = shares
        else:
            prompts = [trial.prompt for trial in trials]
            facts[name] |= checks.check_answers(
                MODEL, prompts, {"dseek dense": answers}, "dseek dense", threads=settings.threads
            )
    return _outcome(trials, found, skipped, {"budget": asdict(budget), "checks": facts})


def ask(
    settings: Settings, name: str, wish: dict[str, Any], trials: Sequence[Trial]
) -> tuple[list[dict[str, Any]], dict[str, Any], list[float]]:
    """Answer every prompt with one way of attending.

    Args:
        settings: threads.
        name: of the way.
        wish: keyword arguments of `dseek.load`.
        trials: the prompts, those of a haystack one after the other.

    Returns:
        An answer a prompt (`token_ids`, `prompt_idx`), what the worker says of its attention, and the share of the
        causal pairs that was skipped in one prompt of each haystack (none are counted where attention is dense).
    """
    # The depths share a haystack: what lies before the needle need not be computed again.
    longest = max(trial.length for trial in trials)
    with attending(settings, name, wish | {"prefix_cache": True}, longest) as (process, facts):
        answers: list[dict[str, Any]] = []
        for index, trial in enumerate(trials):
            answer = process.call("generate", token_ids=trial.prompt, num_tokens=len(trial.answer))
            answers.append({**answer, "prompt_idx": index})
        skipped: list[float] = []
        haystacks = {} if wish == DENSE else {(trial.length, trial.needle.name): trial for trial in trials}
        for trial in haystacks.values():
            process.call("nll", token_ids=trial.prompt, window=len(trial.prompt))
            skipped += process.call("skipped", firsts=[0])["shares"]
        process.freeze()
    return answers, facts, skipped


def make_trials(lengths: Sequence[int], depths: Sequence[float], num_needles: int) -> list[Trial]:
    """Hide needles in held-out source.

    Args:
        lengths: tokens of a prompt with its answer.
        depths: where the needles lie.
        num_needles: needles of each length, each in a haystack that all depths share.

    Returns:
        A trial for each length, needle and depth.
    """
    needles = make_needles(len(lengths) * num_needles, SEED)
    haystacks = held_out_sequences(max(lengths), len(needles))
    texts = [[needle.sentence, needle.question, needle.answer] for needle in needles]
    parts = encode([text for group in texts for text in group])
    with PeerProcess("dseek") as worker:
        said = [worker.call("pieces", path=models.own_path(MODEL), token_ids=ids)["texts"] for ids in haystacks]
    trials = []
    for index, hidden in enumerate(needles):
        sentence, question, answer = parts[3 * index : 3 * index + 3]
        breaks = [place for place, text in enumerate(said[index]) if text.startswith("\n")]
        length = lengths[index // num_needles]
        for depth in depths:
            prompt = hide(haystacks[index], breaks, sentence, question, num_tokens=length - len(answer), depth=depth)
            trials.append(Trial(length=length, depth=depth, needle=hidden, prompt=prompt, answer=answer))
    return trials


def _outcome(
    trials: Sequence[Trial], found: dict[str, list[bool]], skipped: Sequence[float], details: dict[str, Any]
) -> Outcome:
    """Count what was found.

    Args:
        trials: the prompts.
        found: whether each answer was right, of dense and of dynamic attention.
        skipped: share of the causal pairs that dynamic attention skipped, of a prompt from each haystack.
        details: what else to keep.

    Returns:
        The share that dynamic attention finds of what dense attention finds.

    Raises:
        IncorrectError: dense attention finds too little.
    """
    both = list(zip(trials, found["dense"], found["dynamic"], strict=True))
    num_found = sum(dense for _, dense, _ in both)
    if num_found < MIN_FOUND * len(trials):
        raise IncorrectError(f"dense attention finds {num_found} of {len(trials)} needles, too few to compare with")
    missed = [trial for trial, dense, dynamic in both if dense and not dynamic]
    kept = 1 - len(missed) / num_found
    return Outcome(
        value=kept,
        unit="fraction",
        ratio=kept,
        limit_share=statistics.fmean(skipped),
        peer="dense attention",
        details={
            "data": "a sentence with a code among held-out source, greedy answers to its own beginning",
            "python": platform.python_version(),
            "seed": SEED,
            "trials": len(trials),
            "found": {name: sum(right) for name, right in found.items()},
            "found_by_dense": num_found,
            "missed": [{"length": trial.length, "depth": trial.depth, "name": trial.needle.name} for trial in missed],
            "not_found_by_dense": [
                {"length": trial.length, "depth": trial.depth, "name": trial.needle.name}
                for trial, dense, _ in both
                if not dense
            ],
            **details,
        },
    )
