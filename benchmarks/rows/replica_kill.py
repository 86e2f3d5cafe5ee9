"""The row on replicas that die: `kill -9` of a Ray replica under load, what clients see, and when it is replaced."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from typing import Any

import httpx

import dseek
from benchmarks import models
from benchmarks.errors import IncorrectError
from benchmarks.result import Outcome, ratio_to_bar
from benchmarks.rows import Settings
from benchmarks.rows.prompts import prompts
from benchmarks.server import TIMEOUT_S, BenchServer, serving

MODEL = models.SMOLLM2

REPLACED_BAR_S = 15.0
"""Time from the kill until all replicas take requests again."""

EXACT = {"precision": "fp32", "cache_dtype": "fp32"}
"""What makes an answer the same whatever is computed beside it."""

BUSY = 2
"""Requests that a replica must have in work when it is killed."""


def replica_kill(settings: Settings) -> Outcome:
    """Seconds from the kill of a replica under load until it is replaced, the longest of some; fp32."""
    count, num_tokens = settings.pick(12, 3), settings.pick(96, 24)
    threads = max(1, settings.threads // 2)
    asked = prompts(MODEL, settings.pick(128, 16), count)
    with dseek.load(models.own_path(MODEL), **EXACT, context=512, threads=threads) as llm:
        outputs = llm.generate(asked, max_new_tokens=num_tokens, ignore_eos=True)
        expected = [output.text for output in outputs]
    options = ["--ray", "--workers", "2", "--threads", str(threads), "--context", "512", "--batch", "8"]
    options += ["--precision", EXACT["precision"], "--cache-dtype", EXACT["cache_dtype"]]
    with serving(models.own_path(MODEL), options=options) as server:
        load = _Load(server, asked, expected, num_tokens)
        replaced_s = asyncio.run(load.run(settings.pick(3, 1)))
    if load.wrong:
        raise IncorrectError(f"{len(load.wrong)} requests went wrong: {'; '.join(load.wrong[:5])}")
    if not load.counts["whole"] or not load.counts["streamed"]:
        raise IncorrectError(f"too few requests ended to judge by: {dict(load.counts)}")
    value = max(replaced_s)
    return Outcome(
        value=value,
        unit="s",
        ratio=ratio_to_bar(REPLACED_BAR_S, value),
        details={"replaced_s": replaced_s, "failed": 0, **load.counts},
    )


class _Load:
    """Clients that ask without a pause, every other one for a stream, and judge each answer."""

    def __init__(self, server: BenchServer, asked: list[list[int]], expected: list[str], num_tokens: int) -> None:
        self._server = server
        self._asked = asked
        self._expected = expected
        self._num_tokens = num_tokens
        self._enough = False
        self._ended = [0] * len(asked)
        self.counts: Counter[str] = Counter(whole=0, streamed=0, cut_off=0)
        self.wrong: list[str] = []

    async def run(self, kills: int) -> list[float]:
        """Kill one replica after the other under load; return how long each one's replacement took."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._server.url, timeout=TIMEOUT_S, limits=limits) as client:
            clients = [asyncio.create_task(self._client(client, number)) for number in range(len(self._asked))]
            replaced_s = []
            for number in range(kills):
                replaced_s.append(await self._kill(client, number % 2))
                await self._settle()
            self._enough = True
            await asyncio.gather(*clients)
        return replaced_s

    async def _kill(self, client: httpx.AsyncClient, number: int) -> float:
        """Kill a replica that is at work, and wait until another one stands in its place and is ready."""
        while (before := (await _replicas(client))[number])["busy"] < BUSY:
            await asyncio.sleep(0.05)
        os.kill(before["pid"], signal.SIGKILL)
        began_s = time.monotonic()
        while time.monotonic() < began_s + TIMEOUT_S:
            found = await _replicas(client)
            if found[number]["starts"] > before["starts"] and all(one["ready"] for one in found):
                return time.monotonic() - began_s
            await asyncio.sleep(0.05)
        raise IncorrectError(f"replica {number} was not replaced")

    async def _settle(self) -> None:
        """Wait until all that ran with the last kill has ended: what is lost again and again is given up, rightly."""
        before = list(self._ended)
        while any(now == then for now, then in zip(self._ended, before, strict=True)):
            await asyncio.sleep(0.05)

    async def _client(self, client: httpx.AsyncClient, number: int) -> None:
        """Ask one prompt again and again, whole or as a stream."""
        streamed = number % 2 == 1
        body = {"prompt": self._asked[number], "max_tokens": self._num_tokens, "temperature": 0, "ignore_eos": True}
        while not self._enough:
            try:
                if streamed:
                    await self._stream(client, {**body, "stream": True}, self._expected[number])
                else:
                    response = await client.post("/v1/completions", json=body)
                    if response.status_code != 200:
                        self.wrong.append(f"status {response.status_code}: {response.text[:200]}")
                    else:
                        self._judge("whole", response.json()["choices"][0]["text"], self._expected[number])
            except httpx.HTTPError as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
            self._ended[number] += 1

    async def _stream(self, client: httpx.AsyncClient, body: dict[str, Any], expected: str) -> None:
        """Read one stream, which ends as it should or, once begun, with an error that says so."""
        text, error, begun, done = "", None, False, False
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                self.wrong.append(f"status {response.status_code} of a stream: {(await response.aread())[:200]!r}")
                return
            async for line in response.aiter_lines():
                done |= line == "data: [DONE]"
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    error = chunk.get("error", error)
                    begun |= "choices" in chunk
                    text += "".join(choice["text"] for choice in chunk.get("choices", ()))
        if error is None:
            self._judge("streamed", text, expected)
        elif begun and expected.startswith(text.rstrip("\ufffd")) and error["code"] == "replica_failed":
            self.counts["cut_off"] += 1
        else:
            self.wrong.append(f"a stream ended with {error} after {len(text)} characters")
        if not done:
            self.wrong.append("a stream ended without its last event")

    def _judge(self, kind: str, text: str, expected: str) -> None:
        self.counts[kind] += 1
        if text != expected:
            self.wrong.append(f"an answer differs from the one that was generated alone: {text[:80]!r}")


async def _replicas(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    """What the server says of its replicas, in order of their numbers."""
    found: list[dict[str, Any]] = (await client.get("/v1/dseek/status")).json()["replicas"]
    return found
