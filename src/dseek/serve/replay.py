"""Replays a trace against a server, and sums up what its clients saw.

Requests are sent at their times whatever happened to those before (an open loop), so a server that falls behind shows
it. Prompts are random token ids, a seed's, of the trace's lengths; answers are forced to theirs.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from dseek.serve.trace import Arrival

PERCENTILES = (50, 95, 99)


@dataclass(slots=True)
class Seen:
    """What a client saw of one request."""

    arrival: Arrival
    """What was asked."""
    first_token_s: float | None = None
    """From sending to the first piece."""
    gaps_s: list[float] = field(default_factory=list)
    """Between pieces."""
    whole_s: float = 0.0
    """From sending to the end."""
    num_tokens: int = 0
    """Tokens of the answer, as the server counts them."""
    error: str | None = None
    """Why it failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What an answer has to keep to count as good."""

    first_token_s: float
    """Most seconds to the first token."""
    between_tokens_s: float
    """Most seconds between tokens, on average over an answer."""

    def met(self, seen: Seen) -> bool:
        """Whether a request was served well.

        Args:
            seen: what its client saw.
        """
        if seen.error is not None or seen.first_token_s is None or seen.first_token_s > self.first_token_s:
            return False
        return (
            seen.num_tokens < 2 or (seen.whole_s - seen.first_token_s) / (seen.num_tokens - 1) <= self.between_tokens_s
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A replay, summed up; times in seconds at the 50th, 95th and 99th percentile."""

    requests: int
    """Requests sent."""
    failed: int
    """Of these, those that failed."""
    seconds: float
    """From the first request to the last answer's end."""
    offered_s: float
    """Requests a second that the trace asked for."""
    tokens_s: float
    """Tokens of answers a second, all together."""
    first_token_s: dict[str, float]
    """From sending to the first token."""
    between_tokens_s: dict[str, float]
    """Between tokens."""
    whole_s: dict[str, float]
    """From sending to the end."""
    goodput_s: float
    """Requests a second that kept both targets."""
    good_share: float
    """Share of the requests that did."""
    targets: Targets
    """The targets."""

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def fitted(trace: Sequence[Arrival], context_tokens: int) -> list[Arrival]:
    """Cut requests to what a server's context holds: prompts first, answers to at most half.

    Args:
        trace: the requests.
        context_tokens: tokens of prompt and answer together.

    Returns:
        Requests that fit.
    """
    fitting = []
    for arrival in trace:
        answer = min(arrival.answer_tokens, max(1, context_tokens // 2))
        prompt = max(1, min(arrival.prompt_tokens, context_tokens - answer - 1))
        fitting.append(Arrival(arrival.at_s, prompt, answer))
    return fitting


async def replay(
    url: str,
    trace: Sequence[Arrival],
    *,
    vocab_size: int,
    seed: int = 0,
    api_key: str | None = None,
    timeout_s: float = 600.0,
    on_end: Callable[[Seen], None] = lambda seen: None,
) -> list[Seen]:
    """Send the requests of a trace at their times.

    Args:
        url: the server, without `/v1`.
        trace: the requests.
        vocab_size: token ids are drawn below it.
        seed: of the prompts.
        api_key: sent along, or None.
        timeout_s: longest wait for a piece.
        on_end: called as each request ends.

    Returns:
        What the clients saw, in order of arrival.
    """
    draw = random.Random(seed)
    prompts = [[draw.randrange(vocab_size) for _ in range(arrival.prompt_tokens)] for arrival in trace]
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout_s, limits=limits) as client:
        began_s = time.perf_counter()

        async def one(arrival: Arrival, prompt: list[int]) -> Seen:
            await asyncio.sleep(max(0.0, began_s + arrival.at_s - time.perf_counter()))
            seen = Seen(arrival)
            await _ask(client, prompt, seen)
            on_end(seen)
            return seen

        return await asyncio.gather(*(one(*pair) for pair in zip(trace, prompts, strict=True)))


async def _ask(client: httpx.AsyncClient, prompt: list[int], seen: Seen) -> None:
    """Stream one answer and note when its pieces come."""
    body = {
        "prompt": prompt,
        "max_tokens": seen.arrival.answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    sent_s = last_s = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                seen.error = f"status {response.status_code}: {response.text[:200]}"
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    seen.error = str(chunk["error"]["message"])
                    return
                now_s = time.perf_counter()
                count = chunk["usage"]["completion_tokens"]
                if chunk["choices"] and count > seen.num_tokens:
                    if seen.first_token_s is None:
                        seen.first_token_s = now_s - sent_s
                    else:
                        new = count - seen.num_tokens
                        seen.gaps_s.extend([(now_s - last_s) / new] * new)
                    last_s = now_s
                seen.num_tokens = max(seen.num_tokens, count)
        if seen.num_tokens != seen.arrival.answer_tokens:
            seen.error = f"{seen.num_tokens} tokens came, {seen.arrival.answer_tokens} were asked for"
    except (httpx.HTTPError, ValueError, KeyError) as error:
        seen.error = f"{type(error).__name__}: {error}"
    finally:
        seen.whole_s = time.perf_counter() - sent_s


def summed_up(results: Sequence[Seen], targets: Targets) -> Report:
    """Sum a replay up.

    Args:
        results: what the clients saw, at least one.
        targets: what counts as served well.

    Returns:
        The figures; failed requests count as not good and in no percentile.
    """
    whole = [seen for seen in results if seen.error is None]
    span_s = max(seen.arrival.at_s + seen.whole_s for seen in results)
    last_arrival_s = max(seen.arrival.at_s for seen in results)
    num_good = sum(map(targets.met, results))
    return Report(
        requests=len(results),
        failed=len(results) - len(whole),
        seconds=span_s,
        offered_s=len(results) / last_arrival_s if last_arrival_s > 0 else float(len(results)),
        tokens_s=sum(seen.num_tokens for seen in whole) / span_s if span_s > 0 else 0.0,
        first_token_s=percentiles([seen.first_token_s for seen in whole if seen.first_token_s is not None]),
        between_tokens_s=percentiles([gap for seen in whole for gap in seen.gaps_s]),
        whole_s=percentiles([seen.whole_s for seen in whole]),
        goodput_s=num_good / span_s if span_s > 0 else 0.0,
        good_share=num_good / len(results),
        targets=targets,
    )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Find the percentiles that are reported, by the nearest rank.

    Args:
        values: any number of them.

    Returns:
        `p50`, `p95`, `p99`; empty without values.
    """
    if not values:
        return {}
    ordered = sorted(values)
    # The nearest rank is the ceiling of p * n / 100, counted from 1.
    return {f"p{p}": ordered[max(0, -(-p * len(ordered) // 100) - 1)] for p in PERCENTILES}
