"""Servers for tests: an application over the arithmetic model of the engine's tests, called without a network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx

from dseek.engine.llm import LLM
from dseek.serve.app import create_app
from dseek.serve.config import ServeConfig
from dseek.serve.doorman import Doorman
from dseek.serve.service import Service
from tests.engine.fakes import FakeRunner, make_llm

BASE_URL = "http://127.0.0.1"


@dataclass
class Served:
    """A service with its application."""

    service: Service
    app: Doorman

    @property
    def llm(self) -> LLM:
        return self.service.llm

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send one request and read the whole response."""

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url=BASE_URL) as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.request("POST", path, json=body, **options)

    def chat(self, text: str = "hello", **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", {"messages": messages, "max_tokens": 8, **fields})

    def complete(self, prompt: Any = "abc", **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, "max_tokens": 8, **fields})


@contextmanager
def served(runner: FakeRunner | None = None, llm: LLM | None = None, **settings: Any) -> Iterator[Served]:
    """Serve a model, the arithmetic one unless another is given; `settings` are fields of `ServeConfig`."""
    llm = llm or make_llm(runner or FakeRunner(num_pages=256))
    if isinstance(llm.plan, SimpleNamespace):
        llm.plan.__dict__.update(_shown_plan(llm))
    service = Service(llm, ServeConfig(model_names=("fake", "alias"), **settings))
    try:
        yield Served(service, create_app(service))
    finally:
        service.engine.close()
        llm.close()


def _shown_plan(llm: LLM) -> dict[str, Any]:
    """What the page shows of a plan, beyond what the engine's tests need."""
    return {
        "predicted": SimpleNamespace(
            cache_bytes=10**6, weights_bytes=10**7, peak_bytes=10**8, decode_tokens_s=100.0, prefill_tokens_s=1000.0
        ),
        "num_pages": llm.engine.allocator.num_pages,
        "choices": (SimpleNamespace(name="precision", chosen="fp32", why="It is exact."),),
        "shape": SimpleNamespace(num_layers=1),
    }


def saying(text: str, prompt_tokens: int) -> FakeRunner:
    """A model that says a text after a prompt of so many tokens."""
    runner = FakeRunner(num_pages=1024)
    runner.script = text.encode()
    runner.prompt_tokens = prompt_tokens
    return runner


def chat_tokens(text: str) -> int:
    """Tokens of a conversation of one message of the user's, with the arithmetic model's template."""
    return len(f"<user>{text}<assistant>".encode())


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Read the chunks of a streamed response, which has to end as it should."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]
