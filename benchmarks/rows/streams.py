"""Many answers at once: tokens a second of 32 streams, all together, each engine with its own continuous batching."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import checks, contest, models
from benchmarks.contest import Entrant
from benchmarks.result import Outcome
from benchmarks.rows import Settings
from benchmarks.rows.prompts import prompts

MODEL = models.SMOLLM2


def streams(settings: Settings) -> Outcome:
    """SmolLM2, int8, 32 prompts of 128 tokens answered with 128 tokens; peers OpenVINO, llama.cpp, vLLM."""
    count, length, tokens = settings.pick(32, 2), settings.pick(128, 16), settings.pick(128, 6)
    context = length + tokens
    own = Entrant(
        "dseek int8", "dseek", models.own_path(MODEL), {"precision": "int8", "batch": count, "objective": "throughput"}
    )
    peers = [] if settings.smoke else _peers(count)
    rounds = settings.rounds
    texts = prompts(MODEL, length, count * (rounds + 1))
    with contest.running([own, *peers], threads=settings.threads, context_tokens=context) as engines:

        def call_of(engine: contest.Running) -> Any:
            def call(round_idx: int) -> dict[str, Any]:
                batch = texts[count * (round_idx % (rounds + 1)) :][:count]
                answer = engine.process.call("generate_many", prompts=batch, num_tokens=tokens)
                engine.process.freeze()
                if [len(ids) for ids in answer["token_ids"]] != [tokens] * count:
                    raise RuntimeError(f"{engine.entrant.name} gave answers of other lengths")
                return {**answer, "prompt_idx": count * (round_idx % (rounds + 1))}

            return call

        answers = contest.alternate({engine.entrant.name: call_of(engine) for engine in engines}, rounds=rounds)
        first = {
            name: [{"token_ids": given[0]["token_ids"][0], "prompt_idx": given[0]["prompt_idx"]}]
            for name, given in answers.items()
        }
        checked = checks.check_answers(MODEL, texts, first, own.name, threads=settings.threads, max_prompts=1)
    whole_s = {name: statistics.median(answer["whole_s"] for answer in given) for name, given in answers.items()}
    best = min((name for name in whole_s if name != own.name), key=whole_s.__getitem__, default=None)
    return Outcome(
        value=whole_s[own.name] / (count * tokens),
        unit="s/token",
        ratio=None if best is None else whole_s[best] / whole_s[own.name],
        peer=best,
        details={
            "tokens_s": {name: count * tokens / seconds for name, seconds in whole_s.items()},
            "whole_s": {name: contest.spread_of(given, "whole_s") for name, given in answers.items()},
            "check": checked,
        },
    )


def _peers(count: int) -> list[Entrant]:
    """The peers, each with room for all streams."""
    return [
        Entrant(
            "OpenVINO GenAI int8, continuous batching",
            "openvino",
            str(models.openvino_folder(MODEL)),
            {"streams": count},
        ),
        Entrant(
            "llama.cpp Q8_0, parallel sequences", "llamacpp", str(models.gguf_file(MODEL, "Q8_0")), {"streams": count}
        ),
        Entrant("vLLM W8A8", "vllm", str(models.w8a8_folder(MODEL)), {"max_batch": count}),
    ]
