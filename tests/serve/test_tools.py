"""Tool calls: read from answers in pieces of any size, and told to models whose template knows no tools."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dseek.serve.schemas import Tool
from dseek.serve.tools import Call, ToolReader, call_schema, read_call, with_instructions
from tests.serve.serving import events, saying, served

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def read(text: str, size: int, *, forced: bool = False) -> tuple[str, list[Call]]:
    reader = ToolReader(forced=forced)
    shown, calls = "", []
    for start in range(0, len(text), size):
        piece, found = reader.push(text[start : start + size])
        shown, calls = shown + piece, calls + found
    piece, found = reader.finish()
    assert reader.num_calls == len(calls + found)
    return shown + piece, calls + found


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("text", "shown", "names"),
    [
        ("just text", "just text", []),
        ("a < b and <tool", "a < b and <tool", []),
        (CALL, "", ["weather"]),
        (f"Let me look.\n{CALL}", "Let me look.", ["weather"]),
        (f"{CALL}\n{CALL}", "", ["weather", "weather"]),
        ("<tool_call>no json</tool_call> rest", "<tool_call>no json</tool_call> rest", []),
        (CALL.removesuffix("</tool_call>"), "", ["weather"]),
        ("<tool_call>cut", "<tool_call>cut", []),
    ],
)
def test_calls_are_read_in_pieces_of_any_size(text: str, shown: str, names: list[str], size: int) -> None:
    found, calls = read(text, size)
    assert found == shown
    assert [call.name for call in calls] == names
    assert all(json.loads(call.arguments) == {"city": "Oslo"} for call in calls)


def test_a_forced_answer_is_one_call() -> None:
    assert read('{"name": "f", "arguments": {}}', 3, forced=True) == ("", [Call("f", "{}")])
    assert read('{"name": "f", "argu', 3, forced=True) == ('{"name": "f", "argu', [])


@pytest.mark.parametrize("text", ["[]", '"x"', "{}", '{"name": 3}', "[" * 100_000, "nan", ""])
def test_what_is_no_call_is_none(text: str) -> None:
    assert read_call(text) is None


def test_the_schema_of_a_call_allows_the_tools_only() -> None:
    tools = [Tool(**WEATHER), Tool(function={"name": "other"})]  # type: ignore[arg-type]
    schema = call_schema(tools)
    assert [variant["properties"]["name"]["const"] for variant in schema["anyOf"]] == ["weather", "other"]


def test_a_template_without_tools_is_told_in_the_system_message() -> None:
    tools = [Tool(**WEATHER)]
    messages = [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]},
        {"role": "tool", "content": "wet"},
    ]
    told = with_instructions(messages, tools)
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert "Tells the weather" in told[0]["content"] and "<tool_call>" in told[2]["content"]
    assert told[3]["content"] == "<tool_response>\nwet\n</tool_response>"
    merged = with_instructions([{"role": "system", "content": "be brief"}, *messages], tools)
    assert len(merged) == 4 and merged[0]["content"].startswith("be brief\n\n")


def test_calls_reach_the_client_streamed_or_not() -> None:
    with served() as probe:
        tokens = probe.chat("rain?", tools=[WEATHER], max_tokens=1).json()["usage"]["prompt_tokens"]
    with served(saying(f"Looking.\n{CALL}", prompt_tokens=tokens)) as server:
        fields: dict[str, Any] = {"tools": [WEATHER], "max_tokens": 200, "temperature": 0}
        choice = server.chat("rain?", **fields).json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Looking."
        (call,) = choice["message"]["tool_calls"]
        assert call["type"] == "function" and call["id"].startswith("call_")
        assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}

        chunks = events(server.chat("rain?", stream=True, **fields))
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(delta.get("content", "") for delta in deltas) == "Looking."
        (streamed,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
        assert streamed[0]["index"] == 0 and streamed[0]["function"] == call["function"]
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_tools_that_may_not_be_called_are_not_told() -> None:
    with served() as server:
        plain = server.chat("rain?", max_tokens=1).json()["usage"]["prompt_tokens"]
        silent = server.chat("rain?", max_tokens=1, tools=[WEATHER], tool_choice="none").json()
        assert silent["usage"]["prompt_tokens"] == plain
        named = {"type": "function", "function": {"name": "absent"}}
        assert server.chat(tools=[WEATHER], tool_choice=named).status_code == 400
