"""Load to first token: a fresh process each time, from its start to the first token of an answer, as a user waits.

The harness reads the clock before it makes the process, and the worker reads the same clock (CLOCK_MONOTONIC, one for
the whole system) when it has the token. So the figure holds the interpreter's start, all imports, opening the model,
bringing the weights into the engine's layout, the tokenizer and the prompt; when an engine imports what, does not
matter. The request waits in the worker's pipe from the beginning. What the worker itself imports is the same small
part of the standard library for both. llama.cpp is used through its Python package, llama-cpp-python, whose imports
count as dseek's do.

The details give `after_import_s` beside it: the time from after the worker's import of its engine, the engine's own
work without the imports that it does at once. It favours an engine that imports everything at once, as
llama-cpp-python does, over one that imports when it needs to, as dseek does: there the imports, NumPy's too, are
inside.

The file is in the page cache for both, and so is the bytecode of both packages. dseek's machine measurements are in
its cache, as after any first use.
"""

from __future__ import annotations

from typing import Any

from benchmarks import checks, models
from benchmarks.contest import Entrant, alternate, median_of, spread_of
from benchmarks.peers.client import PeerProcess
from benchmarks.result import Outcome
from benchmarks.rows import Settings

OWN = "dseek int4"
PEER = "llama.cpp Q4_1"
PROMPT = "The sea is calm tonight. The tide is full, the moon lies fair upon"
CONTEXT_TOKENS = 4096


def load(settings: Settings) -> Outcome:
    """The Q4_1 file as it is, in both engines; the share is that of weights and cache in dseek's peak memory."""
    model = models.SMOLLM2
    path = str(models.gguf_file(model))
    entrants = {
        OWN: Entrant(OWN, "dseek", path, {"precision": "int4", "batch": 1}),
        PEER: Entrant(PEER, "llamacpp", path),
    }
    context = settings.pick(CONTEXT_TOKENS, 512)

    def start(entrant: Entrant) -> dict[str, Any]:
        with PeerProcess(entrant.worker, threads=settings.threads) as process:
            answer = process.call(
                "start",
                path=entrant.path,
                threads=settings.threads,
                context_tokens=context,
                prompt=PROMPT,
                options=entrant.options,
            )
            answer["process_to_token_s"] = answer["first_token_at_s"] - process.started_s
            answer["peak_bytes"] = process.call("memory")["peak_bytes"]
            return answer

    calls = {OWN: lambda _: start(entrants[OWN]), PEER: lambda _: start(entrants[PEER])}
    answers = alternate(calls, rounds=settings.rounds)
    judged = {name: [{"prompt_idx": 0, "token_ids": [given[0]["token_id"]]}] for name, given in answers.items()}
    prompt_ids = answers[OWN][0]["prompt_token_ids"]
    checked = checks.check_answers(model, [prompt_ids], judged, OWN, threads=settings.threads)
    checks.check_equal(
        "prompt tokens", prompt_ids, answers[PEER][0]["prompt_token_ids"], hint="the two tokenizers disagree"
    )
    own_s, peer_s = (median_of(answers[name], "process_to_token_s") for name in (OWN, PEER))
    peak_bytes = median_of(answers[OWN], "peak_bytes")
    plan = answers[OWN][0]
    return Outcome(
        value=own_s,
        unit="s",
        ratio=peer_s / own_s,
        limit_share=(plan["weights_bytes"] + plan["cache_bytes"]) / peak_bytes,
        peer=PEER,
        details={
            "first_token_s": {name: spread_of(given, "process_to_token_s") for name, given in answers.items()},
            "after_import_s": {name: spread_of(given, "first_token_s") for name, given in answers.items()},
            "peak_bytes": {name: spread_of(given, "peak_bytes") for name, given in answers.items()},
            "weights_bytes": plan["weights_bytes"],
            "cache_bytes": plan["cache_bytes"],
            "context": context,
            "check": checked,
        },
    )
