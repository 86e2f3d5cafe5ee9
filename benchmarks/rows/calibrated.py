"""Plans made from a calibration: the loss they foresee against the loss they have, and their speed beside one dtype."""

from __future__ import annotations

import dataclasses
import math
import sys
from contextlib import ExitStack
from typing import Any

import numpy as np

from benchmarks import contest, models
from benchmarks.calibrations import calibration_file, held_out_ids
from benchmarks.contest import Entrant
from benchmarks.errors import BenchmarkError, IncorrectError
from benchmarks.models import BenchModel
from benchmarks.result import Outcome, ratio_to_bar
from benchmarks.rows import Settings
from benchmarks.rows.prompts import prompts
from dseek import load, plan
from dseek.engine.calibrated import calibrated
from dseek.models.files import open_model
from dseek.plan import mixing, quality
from dseek.plan.attention_wish import AttentionWish
from dseek.plan.formats import VARIANTS, packed_bytes
from dseek.plan.plan import Plan
from dseek.plan.weights import Weights, formats_text, uniform

SEED, SPREAD = 2, 1.25
"""Of the factors that move weights off the 4-bit grid; not those that the plan's prior was measured with."""

BUDGETS = (0.01, 0.02, 0.05, 0.1)
WINDOW = 512

PIECE = 8
"""Rows of a step while text is judged."""

FACTOR_BAR = 1.5
"""Largest factor between the loss that is foreseen and the loss that is measured, either way."""

QUALITY_BUDGET = 0.01
NOISE = 0.05
"""Share by which two measurements of the same plan may differ."""

INTEGER_FORMATS = ("i4g", "i8c", "i8g")
ALL_FORMATS = (*INTEGER_FORMATS, "bf16", "f16")

SINGLE = ("fp32", "bf16", "fp16", "int8", "int4")


def mixed_plan_loss(settings: Settings) -> Outcome:
    """Mixtures that save most bytes within several budgets, against the model in fp32, through the engine.

    The search itself may find a single format as good within a tie, so the mixtures are made here, as it makes them.
    The loss measured is the divergence of the predictions, over held-out text; the rise of the log-loss and its
    standard error are told beside it. What counts is the worst factor of all budgets. The text runs in steps of so few
    rows that inputs are rounded as they are while an answer is written, which is what calibrations foresee.
    """
    folder = str(models.off_grid_folder(models.SMOLLM2, SEED, SPREAD))
    path = calibration_file(
        folder,
        max_tokens=settings.pick(1024, 128),
        sensitivity_tokens=settings.pick(1024, 64),
        threads=settings.threads,
        formats=INTEGER_FORMATS,
    )
    ids = held_out_ids(folder, settings.pick(8 * WINDOW, 64))
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    exact = _plan(folder, str(path), settings, precision="fp32", max_quality_loss=10.0)
    budgets = BUDGETS[: settings.pick(len(BUDGETS), 1)]
    mixtures = [_mixture(folder, str(path), settings, budget) for budget in budgets]
    tried = [made for made, _ in mixtures]
    found = []
    for budget, (made, foreseen), (divergence, rise, error) in zip(
        budgets, mixtures, _losses(folder, exact, tried, windows), strict=True
    ):
        if not 0 < divergence < 1:
            raise IncorrectError(f"the plan for {budget:g} diverges by {divergence} nats from fp32")
        found.append(
            {
                "budget": budget,
                "foreseen": foreseen,
                "divergence": divergence,
                "rise": rise,
                "standard_error": error,
                "factor": max(foreseen / divergence, divergence / foreseen),
                "formats": formats_text(made.layer_formats),
                "precision": made.precision,
                "cache": made.cache_dtype,
            }
        )
    worst = max(entry["factor"] for entry in found)
    return Outcome(
        value=worst,
        unit="fraction",
        ratio=ratio_to_bar(FACTOR_BAR, worst),
        details={"plans": found, "tokens": len(ids), "window": WINDOW, "calibration": str(path)},
    )


