"""`POST /v1/chat/completions`."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from dseek.engine.request import SamplingParams
from dseek.engine.stream import Delta
from dseek.serve import tools
from dseek.serve.answers import Answer, Answers
from dseek.serve.conversation import conversation_token_ids
from dseek.serve.errors import ApiError, JsonResponse
from dseek.serve.schemas import ChatRequest, NamedTool
from dseek.serve.service import Service
from dseek.serve.sse import EventStream
from dseek.serve.token_texts import TokenTexts


def router(service: Service) -> APIRouter:
    """Make the route.

    Args:
        service: the model.

    Returns:
        The router.
    """
    routes = APIRouter(tags=["chat"])
    texts = TokenTexts(service.llm.tokenizer)

    @routes.post("/v1/chat/completions", summary="Answer a conversation")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        job = await _ChatJob.make(service, texts, body, request.state.arrival_s)
        if body.stream:
            return await EventStream(job.chunks()).begin()
        return JsonResponse(await job.whole())

    return routes


class _ChatJob:
    """One request's answers, and how they are worded."""

    def __init__(self, service: Service, texts: TokenTexts, body: ChatRequest, answers: Answers) -> None:
        self._texts = texts
        self._body = body
        self._answers = answers
        self._uses_tools = bool(tools.tools_of(body))
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": body.model or service.model_name,
        }

    @staticmethod
    async def make(service: Service, texts: TokenTexts, body: ChatRequest, arrival_s: float) -> _ChatJob:
        """Check a request and submit its answers."""
        service.check_model(body.model)
        count = body.n or 1
        if count > service.config.max_choices:
            raise ApiError(400, f"n is {count}; needed: at most {service.config.max_choices}", param="n")
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        offered = tools.tools_of(body)
        make_filter = await service.grammar(body)
        if offered and tools.is_forced(body):
            if make_filter is not None:
                raise ApiError(400, "a required tool call and response_format exclude each other", param="tool_choice")
            schema = tools.call_schema(offered)
            make_filter = await service.checked(lambda: service.grammars.json_schema(schema))
        prompt = await conversation_token_ids(
            service,
            body.messages,
            tools=offered,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template_kwargs=body.chat_template_kwargs,
        )
        service.check_prompt(prompt)

        def params(choice: int) -> SamplingParams:
            return service.sampling_params(
                body,
                max_tokens=body.max_completion_tokens or body.max_tokens,
                num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
                choice=choice,
            )

        answers = Answers(
            service,
            [prompt],
            params,
            n=count,
            priority=body.priority,
            arrival_s=arrival_s,
            make_filter=make_filter,
        )
        return _ChatJob(service, texts, body, answers)

    async def whole(self) -> dict[str, Any]:
        """The response of a request that is not streamed."""
        choices = [self._choice(answer) for answer in await self._answers.finish()]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._answers.usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any]]:
        """The chunks of a streamed response."""
        options = self._body.stream_options
        forced = tools.is_forced(self._body)
        readers = [tools.ToolReader(forced=forced) for _ in self._answers.answers]
        begun: set[int] = set()
        async with aclosing(self._answers.pieces()) as pieces:
            async for answer, delta in pieces:
                if answer.index not in begun:
                    begun.add(answer.index)
                    yield self._chunk(answer, {"role": "assistant", "content": ""}, None)
                for chunk in self._delta_chunks(answer, delta, readers[answer.index]):
                    if options is not None and options.continuous_usage_stats:
                        chunk["usage"] = self._answers.usage()
                    yield chunk
        if options is not None and options.include_usage:
            yield {
                **self._head,
                "object": "chat.completion.chunk",
                "choices": [],
                "usage": self._answers.usage(),
            }

    def _delta_chunks(self, answer: Answer, delta: Delta, reader: tools.ToolReader) -> list[dict[str, Any]]:
        """What a piece of an answer becomes."""
        text = delta.text
        calls: list[tools.Call] = []
        if self._uses_tools:
            text, calls = reader.push(delta.text)
            if delta.finish_reason is not None:
                rest, last = reader.finish()
                text, calls = text + rest, calls + last
        changes: dict[str, Any] = {}
        if text:
            changes["content"] = text
        if calls:
            first = reader.num_calls - len(calls)
            changes["tool_calls"] = [call.as_json(first + number) for number, call in enumerate(calls)]
        reason = delta.finish_reason
        if reason is not None:
            reason = self._reason(reason, reader.num_calls)
        if not changes and reason is None and not delta.logprobs:
            return []
        return [self._chunk(answer, changes, reason, delta)]

    def _chunk(
        self, answer: Answer, changes: dict[str, Any], reason: str | None, delta: Delta | None = None
    ) -> dict[str, Any]:
        logprobs = None
        if delta is not None and delta.logprobs:
            logprobs = self._texts.chat(delta.logprobs)
        choice = {"index": answer.index, "delta": changes, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _choice(self, answer: Answer) -> dict[str, Any]:
        """A whole answer."""
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        num_calls = 0
        if self._uses_tools:
            reader = tools.ToolReader(forced=tools.is_forced(self._body))
            text, calls = reader.push(answer.text)
            rest, last = reader.finish()
            calls = [*calls, *last]
            num_calls = len(calls)
            message["content"] = text + rest
            if calls:
                message["content"] = (text + rest).strip() or None
                message["tool_calls"] = [call.as_json() for call in calls]
        return {
            "index": answer.index,
            "message": message,
            "logprobs": self._texts.chat(answer.logprobs) if self._body.logprobs else None,
            "finish_reason": self._reason(answer.finish_reason or "abort", num_calls),
        }

    def _reason(self, reason: str, num_calls: int) -> str:
        """Why an answer ended, as OpenAI names it."""
        if num_calls and reason == "stop" and not isinstance(self._body.tool_choice, NamedTool):
            return "tool_calls"
        return reason
