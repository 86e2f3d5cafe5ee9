"""Rows on the server, over HTTP: exactness under load, gaps, reuse of prefixes, a trace, a soak, hostile requests."""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks import models
from benchmarks.errors import BenchmarkError, IncorrectError
from benchmarks.hostile import complaint, hostile_requests
from benchmarks.paths import work_dir
from benchmarks.result import Outcome, ratio_to_bar
from benchmarks.rows import Settings
from benchmarks.rows.prompts import prompts
from benchmarks.server import TIMEOUT_S, Answered, BenchServer, serving, stream

MODEL = models.SMOLLM2

GAP_BAR = 4.0
"""Times its usual gap that a stream may wait while another's long prompt is computed."""

STREAM_TOKENS = 6000
"""Length of answers that are left before they end."""

SETTLED_TOKENS = 20
"""Tokens of every stream before a long prompt is sent."""

TRACE_VARIABLE = "BENCHMARKS_AZURE_TRACE"
"""Environment variable that names the trace."""

FIRST_TOKEN_BAR_S = 2.0
"""Time to first token that 95 of 100 requests are to keep."""

CROWDED_PAGES = 40
"""Pages of 64 tokens for eight streams that may want 16 each."""

GROWTH_BAR = 0.02
"""Growth of resident memory that a soak may show after its first tenth."""


