"""What profiling costs: the same work with and without, in turn, on the native kernels and in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import contest, models
from benchmarks.contest import Entrant
from benchmarks.errors import IncorrectError
from benchmarks.result import Outcome, ratio_to_bar
from benchmarks.rows import Settings
from benchmarks.rows.prompts import prompts

BAR = 0.05
"""Largest overhead, a fraction."""


def profiler_overhead(settings: Settings) -> Outcome:
    """The largest of three: prefill and decode of SmolLM2 in int8, a pass of its module in PyTorch.

    Starting and ending a recording, and making the report of it, are no part of it.
    """
    model = models.SMOLLM2
    context, num_tokens = settings.pick(512, 32), settings.pick(128, 4)
    entrant = Entrant("dseek int8", "dseek", models.own_path(model), {"precision": "int8", "batch": 1})
    texts = prompts(model, context, settings.rounds + 1)
    with contest.running([entrant], threads=settings.threads, context_tokens=context + num_tokens) as engines:
        process = engines[0].process

        def answer(operation: str, **arguments: Any) -> Callable[[int], dict[str, Any]]:
            def call(round_idx: int) -> dict[str, Any]:
                prompt = texts[round_idx % len(texts)]
                return process.call(operation, token_ids=prompt, **arguments)

            return call

        native = contest.alternate(
            {
                "plain": answer("generate", num_tokens=num_tokens),
                "profiled": answer("generate_profiled", num_tokens=num_tokens),
            },
            rounds=settings.rounds,
        )
        torch = contest.alternate(
            {
                "plain": answer("module_forward", profiled=False),
                "profiled": answer("module_forward", profiled=True),
            },
            rounds=settings.rounds,
        )
    for kind, key in ((native, "token_ids"), (torch, "best")):
        if [one[key] for one in kind["plain"]] != [one[key] for one in kind["profiled"]]:
            raise IncorrectError("profiling changed what is computed")
    overheads = {
        f"{name} {key}": contest.median_of(kind["profiled"], key) / contest.median_of(kind["plain"], key) - 1
        for name, kind, key in (
            ("native", native, "first_token_s"),
            ("native", native, "token_s"),
            ("torch", torch, "seconds"),
        )
    }
    worst = max(overheads.values())
    return Outcome(
        value=max(0.0, worst),
        unit="fraction",
        ratio=ratio_to_bar(BAR, max(0.0, worst)),
        details={
            "overheads": overheads,
            "context": context,
            "tokens": num_tokens,
            "native_s": {
                name: {key: contest.spread_of(given, key) for key in ("first_token_s", "token_s")}
                for name, given in native.items()
            },
            "torch_s": {name: contest.spread_of(given, "seconds") for name, given in torch.items()},
            "profiled": {key: native["profiled"][0][key] for key in ("operators", "flops")},
        },
    )
