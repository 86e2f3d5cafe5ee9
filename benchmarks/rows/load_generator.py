"""A public load generator against `dseek serve`, each as its own authors ship it: GuideLLM, from PyPI."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.errors import BenchmarkError, IncorrectError
from benchmarks.paths import work_dir
from benchmarks.peers import environments
from benchmarks.result import Outcome
from benchmarks.rows import Settings
from benchmarks.server import serving

MODEL = models.SMOLLM2
STREAMS, BATCH = 8, 8
PROMPT_TOKENS, ANSWER_TOKENS = 128, 32
"""Of a request, before the chat template."""
CONTEXT_TOKENS = 512
TIMEOUT_S = 1800.0


def load_generator(settings: Settings) -> Outcome:
    """Synthetic prompts from eight clients at once, streamed, each to be answered with 32 tokens."""
    count = settings.pick(200, 8)
    tool = environments.interpreter("guidellm").with_name("guidellm")
    tokenizer = models.hf_folder(MODEL)
    options = ["--precision", "int8", "--batch", str(BATCH), "--context", str(CONTEXT_TOKENS)]
    with serving(models.own_path(MODEL), options=[*options, "--threads", str(settings.threads)]) as server:
        report = _run(tool, server.url, tokenizer, count)
    return outcome_of(report, count)


def outcome_of(report: dict[str, Any], count: int) -> Outcome:
    """Judge a report of the load generator.

    Args:
        report: its JSON.
        count: requests that were wanted.

    Returns:
        The share of requests that succeeded, with the tool's own times.

    Raises:
        IncorrectError: requests were lost, or answers have another length than was asked for.
        BenchmarkError: the report is not in the form of the version that is installed.
    """
    try:
        (found,) = report["benchmarks"]
        totals, metrics = found["metrics"]["request_totals"], found["metrics"]
        tokens = metrics["output_token_count"]["successful"]
        times = {
            name: {"median": spread["median"], "p99": spread["percentiles"]["p99"]}
            for name in ("time_to_first_token_ms", "inter_token_latency_ms")
            for spread in [metrics[name]["successful"]]
        }
        lengths = (tokens["min"], tokens["max"])
        succeeded, whole = int(totals["successful"]), int(totals["total"])
    except (KeyError, TypeError, ValueError) as error:
        raise BenchmarkError(f"GuideLLM wrote a report that is not understood: {error!r}") from None
    if whole != count or succeeded != count:
        raise IncorrectError(f"of {count} requests {whole} were made and {succeeded} succeeded: {totals}")
    if lengths != (ANSWER_TOKENS, ANSWER_TOKENS):
        raise IncorrectError(f"answers have {lengths[0]} to {lengths[1]} tokens instead of {ANSWER_TOKENS}")
    return Outcome(
        value=succeeded / count,
        unit="fraction",
        ratio=succeeded / count,
        details={"requests": whole, "streams": STREAMS, **times},
    )


def _run(tool: Path, url: str, tokenizer: Path, count: int) -> dict[str, Any]:
    """Let the load generator run and read its report."""
    path = work_dir() / "guidellm.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    command = [str(tool), "run", "--disable-progress", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={url}"]
    command += ["--profile", f"kind=concurrent,streams={STREAMS}"]
    command += ["--constraint", f"kind=max_requests,count={count}"]
    command += ["--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={ANSWER_TOKENS}"]
    command += ["--tokenizer", f"kind=hf_auto,model={tokenizer}", "--output", f"kind=json,path={path}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0 or not path.exists():
        raise BenchmarkError(f"GuideLLM ended with status {done.returncode}: {(done.stderr or done.stdout)[-1000:]}")
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report
