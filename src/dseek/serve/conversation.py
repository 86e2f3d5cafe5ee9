"""From the messages of a chat request to the prompt's tokens, by the model's own template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dseek.serve.errors import ApiError
from dseek.serve.schemas import Message, Tool
from dseek.serve.service import Service
from dseek.serve.tools import plain_tools, with_instructions

RESERVED = frozenset({"self", "messages", "add_generation_prompt", "tools", "documents"})
"""Names that a request may not set in the template."""


async def conversation_token_ids(
    service: Service,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Write a conversation as the model expects it.

    Args:
        service: the model.
        messages: the conversation.
        tools: functions that may be called.
        add_generation_prompt: end where the assistant's answer begins.
        continue_final_message: end inside the last message instead, so that the answer goes on with it.
        template_kwargs: further names for the template.

    Returns:
        Token ids.

    Raises:
        ApiError: the model has no template, or a message has parts that are not text.
        RequestError: the template refuses the messages.
    """
    tokenizer = service.llm.tokenizer
    template = service.llm.files.chat_template
    if template is None:
        raise ApiError(
            400,
            f"{service.model_name} has no chat template; use /v1/completions, or a model made for chat",
            code="no_chat_template",
        )
    variables = _checked_variables(template_kwargs or {})
    plain = [_plain(message) for message in messages]
    if tools and "tools" in template:
        variables["tools"] = plain_tools(tools)
    elif tools:
        plain = with_instructions(plain, tools)
    if continue_final_message:
        add_generation_prompt = False
    text = tokenizer.apply_chat_template(plain, add_generation_prompt=add_generation_prompt, **variables)
    if continue_final_message:
        text = _cut_after_last(text, str(plain[-1]["content"]))
    return await service.encode(text, add_special_tokens=False)


def _plain(message: Message) -> dict[str, Any]:
    """Make a plain object of a message: content as one text, arguments of calls as objects."""
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                raise ApiError(400, f"a message has a part of type {part.type[:50]!r}; needed: text", param="messages")
        content = "".join(part.text or "" for part in content)
    made: dict[str, Any] = {"role": message.role, "content": content or ""}
    if message.name is not None:
        made["name"] = message.name
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id or "",
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return made


def _arguments(arguments: str | dict[str, Any]) -> Any:
    """Read arguments that are JSON in a text; leave others as they are."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments


def _checked_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    for name in variables:
        if name in RESERVED or not name.isidentifier() or name.startswith("_"):
            raise ApiError(400, f"chat_template_kwargs may not set {name[:50]!r}", param="chat_template_kwargs")
    return dict(variables)


def _cut_after_last(text: str, content: str) -> str:
    """Drop what the template wrote after the last message's content."""
    end = text.rfind(content.strip())
    if not content.strip() or end < 0:
        raise ApiError(
            400, "the last message cannot be continued: the template does not show it", param="continue_final_message"
        )
    return text[: end + len(content.strip())]
