"""Tool calls: how tools reach the prompt, and how calls are read from an answer.

A template that knows tools is given them; for one that does not, they are described in a system message, in the same
form. Models answer in the form of Hermes and Qwen, `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. Where a
call is required, the answer is bound to the JSON of one.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dseek.serve.errors import ApiError
from dseek.serve.schemas import ChatRequest, NamedTool, Tool

OPENING, CLOSING = "<tool_call>", "</tool_call>"

MAX_CALL_CHARS = 1 << 20
"""Longest text that is held back as a call."""

_INSTRUCTIONS = """You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class Call:
    """A call that was read."""

    name: str
    """Function."""
    arguments: str
    """Its arguments, JSON as text."""

    def as_json(self, index: int | None = None) -> dict[str, Any]:
        """Write as OpenAI does.

        Args:
            index: number of the call, in chunks of a stream; None leaves it out.

        Returns:
            The object, with a fresh id.
        """
        written: dict[str, Any] = {} if index is None else {"index": index}
        return written | {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


def tools_of(body: ChatRequest) -> list[Tool]:
    """Find the tools that a request offers.

    Args:
        body: the request.

    Returns:
        The tools; none where `tool_choice` is none.

    Raises:
        ApiError: a tool is chosen that is not offered.
    """
    tools = body.tools or []
    choice = body.tool_choice
    if choice == "none":
        return []
    if choice == "required" and not tools:
        raise ApiError(400, "tool_choice is required, and there are no tools", param="tool_choice")
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        if not named:
            raise ApiError(400, f"tool_choice names {choice.function.name!r}, no such tool", param="tool_choice")
        return named
    return tools


def is_forced(body: ChatRequest) -> bool:
    """Whether the answer has to be a call.

    Args:
        body: the request.
    """
    return body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """Describe the JSON of a call.

    Args:
        tools: what may be called, at least one.

    Returns:
        A JSON schema.
    """
    variants = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return variants[0] if len(variants) == 1 else {"anyOf": variants}


def plain_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Write tools as templates expect them.

    Args:
        tools: the tools.

    Returns:
        Plain objects.
    """
    return [tool.model_dump(exclude_none=True) for tool in tools]


def with_instructions(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Describe tools in the system message, for a template that does not know them.

    Args:
        messages: the conversation.
        tools: the tools.

    Returns:
        The conversation with a system message that has the instructions; calls and results as text.
    """
    listed = "\n".join(json.dumps(tool) for tool in plain_tools(tools))
    told = _INSTRUCTIONS.format(tools=listed)
    changed = [_as_text(message) for message in messages]
    if changed and changed[0]["role"] == "system":
        changed[0]["content"] = f"{changed[0]['content']}\n\n{told}"
        return changed
    return [{"role": "system", "content": told}, *changed]


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """Write calls and results of a message into its text."""
    content = message.get("content") or ""
    for call in message.get("tool_calls") or ():
        content += f"\n{OPENING}\n{json.dumps(call['function'])}\n{CLOSING}"
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    return {"role": message["role"], "content": content.lstrip("\n")}


def read_call(text: str) -> Call | None:
    """Read the JSON of one call.

    Args:
        text: what stands between the tags, or a whole forced answer.

    Returns:
        The call, or None where it is none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    return Call(found["name"], arguments if isinstance(arguments, str) else json.dumps(arguments))


class ToolReader:
    """Takes calls out of an answer while it comes. What is no call stays text.

    Args:
        forced: the whole answer is the JSON of one call.
    """

    def __init__(self, *, forced: bool) -> None:
        self._forced = forced
        self._held = ""
        self._inside = False
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Take a piece of the answer.

        Args:
            text: the piece.

        Returns:
            Text that is surely no call, and the calls that are complete now.
        """
        self._held += text
        if self._forced:
            return "", []
        shown = ""
        calls: list[Call] = []
        while True:
            if not self._inside:
                start = self._held.find(OPENING)
                if start < 0:
                    if self.num_calls:
                        self._held = self._held.lstrip("\n")
                    keep = _num_held(self._held)
                    shown += self._held[: len(self._held) - keep]
                    self._held = self._held[len(self._held) - keep :]
                    return shown, calls
                shown += self._held[:start].rstrip("\n")
                self._held = self._held[start + len(OPENING) :]
                self._inside = True
            end = self._held.find(CLOSING)
            if end < 0:
                if len(self._held) > MAX_CALL_CHARS:
                    shown, self._held, self._inside = shown + OPENING + self._held, "", False
                return shown, calls
            inner, self._held = self._held[:end], self._held[end + len(CLOSING) :]
            self._inside = False
            call = read_call(inner)
            if call is None:
                shown += f"{OPENING}{inner}{CLOSING}"
            else:
                calls.append(call)
                self.num_calls += 1

    def finish(self) -> tuple[str, list[Call]]:
        """End the answer.

        Returns:
            What is left, text and calls.
        """
        held, self._held = self._held, ""
        if self._forced or self._inside:
            call = read_call(held)
            if call is not None:
                self.num_calls += 1
                return "", [call]
            return (OPENING + held if self._inside else held), []
        return held, []


def _num_held(text: str) -> int:
    """Count the characters at the end that may begin a tag, with the empty lines before it, which go with a call."""
    tag = max((size for size in range(1, len(OPENING)) if text.endswith(OPENING[:size])), default=0)
    before = text[: len(text) - tag]
    return tag + len(before) - len(before.rstrip("\n"))