def exact_under_load(settings: Settings) -> Outcome:
    """Answers of many streams at once, greedy and seeded, beside the same requests alone; fp32."""
    count = settings.pick(48, 6)
    draw = random.Random(0)
    texts = prompts(MODEL, settings.pick(700, 40), count)
    bodies = [
        {
            "prompt": text[: draw.randrange(len(text) // 8, len(text))],
            "max_tokens": draw.randrange(8, settings.pick(160, 24)),
            "temperature": draw.choice((0, 0.8)),
            "seed": number,
            "stop": ["\n\n\n"],
        }
        for number, text in enumerate(texts)
    ]
    delays_s = [draw.uniform(0, settings.pick(10, 1)) for _ in bodies]
    with serving(models.own_path(MODEL), options=["--plan", _crowded_plan(settings)]) as server:
        together = asyncio.run(server.ask_all(bodies, delays_s))
        counted = server.status()
        alone = [server.ask(body) for body in bodies]
        _check_idle(server)
    same = sum(_same(one, other) for one, other in zip(together, alone, strict=True))
    if same != count:
        raise IncorrectError(f"{count - same} of {count} answers differ from the same requests alone")
    return Outcome(
        value=same / count,
        unit="fraction",
        ratio=same / count,
        details={"requests": count, "preemptions": counted["preemptions"], "saved_tokens": counted["saved_tokens"]},
    )


def gap_long_prompt(settings: Settings) -> Outcome:
    """Longest gap of running streams while a long prompt is computed beside them, in usual gaps; int8."""
    length = settings.pick(8192, 256)
    worst: list[float] = []
    usual: list[float] = []
    waited: list[float] = []
    short = prompts(MODEL, 64, 4)
    positions = ["--max-position-embeddings", "16384"]  # the model was made for as many as the prompt has
    with _int8(settings, length + 1024, positions, batch=8) as server:
        for long_prompt in prompts(MODEL, length, settings.rounds):
            streams, disturbing = asyncio.run(_disturbed(server, short, long_prompt))
            waited.append(disturbing.times_s[0] - disturbing.sent_s)
            for answered in streams:
                gaps = list(zip(answered.gaps_s, answered.times_s[1:], strict=True))
                # The last gap counts, in which the long prompt's own first token came.
                beside = [gap for gap, at in gaps if at > disturbing.sent_s]
                if not beside:
                    raise IncorrectError("a stream stood still while the long prompt was computed")
                worst.append(max(beside))
                usual.append(statistics.median(gap for gap, at in gaps if at <= disturbing.sent_s))
        _check_idle(server)
    factor = statistics.median(worst) / statistics.median(usual)
    return Outcome(
        value=statistics.median(worst),
        unit="s",
        ratio=ratio_to_bar(GAP_BAR, factor),
        details={
            "usual_s": statistics.median(usual),
            "factor": factor,
            "greatest_s": max(worst),
            "long_prompt_first_token_s": statistics.median(waited),
            "streams": len(worst),
        },
    )


async def _disturbed(
    server: BenchServer, short: Sequence[list[int]], long_prompt: list[int]
) -> tuple[list[Answered], Answered]:
    """Let streams run, send a long prompt when all have had some tokens, and leave when each had one more after it."""
    streams = [Answered() for _ in short]
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S) as client:
        running = [
            asyncio.create_task(stream(client, _forced(prompt, STREAM_TOKENS), answered))
            for prompt, answered in zip(short, streams, strict=True)
        ]
        while not all(answered.num_tokens >= SETTLED_TOKENS for answered in streams):
            await asyncio.sleep(0.01)
        disturbing = await stream(client, _forced(long_prompt, 2))
        while not all(answered.times_s[-1] > disturbing.times_s[0] for answered in streams):
            if any(task.done() for task in running):
                raise IncorrectError("a stream ended before the long prompt was computed")
            await asyncio.sleep(0.01)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return streams, disturbing


def prefix_reuse(settings: Settings) -> Outcome:
    """Time to first token of a prompt whose beginning the server has computed, beside the whole prompt anew."""
    shared, own = settings.pick(1920, 192), settings.pick(64, 16)
    count = settings.rounds + 1
    beginnings = prompts(MODEL, shared, count)
    endings = prompts(MODEL, own, 2 * count)
    checked = _check_reuse(settings, beginnings[0], endings[:2])
    fresh, reused = [], []
    with _int8(settings, shared + own + 64, batch=4) as server:
        for number, beginning in enumerate(beginnings):
            first = server.ask(_forced(beginning + endings[2 * number], 2))
            saved = server.status()["saved_tokens"]
            second = server.ask(_forced(beginning + endings[2 * number + 1], 2))
            found = server.status()["saved_tokens"] - saved
            if found < shared - 64:
                raise IncorrectError(f"only {found} tokens of {shared} were found again")
            if number:  # the first pair warms up
                fresh.append(first.first_token_s)
                reused.append(second.first_token_s)
    value = statistics.median(reused)
    return Outcome(
        value=value,
        unit="s",
        ratio=statistics.median(fresh) / value,
        peer="dseek, the prompt computed anew",
        details={"fresh_s": fresh, "reused_s": reused, "check": checked},
    )


def _check_reuse(settings: Settings, beginning: list[int], endings: Sequence[list[int]]) -> dict[str, Any]:
    """In fp32 an answer after a prefix that was found is that of a server that keeps nothing."""
    bodies = [_forced(beginning + ending, 24) for ending in endings]
    said = []
    for option in ("--prefix-cache", "--no-prefix-cache"):
        options = ["--precision", "fp32", "--cache-dtype", "fp32", "--batch", "2", option]
        options += ["--threads", str(settings.threads), "--context", str(len(beginning) + 256)]
        with serving(models.own_path(MODEL), options=options) as server:
            said.append([server.ask(body).text for body in bodies])
            saved = server.status()["saved_tokens"]
            if (saved > 0) != (option == "--prefix-cache"):
                raise IncorrectError(f"{saved} tokens were found again with {option}")
    if said[0] != said[1]:
        raise IncorrectError("answers after a prefix that was found differ from those without")
    return {"answers": len(bodies)}


def ttft_azure(settings: Settings) -> Outcome:
    """Time to first token, p95, of the Azure conversation trace at a fifth of its rate; int8."""
    from dseek.serve.replay import Targets, fitted, replay, summed_up
    from dseek.serve.trace import read_trace, scaled

    path = os.environ.get(TRACE_VARIABLE)
    if not path or not Path(path).is_file():
        raise BenchmarkError(
            f"{TRACE_VARIABLE} must name AzureLLMInferenceTrace_conv.csv (the Azure LLM inference traces)"
        )
    context = settings.pick(4096, 256)
    trace = fitted(scaled(read_trace(path, settings.pick(300, 6)), settings.pick(1, 20) / 5), context)
    with _int8(settings, context, batch=16) as server:
        seen = asyncio.run(replay(server.url, trace, vocab_size=MODEL.sizes["vocab_size"]))
        _check_idle(server)
    report = summed_up(seen, Targets(first_token_s=FIRST_TOKEN_BAR_S, between_tokens_s=0.2))
    if report.failed:
        raise IncorrectError(f"{report.failed} requests failed: {next(one.error for one in seen if one.error)}")
    value = report.first_token_s["p95"]
    return Outcome(value=value, unit="s", ratio=ratio_to_bar(FIRST_TOKEN_BAR_S, value), details=report.as_json())


def soak(settings: Settings) -> Outcome:
    """Growth of the server's memory under load with clients that leave, from the first tenth of the time on."""
    seconds, workers = settings.pick(1800, 8), settings.pick(12, 3)
    texts = prompts(MODEL, 256, 16)
    counts = {"whole": 0, "left": 0}
    memory: list[int] = []

    async def run(server: BenchServer) -> None:
        end_s = time.monotonic() + seconds

        async def client(number: int) -> None:
            draw = random.Random(number)
            async with httpx.AsyncClient(base_url=server.url, timeout=600) as http:
                while time.monotonic() < end_s:
                    tokens = draw.randrange(1, settings.pick(128, 24))
                    body = {**_forced(draw.choice(texts)[: draw.randrange(1, 256)], tokens), "stream": True}
                    leave_after = draw.randrange(1, 12) if draw.random() < 0.2 else None
                    async with http.stream("POST", "/v1/completions", json=body) as response:
                        pieces, done = 0, False
                        async for line in response.aiter_lines():
                            pieces += line.startswith("data: {")
                            done |= line == "data: [DONE]"
                            if leave_after is not None and pieces >= leave_after:
                                break
                    if response.status_code != 200 or (leave_after is None and not done):
                        raise IncorrectError(f"a request ended with status {response.status_code}, done: {done}")
                    counts["whole" if done else "left"] += 1

        async def watch() -> None:
            while time.monotonic() < end_s:
                memory.append(server.resident_bytes())
                await asyncio.sleep(seconds / 100)

        await asyncio.gather(watch(), *map(client, range(workers)))

    with _int8(settings, 512, batch=8) as server:
        asyncio.run(run(server))
        _check_idle(server)
    tenth = max(1, len(memory) // 10)
    growth = max(statistics.median(memory[-tenth:]) / statistics.median(memory[tenth : 2 * tenth]) - 1, 0.0)
    return Outcome(
        value=growth,
        unit="fraction",
        ratio=ratio_to_bar(GROWTH_BAR, growth),
        details={**counts, "seconds": seconds, "resident_bytes": memory},
    )


def hostile(settings: Settings) -> Outcome:
    """Hostile requests that are answered as they should be, by a server that goes on answering the others."""
    count = settings.pick(10_000, 100)
    well = {"prompt": "The sea is", "max_tokens": 8, "temperature": 0}
    with _int8(settings, 512, batch=4) as server:
        before = server.ask(well).text
        wrong: list[str] = []
        with httpx.Client(base_url=server.url, timeout=120) as client:
            for number, request in enumerate(hostile_requests(count, seed=1)):
                headers = dict(request.headers)
                response = client.request(request.method, request.path, content=request.body, headers=headers)
                found = complaint(response.status_code, dict(response.headers), response.content)
                if found is not None:
                    wrong.append(f"{number}: {found}")
                if number % 100 == 0 and server.ask(well).text != before:
                    raise IncorrectError(f"after hostile request {number} a plain one is answered otherwise")
        _check_idle(server)
        if server.ask(well).text != before:
            raise IncorrectError("after the hostile requests a plain one is answered otherwise")
    if wrong:
        raise IncorrectError(f"{len(wrong)} of {count} hostile requests were answered wrongly: {'; '.join(wrong[:5])}")
    return Outcome(value=1.0, unit="fraction", ratio=1.0, details={"requests": count})


def _int8(settings: Settings, context_tokens: int, others: Sequence[str] = (), *, batch: int) -> Any:
    """A server of SmolLM2 in int8."""
    options = [*others, "--precision", "int8", "--batch", str(batch), "--context", str(context_tokens)]
    return serving(models.own_path(MODEL), options=[*options, "--threads", str(settings.threads)])


def _crowded_plan(settings: Settings) -> str:
    """A plan in fp32 with fewer pages than its streams want, so that some give way and are computed again."""
    path = work_dir() / "plans" / "crowded.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = ["--precision", "fp32", "--cache-dtype", "fp32", "--context", "1024", "--batch", "8"]
    command = [sys.executable, "-m", "dseek.cli.main", "plan", models.own_path(MODEL), *wanted]
    command += ["--threads", str(settings.threads), "--save", str(path)]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    plan = json.loads(path.read_text())
    path.write_text(json.dumps({**plan, "num_pages": CROWDED_PAGES}))
    return str(path)


def _forced(prompt: Sequence[int], num_tokens: int) -> dict[str, Any]:
    """A greedy request for exactly so many tokens."""
    return {"prompt": list(prompt), "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}


def _same(one: Answered, other: Answered) -> bool:
    """Whether two answers say the same and ended for the same reason."""
    return (one.text, one.num_tokens, one.finish_reason) == (other.text, other.num_tokens, other.finish_reason)


def _check_idle(server: BenchServer) -> None:
    """When nothing is asked, nothing runs and no page is held."""
    for _ in range(200):
        found = server.status()
        if found["running"] == found["waiting"] == 0 and found["free_pages"] == found["num_pages"]:
            return
        time.sleep(0.05)
    raise IncorrectError(f"the server is not idle afterwards: {found}")