def _plan(folder: str, calibration: str, settings: Settings, objective: Any = "latency", **options: Any) -> Plan:
    """A plan for windows of text, made from a calibration."""
    loss = options.pop("max_quality_loss")
    with open_model(folder) as files:
        return plan.make(
            files.shape,
            plan.this_machine(),
            plan.Objective(kind=objective, context_tokens=WINDOW, batch=1, max_quality_loss=loss),
            encodings=files.encodings(),
            model=folder,
            num_threads=settings.threads,
            prefill_chunk_tokens=PIECE,
            attention=AttentionWish(kind="dense"),
            **calibrated(files, calibration),
            **options,
        )


def _mixture(folder: str, calibration: str, settings: Settings, budget: float) -> tuple[Plan, float]:
    """A plan with the mixture that saves most bytes within a budget, and the loss it is expected to have."""
    base = _plan(folder, calibration, settings, precision="int8", max_quality_loss=10.0)
    with open_model(folder) as files:
        shape, encodings = files.shape, files.encodings()
        measured = calibrated(files, calibration)["losses"]
    losses = quality.completed_losses(shape, encodings, measured.projections)
    every = [uniform(variant, shape, losses, measured.tables) for variant in VARIANTS]
    home = min((weights for weights in every if weights.precision == "int8"), key=lambda weights: weights.loss)
    sizes = shape.linear_sizes()

    def num_bytes(weights: Weights) -> float:
        places = (item for layer in weights.layer_formats for item in layer.by_role().items())
        return float(sum(packed_bytes(name, *sizes[role]) for role, name in places))

    in_cache = quality.cache_loss(base.cache_dtype, measured.caches)
    mixed = mixing.mix(home, every, losses, budget - in_cache, num_bytes)
    if mixed is None:
        raise BenchmarkError(f"no mixture keeps within {budget:g}")
    made = dataclasses.replace(
        base,
        precision="mixed",
        layer_formats=mixed.layer_formats,
        embedding_format=mixed.table_format,
        head_format=mixed.table_format,
        activation_limits=(),
    )
    return made, mixed.loss + in_cache


def _foreseen(made: Plan) -> float:
    """Loss that a plan expects of weights, cache and tables."""
    choice = next(entry for entry in made.choices if entry.name == "precision and cache")
    return next(entry for entry in choice.alternatives if not entry.rejected).quality_loss


def _losses(folder: str, exact: Plan, tried: list[Plan], windows: list[list[int]]) -> list[tuple[float, float, float]]:
    """Run plans beside each other over windows of text.

    Args:
        folder: the model.
        exact: the plan to compare with.
        tried: the plans that are judged.
        windows: token ids.

    Returns:
        For each plan the divergence of its predictions, nats a token; the rise of the mean log-loss, and its standard
        error over windows.
    """
    divergences = np.zeros((len(tried), len(windows)))
    rises = np.zeros((len(tried), len(windows)))
    with ExitStack() as stack:
        wide = stack.enter_context(load(folder, plan=exact))
        narrow = [stack.enter_context(load(folder, plan=made)) for made in tried]
        for window, ids in enumerate(windows):
            pieces = [llm.engine.logits(ids[:-1]) for llm in (wide, *narrow)]
            for together in zip(*pieces, strict=True):
                first, log_p = together[0][0], _log_softmax(together[0][1])
                rows = np.arange(len(log_p))
                targets = np.array(ids[first + 1 : first + 1 + len(rows)])
                for index, (_, logits_TV) in enumerate(together[1:]):
                    change = log_p - _log_softmax(logits_TV)
                    divergences[index, window] += (np.exp(log_p) * change).sum(dtype=np.float64) / (len(ids) - 1)
                    rises[index, window] += change[rows, targets].sum(dtype=np.float64) / (len(ids) - 1)
            print(f"benchmarks: window {window + 1} of {len(windows)}", file=sys.stderr)
    errors = rises.std(axis=1, ddof=1) / math.sqrt(len(windows)) if len(windows) > 1 else np.zeros(len(tried))
    return [
        (float(divergence.mean()), float(rise.mean()), float(error))
        for divergence, rise, error in zip(divergences, rises, errors, strict=True)
    ]


