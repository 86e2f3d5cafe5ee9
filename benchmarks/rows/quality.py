"""Quality: perplexity through the engine, kernels and precision that answer, against transformers in fp32."""

from __future__ import annotations

from benchmarks import checks, models
from benchmarks.contest import Entrant, running
from benchmarks.errors import IncorrectError
from benchmarks.result import Outcome, ratio_to_bar
from benchmarks.rows import Settings
from benchmarks.rows.prompts import source_tokens
from benchmarks.scoring import agreement, perplexity

BAR = 0.005
"""Largest relative change of perplexity."""

FP32_TOLERANCE = 1e-3
"""Largest relative change of perplexity in dseek's own fp32: the check that both measure the same thing."""

WINDOW = 2048


def quality_int8(settings: Settings) -> Outcome:
    """int8 of the Q4_1 file's weights."""
    return _quality(settings, "int8")


def quality_int4(settings: Settings) -> Outcome:
    """int4, in which the Q4_1 file's weights are exact."""
    return _quality(settings, "int4")


def _quality(settings: Settings, precision: str) -> Outcome:
    """Score 30,000 tokens in windows of 2048 in one precision and in the reference.

    Args:
        settings: threads, smoke.
        precision: dseek's precision.

    Returns:
        Relative change of perplexity, without its sign.
    """
    model = models.SMOLLM2
    ids = source_tokens(settings.pick(30_000, 600))
    window = settings.pick(WINDOW, 200)
    path = models.own_path(model)
    scores = {}
    for name, score_ids in ((precision, ids), ("fp32", ids[:window])):
        entrant = Entrant(f"dseek {name}", "dseek", path, {"precision": name, "batch": 1})
        with running([entrant], threads=settings.threads, context_tokens=window + 1) as engines:
            scores[name] = engines[0].process.call("nll", token_ids=score_ids, window=window)
    with checks.reference(model, threads=settings.threads) as judge:
        wanted = judge.call("nll", token_ids=ids, window=window)
    wanted_first = perplexity(wanted["losses"][: window - 1])
    own_fp32 = perplexity(scores["fp32"]["losses"])
    if not abs(own_fp32 / wanted_first - 1) <= FP32_TOLERANCE:
        raise IncorrectError(f"dseek's own fp32 has the perplexity {own_fp32:.5f}, transformers {wanted_first:.5f}")
    own, reference = perplexity(scores[precision]["losses"]), perplexity(wanted["losses"])
    change = own / reference - 1
    if not abs(change) < 1:
        raise IncorrectError(f"perplexity {own:.3f} where the reference has {reference:.3f}")
    return Outcome(
        value=abs(change),
        unit="fraction",
        ratio=ratio_to_bar(BAR, abs(change)),
        details={
            "perplexity": own,
            "reference_perplexity": reference,
            "signed_change": change,
            "argmax_agreement": agreement(scores[precision]["best"], wanted["best"]),
            "tokens": len(ids),
            "window": window,
            "fp32_first_window": {"dseek": own_fp32, "transformers": wanted_first},
        },
    )
