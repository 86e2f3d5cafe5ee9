"""Prefill: from the prompt's tokens being ready to the first token being known, batch 1."""

from __future__ import annotations

from typing import Any

from benchmarks import checks, contest, limits, models
from benchmarks.contest import Entrant
from benchmarks.models import BenchModel
from benchmarks.result import Outcome
from benchmarks.rows import Settings, pattern
from benchmarks.rows.entrants import openvino_entrants
from benchmarks.rows.prompts import prompts

OWN = "dseek int8"
VLLM = "vLLM W8A8"

CONTINUED = 8
"""Tokens of the answers that are judged; they are made apart from the timed ones."""

LONG_TOKENS = 16384
"""Positions of the long prompt with its answer, twice what SmolLM2 was trained for."""


def prefill_512(settings: Settings) -> Outcome:
    """SmolLM2, 512 tokens."""
    model = models.SMOLLM2
    peers = [Entrant(VLLM, "vllm", str(models.w8a8_folder(model))), *openvino_entrants(model)]
    return _prefill(settings, model, settings.pick(512, 64), peers)


def prefill_512_1b(settings: Settings) -> Outcome:
    """The 1.1B Llama, 512 tokens; the limit counts the projections only."""
    model = models.LLAMA_TINY if settings.smoke else models.LLAMA_1B
    peers = [Entrant(VLLM, "vllm", str(models.w8a8_folder(model)))]
    return _prefill(settings, model, settings.pick(512, 64), peers, attention_counts=False)


def prefill_8192(settings: Settings) -> Outcome:
    """SmolLM2, a prompt that fills its context of 8192 but for the answer that is judged."""
    model = models.SMOLLM2
    return _prefill(settings, model, settings.pick(8192, 256) - CONTINUED, openvino_entrants(model))


def prefill_16k(settings: Settings) -> Outcome:
    """SmolLM2 beyond its trained length with dynamic attention; the peer attends to everything.

    dseek turns the positions as YaRN does and is judged by a reference that does so too, and that attends to
    everything. OpenVINO runs the exported model as it is, and is judged as that.
    """
    model, num_tokens = models.SMOLLM2, settings.pick(LONG_TOKENS, 2048)
    options = {"max_position_embeddings": LONG_TOKENS, **pattern.LOAD_OPTIONS}
    return _prefill(settings, model, num_tokens - CONTINUED, openvino_entrants(model), options=options)


def _prefill(
    settings: Settings,
    model: BenchModel,
    num_tokens: int,
    peers: list[Entrant],
    *,
    attention_counts: bool = True,
    options: dict[str, Any] | None = None,
) -> Outcome:
    """Time one length for dseek and its peers in turn; the best peer counts.

    Args:
        settings: threads, rounds, smoke.
        model: what runs.
        num_tokens: length of the prompts.
        peers: whom to beat.
        attention_counts: whether the limit has attention at the bf16 rate beside the projections at the int8 rate.
        options: further arguments of `dseek.load`; where attention is dynamic, the limit counts what a query may see.

    Returns:
        Seconds, and the ratio to the best peer.
    """
    options = options or {}
    positions = options.get("max_position_embeddings")
    own = Entrant(OWN, "dseek", models.own_path(model), {"precision": "int8", "batch": 1, **options})
    texts = prompts(model, num_tokens, settings.rounds + 1)
    with (
        limits.Limits(threads=settings.threads, smoke=settings.smoke) as rates,
        contest.running([own, *peers], threads=settings.threads, context_tokens=num_tokens + CONTINUED) as engines,
    ):
        rates.measure("int8", "bf16")
        answers = contest.generate_in_turn(engines, texts, 1, rounds=settings.rounds)
        rates.measure("int8", "bf16")
        judged = contest.generate_in_turn(engines, texts[:1], CONTINUED, rounds=1)
        checked = checks.check_answers(
            model,
            texts,
            judged,
            OWN,
            threads=settings.threads,
            positions=None if positions is None else {OWN: positions},
        )
        if model.alias:
            ids = texts[0][: settings.pick(1024, 128)]
            checked |= checks.check_losses(
                engines[0].process, model, ids, len(ids), threads=settings.threads, positions=positions
            )
        details = {
            "tokens": num_tokens,
            "plan": engines[0].loaded,
            "versions": {engine.entrant.name: engine.loaded["version"] for engine in engines},
            "first_token_s": {name: contest.spread_of(given, "first_token_s") for name, given in answers.items()},
            "limits": rates.summary(),
            "check": checked,
        }
        int8_rate, bf16_rate = rates.rate("int8"), rates.rate("bf16")
    seconds = {name: contest.median_of(given, "first_token_s") for name, given in answers.items()}
    best_peer = min((peer.name for peer in peers), key=lambda name: seconds[name])
    limit_s = (
        limits.prefill_limit_s(
            model,
            num_tokens,
            int8_rate,
            bf16_rate,
            pattern.prefill_pairs(num_tokens) if options.get("attention") else None,
        )
        if attention_counts
        else model.prefill_linear_operations(num_tokens) / int8_rate
    )
    return Outcome(
        value=seconds[OWN],
        unit="s",
        ratio=seconds[best_peer] / seconds[OWN],
        limit_share=limit_s / seconds[OWN],
        peer=best_peer,
        details=details,
    )