def _log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    shifted = logits_TV - logits_TV.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)


def auto_mode(settings: Settings) -> Outcome:
    """Auto mode with 1 % of quality to lose, beside the best single dtype that keeps it, model by model.

    Cases are two models, three lengths, prefill and decode; plans are made for what is timed. The figure is the least
    ratio of the best single dtype's time over auto's; auto must be slower in none beyond noise and faster in half.
    """
    small = str(models.off_grid_folder(models.SMOLLM2, SEED, SPREAD))
    cases: list[dict[str, Any]] = []
    entries: list[tuple[BenchModel, str, int]] = [(models.SMOLLM2, small, 1024)]
    large = models.LLAMA_TINY if settings.smoke else models.LLAMA_1B
    entries.append((large, str(models.hf_folder(large)), 128))
    for model, folder, sensitivity_tokens in entries:
        path = calibration_file(
            folder,
            max_tokens=settings.pick(4 * sensitivity_tokens, 128),
            sensitivity_tokens=settings.pick(sensitivity_tokens, 64),
            threads=settings.threads,
            formats=ALL_FORMATS,
        )
        singles = [name for name in SINGLE if _keeps_budget(folder, str(path), settings, name)]
        for length in (64,) if settings.smoke else (128, 1024, 4096):
            for phase in ("prefill", "decode"):
                cases.append(_timed(settings, model, folder, str(path), singles, length, phase))
    ratios = [case["ratio"] for case in cases]
    faster = sum(ratio > 1 + NOISE for ratio in ratios) / len(ratios)
    return Outcome(
        value=min(ratios),
        unit="fraction",
        ratio=min(min(ratios) / (1 - NOISE), faster / 0.5),
        peer="the best single dtype",
        details={"cases": cases, "faster_share": faster},
    )


def _keeps_budget(folder: str, calibration: str, settings: Settings, precision: str) -> bool:
    """Whether a single precision is expected to lose no more than the budget."""
    made = _plan(folder, calibration, settings, precision=precision, max_quality_loss=QUALITY_BUDGET)
    return _foreseen(made) <= QUALITY_BUDGET


def _timed(
    settings: Settings, model: BenchModel, folder: str, calibration: str, singles: list[str], length: int, phase: str
) -> dict[str, Any]:
    """Time auto mode and every single precision in turn."""
    num_tokens = settings.pick(1 if phase == "prefill" else 64, 2)
    shared = {"batch": 1, "prompt_tokens": length, "answer_tokens": num_tokens if phase == "prefill" else 1024}
    context = length + shared["answer_tokens"]
    budget = {"precision": "auto", "max_quality_loss": QUALITY_BUDGET, "calibration": calibration}
    entrants = [Entrant("auto", "dseek", folder, {**shared, **budget})]
    entrants += [
        Entrant(name, "dseek", folder, {**shared, "precision": name, "calibration": calibration}) for name in singles
    ]
    texts = prompts(model, length, settings.rounds + 1)
    with contest.running(entrants, threads=settings.threads, context_tokens=context) as engines:
        answers = contest.generate_in_turn(engines, texts, max(2, num_tokens), rounds=settings.rounds)
        loaded = {engine.entrant.name: engine.loaded for engine in engines}
    key = "first_token_s" if phase == "prefill" else "token_s"
    seconds = {name: contest.median_of(found, key) for name, found in answers.items()}
    best = min(singles, key=lambda name: seconds[name])
    return {
        "model": model.name,
        "length": length,
        "phase": phase,
        "seconds": seconds,
        "best_single": best,
        "ratio": seconds[best] / seconds["auto"],
        "auto_precision": loaded["auto"]["precision"],
    }
