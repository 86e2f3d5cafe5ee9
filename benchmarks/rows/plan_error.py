"""Planned against measured: how far the cost model is off, over precisions, contexts and batches."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import checks, contest, models
from benchmarks.contest import Entrant
from benchmarks.result import Outcome, ratio_to_bar
from benchmarks.rows import Settings
from benchmarks.rows.prompts import prompts

BAR = 0.15
"""Largest median error."""

PRECISIONS = ("int8", "int4", "bf16")
CONTEXTS = (128, 1024, 4096)
BATCHES = (1, 4)


def plan_error(settings: Settings) -> Outcome:
    """Error of prefill and decode rates of every combination; the median of all of them counts.

    A combination's prefill is that of `batch` prompts of `context` tokens together, its decode the steps after them.
    """
    model = models.SMOLLM2
    contexts = (64,) if settings.smoke else CONTEXTS
    num_tokens = settings.pick(32, 4)
    rounds = settings.pick(3, 1)
    combinations: list[dict[str, Any]] = []
    checked = {}
    for precision in PRECISIONS:
        options = {"precision": precision, "batch": max(BATCHES)}
        entrant = Entrant(f"dseek {precision}", "dseek", models.own_path(model), options)
        context_tokens = max(contexts) + num_tokens
        with contest.running([entrant], threads=settings.threads, context_tokens=context_tokens) as engines:
            process = engines[0].process
            for context in contexts:
                texts = prompts(model, context, max(BATCHES))
                for batch in BATCHES:
                    asked = {"prompts": texts[:batch], "num_tokens": num_tokens}
                    answers = [process.call("generate_batch", **asked) for _ in range(rounds + 1)][1:]
                    middle = context + num_tokens // 2
                    predicted = process.call("predict", prompt_tokens=context, context_tokens=middle, batch=batch)
                    measured = {
                        "prefill_tokens_s": batch * context / contest.median_of(answers, "first_token_s"),
                        "decode_tokens_s": batch / contest.median_of(answers, "token_s"),
                    }
                    errors = {key: abs(predicted[key] / measured[key] - 1) for key in measured}
                    combinations.append(
                        {
                            "precision": precision,
                            "context": context,
                            "batch": batch,
                            "predicted": {key: predicted[key] for key in measured},
                            "measured": measured,
                            "errors": errors,
                        }
                    )
            process.freeze()
            # The figures are of runs that answer rightly: the last batch's first prompt is judged.
            judged = {entrant.name: [{"prompt_idx": 0, "token_ids": answers[0]["token_ids"][0]}]}
            checked[precision] = checks.check_answers(model, texts, judged, entrant.name, threads=settings.threads)
    errors_by_kind = {
        key: [combination["errors"][key] for combination in combinations]
        for key in ("prefill_tokens_s", "decode_tokens_s")
    }
    everything = [error for errors in errors_by_kind.values() for error in errors]
    median = statistics.median(everything)
    return Outcome(
        value=median,
        unit="fraction",
        ratio=ratio_to_bar(BAR, median),
        details={
            "combinations": combinations,
            "median_by_kind": {key: statistics.median(errors) for key, errors in errors_by_kind.items()},
            "greatest": max(everything),
            "check": checked,
        },
    )
