"""A `dseek serve` process for a row: started on a free port, asked over HTTP as its users do, stopped at the end."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.errors import BenchmarkError
from benchmarks.paths import work_dir

TIMEOUT_S = 1800.0


@dataclass(slots=True)
class Answered:
    """One streamed answer."""

    text: str = ""
    """Its text."""
    num_tokens: int = 0
    """Its tokens, as the server counts them."""
    finish_reason: str | None = None
    """Why it ended."""
    times_s: list[float] = field(default_factory=list)
    """When each piece came, by `time.perf_counter`."""
    sent_s: float = 0.0
    """When the request was sent, by the same clock."""

    @property
    def first_token_s(self) -> float:
        """Seconds from sending to the first piece."""
        return self.times_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between pieces."""
        return [after - before for before, after in zip(self.times_s, self.times_s[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class BenchServer:
    """A running server."""

    url: str
    """Its address."""
    process_id: int
    """Of the process, for its memory."""

    def status(self) -> dict[str, Any]:
        """What its engine says of itself."""
        found: dict[str, Any] = httpx.get(f"{self.url}/v1/dseek/status", timeout=60).json()
        return found

    def resident_bytes(self) -> int:
        """Resident memory of the process."""
        for line in Path(f"/proc/{self.process_id}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
        raise BenchmarkError("the server has ended")

    def ask(self, body: dict[str, Any]) -> Answered:
        """Stream one answer and wait for its end."""
        return asyncio.run(self.ask_all([body]))[0]

    async def ask_all(self, bodies: Sequence[dict[str, Any]], delays_s: Sequence[float] = ()) -> list[Answered]:
        """Stream several answers at once, each sent after its delay."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT_S, limits=limits) as client:

            async def one(number: int) -> Answered:
                if delays_s:
                    await asyncio.sleep(delays_s[number])
                return await stream(client, bodies[number])

            return await asyncio.gather(*map(one, range(len(bodies))))


async def stream(client: httpx.AsyncClient, body: dict[str, Any], answered: Answered | None = None) -> Answered:
    """Stream one completion.

    Args:
        client: of the server.
        body: the request.
        answered: is filled as pieces come; None makes one.

    Returns:
        The answer.

    Raises:
        BenchmarkError: the server refuses it or fails.
    """
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    answered = answered or Answered()
    answered.sent_s = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json={**body, **options}) as response:
        if response.status_code != 200:
            raise BenchmarkError(f"the server answered {response.status_code}: {await response.aread()!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise BenchmarkError(f"the server failed: {chunk['error']['message']}")
            if chunk["usage"]["completion_tokens"] > answered.num_tokens:
                answered.times_s.append(time.perf_counter())
            answered.num_tokens = chunk["usage"]["completion_tokens"]
            for choice in chunk["choices"]:
                answered.text += choice["text"]
                answered.finish_reason = choice["finish_reason"] or answered.finish_reason
    return answered


@contextmanager
def serving(model: str, *, options: Sequence[str]) -> Iterator[BenchServer]:
    """Start a server, wait until it is ready, and stop it at the end.

    Args:
        model: what `dseek serve` is given.
        options: further arguments of `dseek serve`.

    Yields:
        The server.

    Raises:
        BenchmarkError: it does not start, or did not end in order.
    """
    log_path = work_dir() / "logs" / "serve.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dseek.cli.main", "serve", model, "--port", "0"]
    command += ["--max-concurrent", "100000", "--no-log-requests", *options]
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"is served at (\S+)", process.stdout.readline())
        if found is None:
            last = "\n".join(log_path.read_text().splitlines()[-5:])
            raise BenchmarkError(f"`dseek serve` did not start; {log_path} ends with:\n{last}")
        _wait_until_ready(found[1])
        yield BenchServer(found[1], process.pid)
        process.terminate()
        if process.wait(60) != 0:
            raise BenchmarkError(f"`dseek serve` ended with status {process.returncode}; its log is {log_path}")
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _wait_until_ready(url: str) -> None:
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        if httpx.get(f"{url}/ready", timeout=10).status_code == 200:
            return
        time.sleep(0.05)
    raise BenchmarkError(f"{url} is not ready after two minutes")
