"""Decode: steady seconds a token after a context, batch 1, greedy."""

from __future__ import annotations

from typing import Any

from benchmarks import checks, contest, limits, models
from benchmarks.contest import Entrant
from benchmarks.models import BenchModel
from benchmarks.result import Outcome
from benchmarks.rows import Settings, pattern
from benchmarks.rows.entrants import openvino_entrants
from benchmarks.rows.prompts import prompts

BANDWIDTH_BAR = 0.75
"""Share of the measured read bandwidth that decode is to reach."""


def decode_128_int8(settings: Settings) -> Outcome:
    """SmolLM2 after 128 tokens, int8, against llama.cpp Q8_0."""
    peers = [Entrant("llama.cpp Q8_0", "llamacpp", str(models.gguf_file(models.SMOLLM2, "Q8_0")))]
    return _decode(settings, models.SMOLLM2, "int8", 128, settings.pick(128, 8), peers)


def decode_128_int4(settings: Settings) -> Outcome:
    """SmolLM2 after 128 tokens, int4, against llama.cpp Q4_0."""
    peers = [Entrant("llama.cpp Q4_0", "llamacpp", str(models.gguf_file(models.SMOLLM2, "Q4_0")))]
    return _decode(settings, models.SMOLLM2, "int4", 128, settings.pick(128, 8), peers)


def decode_8192(settings: Settings) -> Outcome:
    """SmolLM2 with its context nearly full: the answer ends at token 8192; int8, against OpenVINO GenAI."""
    num_tokens = settings.pick(64, 8)
    context = settings.pick(8192, 256) - num_tokens
    return _decode(settings, models.SMOLLM2, "int8", context, num_tokens, openvino_entrants(models.SMOLLM2))


def decode_16k(settings: Settings) -> Outcome:
    """SmolLM2 after 16,384 tokens, twice its trained length: dynamic attention against dseek's own dense one."""
    model, num_tokens = models.SMOLLM2, settings.pick(64, 8)
    context = settings.pick(16384, 2048)
    positions = {"max_position_embeddings": 16384 + 64}
    dense = Entrant(
        "dseek int8, dense", "dseek", models.own_path(model), {"precision": "int8", "batch": 1, **positions}
    )
    options = {**positions, **pattern.LOAD_OPTIONS}
    return _decode(settings, model, "int8", context, num_tokens, [dense], options=options)


def decode_bandwidth(settings: Settings) -> Outcome:
    """The 1.1B Llama after 128 tokens: bytes read a token, as a share of the read bandwidth of the same moments."""
    model = models.LLAMA_TINY if settings.smoke else models.LLAMA_1B
    outcome = _decode(settings, model, "int8", settings.pick(128, 16), settings.pick(64, 8), [])
    assert outcome.limit_share is not None
    return Outcome(
        value=outcome.limit_share,
        unit="fraction",
        ratio=outcome.limit_share / BANDWIDTH_BAR,
        limit_share=outcome.limit_share,
        details=outcome.details,
    )


def _decode(
    settings: Settings,
    model: BenchModel,
    precision: str,
    context: int,
    num_tokens: int,
    peers: list[Entrant],
    *,
    options: dict[str, Any] | None = None,
) -> Outcome:
    """Time decode for dseek and, in turn, a peer.

    Args:
        settings: threads, rounds, smoke.
        model: what runs.
        precision: dseek's precision.
        context: tokens of the prompt.
        num_tokens: tokens of the answer, over which the steady time is taken.
        peers: whom to beat, the best of them counts; none measures dseek only.
        options: further arguments of `dseek.load`; where attention is dynamic, the limit counts what a query may see.

    Returns:
        Seconds a token; the share is that of the read bandwidth by the weights of a step and the cache.
    """
    own_name = f"dseek {precision}"
    options = options or {}
    positions = options.get("max_position_embeddings")
    own = Entrant(own_name, "dseek", models.own_path(model), {"precision": precision, "batch": 1, **options})
    texts = prompts(model, context, settings.rounds + 1)
    with (
        limits.Limits(threads=settings.threads, smoke=settings.smoke) as rates,
        contest.running([own, *peers], threads=settings.threads, context_tokens=context + num_tokens) as engines,
    ):
        rates.measure("read")
        answers = contest.generate_in_turn(engines, texts, num_tokens, rounds=settings.rounds)
        rates.measure("read")
        checked = checks.check_answers(
            model,
            texts,
            answers,
            own_name,
            threads=settings.threads,
            max_prompts=1,
            positions=None if positions is None else dict.fromkeys(answers, positions),
        )
        if model.alias:
            window = settings.pick(1024, 128)
            ids = [token for text in texts for token in text][:window]
            window = min(window, context)
            checked |= checks.check_losses(
                engines[0].process, model, ids, window, threads=settings.threads, positions=positions
            )
        plan = engines[0].loaded
        details = {
            "context": context,
            "tokens": num_tokens,
            "plan": plan,
            "versions": {engine.entrant.name: engine.loaded["version"] for engine in engines},
            "token_s": {name: contest.spread_of(given, "token_s") for name, given in answers.items()},
            "limits": rates.summary(),
            "check": checked,
        }
        read_rate = rates.rate("read")
    seconds = {name: contest.median_of(given, "token_s") for name, given in answers.items()}
    best_peer = min((peer.name for peer in peers), key=lambda name: seconds[name], default=None)
    read_tokens = context + num_tokens / 2
    if options.get("attention"):
        read_tokens = pattern.visible_tokens(read_tokens)
    limit_s = limits.decode_bytes(plan, read_tokens) / read_rate
    return Outcome(
        value=seconds[own_name],
        unit="s/token",
        ratio=None if best_peer is None else seconds[best_peer] / seconds[own_name],
        limit_share=limit_s / seconds[own_name],
        peer=best_peer,
        details=details,
    )
