"""On a real model: answers bound to grammars, log-probabilities, scored prompts, embeddings, hostile requests."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.hostile import complaint, hostile_requests
from dseek.core.errors import RequestError
from dseek.engine.llm import load
from dseek.serve.grammar import Grammars
from tests.serve.process import save_model
from tests.serve.serving import BASE_URL, Served, events, served

pytestmark = pytest.mark.native

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bob"]}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model, plan = save_model(tmp_path_factory.mktemp("grammar"))
    with served(llm=load(str(model), plan=str(plan))) as found:
        yield found


def is_answer(text: str) -> bool:
    found = json.loads(text)
    return set(found) == {"name", "ok"} and found["name"] in ("ann", "bob") and isinstance(found["ok"], bool)


@pytest.mark.parametrize("temperature", [0, 2.0])
def test_answers_keep_to_a_schema(server: Served, temperature: float) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    found = server.chat("who?", response_format=wanted, max_tokens=220, temperature=temperature, n=3, seed=1).json()
    for choice in found["choices"]:
        assert choice["finish_reason"] == "stop"
        assert is_answer(choice["message"]["content"])
    chunks = events(server.chat("who?", guided_json=SCHEMA, max_tokens=220, temperature=temperature, stream=True))
    assert is_answer("".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks))


def test_answers_keep_to_expressions_choices_and_grammars(server: Served) -> None:
    def said(**fields: Any) -> str:
        return str(server.complete("x", max_tokens=60, temperature=1.5, seed=2, **fields).json()["choices"][0]["text"])

    assert re.fullmatch("[a-c]{3}-[0-9]{2}", said(guided_regex="[a-c]{3}-[0-9]{2}"))
    assert said(guided_choice=["rain or shine", 'a "quoted" one']) in ("rain or shine", 'a "quoted" one')
    assert said(guided_grammar='start: "a" b+ "."\nb: "b"').startswith("ab")
    begun = said(response_format={"type": "json_object"})
    assert begun.startswith("{")


def test_a_required_call_is_one(server: Served) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        found = server.chat("rain?", tools=[TOOL], tool_choice=choice, max_tokens=220, seed=4).json()["choices"][0]
        (call,) = found["message"]["tool_calls"]
        assert call["function"]["name"] == "weather" and is_answer(call["function"]["arguments"])
        assert found["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
    chunks = events(server.chat("rain?", tools=[TOOL], tool_choice="required", max_tokens=220, seed=4, stream=True))
    (calls,) = [
        chunk["choices"][0]["delta"]["tool_calls"]
        for chunk in chunks
        if "tool_calls" in str(chunk["choices"][0]["delta"])
    ]
    assert is_answer(calls[0]["function"]["arguments"])


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "("},
        {"guided_grammar": "start: nothing"},
        {"guided_json": {"type": "nothing"}},
        {"guided_json": {"$ref": "http://localhost/x"}},
        {"guided_json": json.loads('{"items":' * 200 + "{}" + "}" * 200)},
        {"guided_regex": "a", "guided_json": {}},
    ],
)
def test_bad_grammars_are_the_requests_error(server: Served, fields: dict[str, Any]) -> None:
    response = server.complete("x", **fields)
    assert response.status_code == 400, response.text
    assert server.complete("x", temperature=0).status_code == 200


def test_filters_refuse_what_they_do_not_allow(server: Served) -> None:
    made = Grammars(server.llm).regex("ab")
    mask = np.unpackbits(made.mask([]).view(np.uint8), bitorder="little")
    tokenizer = server.llm.tokenizer
    wrong = tokenizer.encode("b", add_special_tokens=False)[0]
    assert mask[tokenizer.encode("a", add_special_tokens=False)[0]] and not mask[wrong]
    with pytest.raises(RequestError, match="grammar"):
        made.accept(wrong)


def test_a_scored_prompt_has_the_models_own_logprobs(server: Served) -> None:
    prompt = server.llm.tokenizer.encode("the quick brown fox jumps over the lazy dog")
    fields = {"temperature": 0, "max_tokens": 1, "logprobs": 4, "echo": True}  # as lm-evaluation-harness asks
    found = server.complete(prompt, **fields).json()["choices"][0]["logprobs"]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert len(found["tokens"]) == len(prompt) + 1 == len(found["text_offset"])
    pieces = server.service.engine.call(lambda engine: [logits.copy() for _, logits in engine.logits(prompt)])
    logits = np.concatenate(pieces.result(20)).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    targets = [*prompt[1:], int(expected[-1].argmax())]
    assert found["token_logprobs"][1:] == pytest.approx(expected[np.arange(len(targets)), targets], abs=1e-3)
    for row, top in zip(expected, found["top_logprobs"][1:], strict=True):
        assert 4 <= len(top) <= 5 and max(top.values()) == pytest.approx(row.max(), abs=1e-3)
    chunks = events(server.complete(prompt, stream=True, **fields))
    streamed = [
        value for chunk in chunks if (part := chunk["choices"][0]["logprobs"]) for value in part["token_logprobs"]
    ]
    assert streamed == found["token_logprobs"]


def test_chat_logprobs_have_bytes_and_the_likeliest(server: Served) -> None:
    fields = {"temperature": 0, "max_tokens": 4, "logprobs": True, "top_logprobs": 3}
    whole = server.chat("hi", **fields).json()["choices"][0]["logprobs"]["content"]
    assert 1 <= len(whole) <= 4
    for entry in whole:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert entry["logprob"] == max(other["logprob"] for other in entry["top_logprobs"]) <= 0
    streamed = [
        entry
        for chunk in events(server.chat("hi", stream=True, **fields))
        if chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == whole


def test_embeddings_are_unit_vectors_that_depend_on_the_text(server: Served) -> None:
    found = server.post("/v1/embeddings", {"input": ["the quick fox", "a lazy dog", "the quick fox"]}).json()
    one, other, again = (np.array(entry["embedding"]) for entry in found["data"])
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-5)
    assert np.abs(one - again).max() < 1e-5 < np.abs(one - other).max()
    coded = server.post(
        "/v1/embeddings", {"input": "the quick fox", "encoding_format": "base64", "dimensions": 8}
    ).json()
    short = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), dtype="<f4")
    assert np.abs(short - one[:8] / np.linalg.norm(one[:8])).max() < 1e-5
    assert server.post("/v1/embeddings", {"input": "x", "dimensions": 10**6}).status_code == 400
    assert server.post("/v1/embeddings", {"input": []}).status_code == 400


def test_hostile_requests_harm_nothing(server: Served) -> None:
    before = server.chat("are you well?", temperature=0).json()["choices"]

    async def send_all() -> list[str]:
        wrong = []
        transport = httpx.ASGITransport(server.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=BASE_URL) as client:
            for number, hostile in enumerate(hostile_requests(300)):
                response = await client.request(
                    hostile.method, hostile.path, content=hostile.body, headers=dict(hostile.headers)
                )
                found = complaint(response.status_code, dict(response.headers), response.content)
                if found is not None:
                    wrong.append(f"{number}: {found}: {hostile.path} {hostile.body[:200]!r} {response.text[:200]}")
        return wrong

    assert not (wrong := asyncio.run(send_all())), "\n".join(wrong)
    stats = server.service.engine.stats()
    assert stats.running == stats.waiting == 0 and stats.error is None
    assert server.chat("are you well?", temperature=0).json()["choices"] == before
