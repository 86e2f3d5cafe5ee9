"""The planner's own claims: published counts, predicted times and memory, and whether it picks what is fastest.

The three rows about measured runs share their points, which are kept in the cache as they are measured: a run that was
stopped goes on, and the second row finds the first one's points. A point holds for one machine, kernels and version.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from benchmarks import checks, contest, models
from benchmarks.contest import Entrant
from benchmarks.errors import IncorrectError
from benchmarks.models import BenchModel
from benchmarks.paths import work_dir
from benchmarks.published import ACTIVE, PARAMETERS, TRAINING_FLOPS
from benchmarks.result import Outcome, ratio_to_bar
from benchmarks.rows import Settings
from benchmarks.rows.prompts import prompts

COUNT_BAR = 0.02
"""Largest error of a count."""

TIME_BAR, TIME_TAIL_BAR = 0.10, 0.25
"""Largest median and largest 90th percentile of the errors of times."""

MEMORY_BAR, SHORT_BAR = 0.05, 0.10
"""Largest median error of peaks, and the most by which one may be foretold too small."""

PICK_BAR, PICK_CASES = 0.05, 11 / 12
"""The time that a pick may lose, and in how many of the cases it has to lose no more."""

FRONT_BARS_S = {"1.1B": 2.0, "671B": 10.0}
"""Longest time of a whole front."""

PRECISIONS = ("int8", "int4", "bf16", "fp16", "fp32")
GROUPS = (((128, 1), (128, 8), (128, 32), (512, 1), (512, 16)), ((2048, 1), (2048, 4)), ((8192, 1),))
"""Prompt and batch of the points that one load measures: the cache is as large as the largest of them together."""

LARGE_GROUPS = (((128, 1), (128, 8), (512, 1)), ((2048, 1),))
"""The same for the large model."""

ANSWER_TOKENS = 128
"""Tokens of the request by which picks are compared."""

WIDE = BenchModel(
    name="llama-odd-wide-random",
    sizes={
        "hidden_size": 1280,
        "intermediate_size": 3008,
        "num_hidden_layers": 12,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "vocab_size": 48000,
    },
    seed=2,
)
DEEP = BenchModel(
    name="llama-odd-deep-random",
    sizes={
        "hidden_size": 640,
        "intermediate_size": 2208,
        "num_hidden_layers": 24,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "vocab_size": 20000,
    },
    seed=3,
)
"""Shapes that the machine was not measured with."""


def plan_what_if(settings: Settings) -> Outcome:
    """Largest error of parameters and operations against published figures; how long whole fronts take."""
    from dseek.plan.outline import read_outline

    errors: dict[str, float] = {}
    for name, count in PARAMETERS.items():
        errors[f"{name} parameters"] = abs(read_outline(name).num_parameters() / count - 1)
    for name, (count, with_embedding) in ACTIVE.items():
        outline = read_outline(name)
        table = outline.vocab_size * outline.hidden_size if with_embedding else 0
        errors[f"{name} active parameters"] = abs((outline.num_parameters(active=True) + table) / count - 1)
    for name, (sequence, flops) in TRAINING_FLOPS.items():
        errors[f"{name} operations"] = abs(read_outline(name).training_flops_per_token(sequence) / flops - 1)
    seconds = {"671B": _described_front_s(), "1.1B": _measured_front_s()}
    worst = max(errors.values())
    ratios = [ratio_to_bar(COUNT_BAR, worst)]
    ratios += [ratio_to_bar(FRONT_BARS_S[name], value) for name, value in seconds.items()]
    return Outcome(
        value=worst,
        unit="fraction",
        ratio=min(ratios),
        details={"errors": errors, "front_s": seconds, "ratios": ratios},
    )


def _described_front_s() -> float:
    """Seconds of the front of DeepSeek-V3 on eight A100."""
    from dseek.plan import what_if
    from dseek.plan.devices import load_machine
    from dseek.plan.outline import read_outline
    from dseek.plan.pareto import judge

    outline, machine = read_outline("deepseek-v3"), load_machine("a100x8")
    started_s = time.perf_counter()
    points = what_if.search(
        outline,
        machine,
        context_tokens=2048,
        precisions=tuple(what_if.WEIGHT_BITS),
        cache_dtypes=tuple(what_if.CACHE_BYTES),
    )
    entries = [(point.split.text(), point.token_s, point.memory_bytes, point.quality_loss) for point in points]
    judged = judge(entries, memory_limit_bytes=72e9, max_quality_loss=0.3)
    if sum(point.is_chosen for point in judged) != 1:
        raise IncorrectError("the front has no choice")
    return time.perf_counter() - started_s


def _measured_front_s() -> float:
    """Seconds of the front of a 1.1B model on this machine."""
    from dseek.core.shape import ModelShape
    from dseek.hardware.store import load_or_measure
    from dseek.plan.attention_wish import AttentionWish
    from dseek.plan.candidates import Wishes
    from dseek.plan.head_facts import HeadFacts
    from dseek.plan.objective import Objective
    from dseek.plan.pareto import explore

    sizes = models.LLAMA_1B.sizes
    shape = ModelShape(
        family="llama",
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["hidden_size"] // sizes["num_attention_heads"],
        max_position_embeddings=8192,
    )
    machine = load_or_measure()
    wishes = Wishes(
        model="1.1B",
        precision="auto",
        cache_dtype=None,
        num_threads=None,
        prefill_chunk_tokens=None,
        kernels=None,
        attention=AttentionWish(),
        heads=HeadFacts(),
    )
    started_s = time.perf_counter()
    points = explore(shape, machine, Objective(max_quality_loss=0.1), {"BF16": shape.num_parameters()}, wishes)
    if sum(point.is_chosen for point in points) != 1:
        raise IncorrectError("the front has no choice")
    return time.perf_counter() - started_s


def plan_time(settings: Settings) -> Outcome:
    """Median error of prefill and decode times over all points."""
    points = [point for point in _points(settings) if point["kind"] == "time"]
    errors = {
        key: [abs(point["predicted"][key] / point["measured"][key] - 1) for point in points]
        for key in ("prefill_tokens_s", "decode_tokens_s")
    }
    everything = sorted(error for found in errors.values() for error in found)
    median, tail = statistics.median(everything), everything[int(0.9 * (len(everything) - 1))]
    return Outcome(
        value=median,
        unit="fraction",
        ratio=min(ratio_to_bar(TIME_BAR, median), ratio_to_bar(TIME_TAIL_BAR, tail)),
        details={
            "num_points": len(points),
            "percentile_90": tail,
            "median_by_kind": {key: statistics.median(found) for key, found in errors.items()},
            "greatest": max(everything),
            "points": points,
        },
    )


def plan_memory(settings: Settings) -> Outcome:
    """Median error of the predicted peak of memory over all loads."""
    points = [point for point in _points(settings) if point["kind"] == "memory"]
    signed = [point["predicted_bytes"] / point["measured_bytes"] - 1 for point in points]
    errors = list(map(abs, signed))
    median, short = statistics.median(errors), max(0.0, -min(signed))
    return Outcome(
        value=median,
        unit="fraction",
        ratio=min(ratio_to_bar(MEMORY_BAR, median), ratio_to_bar(SHORT_BAR, max(short, 1e-6))),
        details={"num_points": len(points), "greatest": max(errors), "most_too_small": short, "points": points},
    )


def plan_pick(settings: Settings) -> Outcome:
    """In how many cases the precision of least predicted time is as good as the fastest measured, or nearly."""
    cases: dict[tuple[str, int, int], list[dict[str, Any]]] = defaultdict(list)
    for point in _points(settings):
        if point["kind"] == "time":
            cases[point["model"], point["context"], point["batch"]].append(point)

    def request_s(point: dict[str, Any], kind: str) -> float:
        rates, batch = point[kind], point["batch"]
        prefill_s = batch * point["context"] / rates["prefill_tokens_s"]
        return float(prefill_s + batch * ANSWER_TOKENS / rates["decode_tokens_s"])

    lost, picks = [], []
    for (model, context, batch), found in cases.items():
        pick = min(found, key=lambda point: request_s(point, "predicted"))
        best = min(found, key=lambda point: request_s(point, "measured"))
        lost.append(request_s(pick, "measured") / request_s(best, "measured") - 1)
        picks.append(
            {
                "model": model,
                "context": context,
                "batch": batch,
                "picked": pick["precision"],
                "fastest": best["precision"],
                "lost": lost[-1],
            }
        )
    good = sum(share <= PICK_BAR for share in lost) / len(lost)
    return Outcome(
        value=good,
        unit="fraction",
        ratio=good / PICK_CASES,
        details={
            "num_cases": len(picks),
            "hits": sum(pick["lost"] == 0 for pick in picks),
            "mean_lost": statistics.mean(lost),
            "picks": picks,
        },
    )


def _jobs(settings: Settings) -> Iterator[tuple[BenchModel, str, tuple[tuple[int, int], ...]]]:
    """Model, precision and cases of every load."""
    if settings.smoke:
        for precision in ("int8", "fp32"):
            yield models.LLAMA_TINY, precision, ((32, 1), (32, 2))
        return
    for model in (models.SMOLLM2, WIDE, DEEP, models.LLAMA_1B):
        groups = LARGE_GROUPS if model is models.LLAMA_1B else GROUPS
        for precision in PRECISIONS:
            for group in groups:
                yield model, precision, group


def _points(settings: Settings) -> list[dict[str, Any]]:
    """All points, measured where they are not kept."""
    from dseek import __version__
    from dseek.hardware.store import load_or_measure

    machine_id = load_or_measure().machine_id
    path = work_dir() / "plan-points" / f"{machine_id}-{__version__}-{settings.threads}t.jsonl"
    kept: dict[str, list[dict[str, Any]]] = {}
    if not settings.smoke and path.is_file():
        for line in path.read_text().splitlines():
            try:
                done = json.loads(line)
                kept[done["job"]] = done["points"]
            except (ValueError, KeyError, TypeError):
                continue  # the line that was being written when a run was stopped
    found: list[dict[str, Any]] = []
    for model, precision, cases in _jobs(settings):
        job = f"{model.name} {precision} {cases}"
        if job not in kept:
            kept[job] = _measure(settings, model, precision, cases)
            if not settings.smoke:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    file.write("\n" + json.dumps({"job": job, "points": kept[job]}) + "\n")
        found += kept[job]
    return found


def _measure(
    settings: Settings, model: BenchModel, precision: str, cases: tuple[tuple[int, int], ...]
) -> list[dict[str, Any]]:
    """Measure the cases of one load beside their predictions."""
    num_tokens, rounds = settings.pick(24, 4), settings.pick(3, 1)
    longest, largest = max(context for context, _ in cases), max(batch for _, batch in cases)
    # The batch's cache must hold every case; short prompts leave room for many of them.
    entrant = Entrant(f"dseek {precision}", "dseek", models.own_path(model), {"precision": precision, "batch": largest})
    found: list[dict[str, Any]] = []
    about = {"model": model.name, "precision": precision}
    with contest.running([entrant], threads=settings.threads, context_tokens=longest + num_tokens) as engines:
        process = engines[0].process
        for context, batch in cases:
            texts = prompts(model, context, batch)
            asked = {"prompts": texts, "num_tokens": num_tokens}
            process.call("generate_batch", prompts=texts[:1], num_tokens=2)
            answers = [process.call("generate_batch", **asked) for _ in range(rounds if context < 8192 else 1)]
            if any(len(ids) != num_tokens for ids in answers[0]["token_ids"]):
                raise IncorrectError(f"an answer of {model.name} in {precision} has another length than was asked for")
            middle = context + num_tokens // 2
            predicted = process.call("predict", prompt_tokens=context, context_tokens=middle, batch=batch)
            measured = {
                "prefill_tokens_s": batch * context / contest.median_of(answers, "first_token_s"),
                "decode_tokens_s": batch / contest.median_of(answers, "token_s"),
            }
            case = {"kind": "time", "context": context, "batch": batch, "measured": measured}
            found.append({**about, **case, "predicted": {key: predicted[key] for key in measured}})
        memory = {
            "kind": "memory",
            "cases": [list(case) for case in cases],
            "predicted_bytes": engines[0].loaded["predicted_peak_bytes"],
            "measured_bytes": process.call("memory")["peak_bytes"],
        }
        found.append({**about, **memory})
        process.freeze()
        if model is models.SMOLLM2 and longest <= 512:
            # The figures are of runs that answer rightly: the last case's first prompt is judged.
            judged = {entrant.name: [{"prompt_idx": 0, "token_ids": answers[-1]["token_ids"][0]}]}
            checks.check_answers(model, texts, judged, entrant.name, threads=settings.threads)
    return found
