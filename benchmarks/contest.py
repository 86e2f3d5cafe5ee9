"""Run engines in turn on the same work, so that a noisy machine is noisy for all of them, and take medians."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers.client import PeerProcess


@dataclass(frozen=True, slots=True)
class Entrant:
    """An engine and what it is to load."""

    name: str
    """Name in the result, such as `vllm W8A8`."""
    worker: str
    """Key of `peers.client.WORKERS`."""
    path: str
    """Model in the form the engine reads."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the worker's `load`."""


@dataclass(slots=True)
class Running:
    """An entrant whose engine is loaded."""

    entrant: Entrant
    process: PeerProcess
    loaded: dict[str, Any]


@contextmanager
def running(entrants: Sequence[Entrant], *, threads: int, context_tokens: int) -> Iterator[list[Running]]:
    """Load all entrants, frozen until they are asked.

    Args:
        entrants: whom to load, in this order.
        threads: threads of each.
        context_tokens: longest prompt with its answer.

    Yields:
        One `Running` each; they are ended on the way out.
    """
    with ExitStack() as stack:
        loaded = []
        for entrant in entrants:
            print(f"benchmarks: loading {entrant.name}", file=sys.stderr)
            process = stack.enter_context(PeerProcess(entrant.worker, threads=threads))
            arguments = {"path": entrant.path, "threads": threads, "context_tokens": context_tokens}
            answer = process.call("load", **arguments, options=entrant.options)
            process.freeze()
            loaded.append(Running(entrant, process, answer))
        yield loaded


def alternate(
    calls: dict[str, Callable[[int], dict[str, Any]]], *, rounds: int, warm_ups: int = 1, pause_s: float = 0.0
) -> dict[str, list[dict[str, Any]]]:
    """Ask everyone in turn, the order turned around every other round.

    Args:
        calls: name to a function of the round's number (negative while warming up) that does one measurement.
        rounds: measurements of each that count.
        warm_ups: measurements of each before that, which do not.
        pause_s: rest before each measurement.

    Returns:
        The answers that count, by name, in the order of the rounds.
    """
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in calls}
    names = list(calls)
    for round_idx in range(-warm_ups, rounds):
        for name in names if round_idx % 2 == 0 else reversed(names):
            time.sleep(pause_s)
            answer = calls[name](round_idx)
            if round_idx >= 0:
                answers[name].append(answer)
    return answers


def generate_in_turn(
    engines: Sequence[Running], prompts: Sequence[list[int]], num_tokens: int, *, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Let every engine answer the same prompts in turn.

    Args:
        engines: loaded entrants.
        prompts: one a round and one for warming up, all different, so that nothing can be answered from a cache.
        num_tokens: length of the answers.
        rounds: how often.

    Returns:
        Answers of `generate` by the entrant's name.
    """

    def call_of(engine: Running) -> Callable[[int], dict[str, Any]]:
        def call(round_idx: int) -> dict[str, Any]:
            prompt = prompts[round_idx % len(prompts)]
            answer = engine.process.call("generate", token_ids=prompt, num_tokens=num_tokens)
            engine.process.freeze()
            answer["prompt_idx"] = round_idx % len(prompts)
            return answer

        return call

    return alternate({engine.entrant.name: call_of(engine) for engine in engines}, rounds=rounds)


def median_of(answers: Sequence[dict[str, Any]], key: str) -> float:
    """Median of one figure over the rounds."""
    return float(statistics.median(answer[key] for answer in answers))


def spread_of(answers: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    """Median, least and greatest of one figure over the rounds, and their number."""
    values = [answer[key] for answer in answers]
    return {
        "median": statistics.median(values),
        "least": min(values),
        "greatest": max(values),
        "rounds": len(values),
    }
