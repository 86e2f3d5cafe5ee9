"""`POST /v1/completions`: prompts go on as plain text; with `echo` and `logprobs`, prompts are scored too."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from dseek.engine.request import SamplingParams
from dseek.serve.answers import Answer, Answers
from dseek.serve.errors import ApiError, JsonResponse
from dseek.serve.schemas import CompletionRequest
from dseek.serve.scoring import prompt_logprobs
from dseek.serve.service import Service
from dseek.serve.sse import EventStream
from dseek.serve.token_texts import TokenTexts

if TYPE_CHECKING:
    from dseek.engine.logprobs import TokenLogprobs


def router(service: Service) -> APIRouter:
    """Make the route.

    Args:
        service: the model.

    Returns:
        The router.
    """
    routes = APIRouter(tags=["completions"])
    texts = TokenTexts(service.llm.tokenizer)

    @routes.post("/v1/completions", summary="Go on from a prompt")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        job = await _CompletionJob.make(service, texts, body, request.state.arrival_s)
        if body.stream:
            return await EventStream(job.chunks()).begin()
        return JsonResponse(await job.whole())

    return routes


class _CompletionJob:
    """One request's answers, and how they are worded."""

    def __init__(self, service: Service, texts: TokenTexts, body: CompletionRequest) -> None:
        self._service = service
        self._texts = texts
        self._body = body
        self._answers: Answers | None = None
        self._prompts: list[list[int]] = []
        self._scores: list[list[TokenLogprobs | int]] = []
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or service.model_name,
        }

    @staticmethod
    async def make(service: Service, texts: TokenTexts, body: CompletionRequest, arrival_s: float) -> _CompletionJob:
        """Check a request, score its prompts if they are echoed, and submit its answers."""
        service.check_model(body.model)
        make_filter = await service.grammar(body)
        job = _CompletionJob(service, texts, body)
        job._prompts = await service.prompts(body.prompt, add_special_tokens=body.add_special_tokens)
        count = len(job._prompts) * (body.n or 1)
        if count > service.config.max_choices:
            raise ApiError(
                400, f"{count} answers are asked for; needed: at most {service.config.max_choices}", param="n"
            )
        if body.max_tokens == 0 and not body.echo:
            raise ApiError(400, "max_tokens is 0; needed: at least 1, or echo", param="max_tokens")

        def params(choice: int) -> SamplingParams:
            return service.sampling_params(
                body, max_tokens=body.max_tokens or None, num_logprobs=body.logprobs, choice=choice
            )

        params(0)  # before anything is computed
        if body.echo and body.logprobs is not None:
            job._scores = [await prompt_logprobs(service, prompt, body.logprobs) for prompt in job._prompts]
        if body.max_tokens != 0:
            job._answers = Answers(
                service,
                job._prompts,
                params,
                n=body.n or 1,
                priority=body.priority,
                arrival_s=arrival_s,
                make_filter=make_filter,
            )
        return job

    async def whole(self) -> dict[str, Any]:
        """The response of a request that is not streamed."""
        if self._answers is None:
            choices = [
                self._choice(Answer(index, prompt, finish_reason="length"))
                for index, prompt in enumerate(self._all_prompts())
            ]
        else:
            choices = [self._choice(answer) for answer in await self._answers.finish()]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any]]:
        """The chunks of a streamed response."""
        options = self._body.stream_options
        if self._answers is None:
            for index, prompt in enumerate(self._all_prompts()):
                choice = self._choice(Answer(index, prompt, finish_reason="length"))
                yield {**self._head, "choices": [choice]}
        else:
            begun: dict[int, int] = {}
            async with aclosing(self._answers.pieces()) as pieces:
                async for answer, delta in pieces:
                    first = answer.index not in begun
                    text = self._echoed(answer) + delta.text if first else delta.text
                    scores = self._echoed_scores(answer) if first else []
                    offset = begun.get(answer.index, 0)
                    begun[answer.index] = offset + len(text)
                    logprobs = None
                    if self._body.logprobs is not None and (scores or delta.logprobs):
                        entries = [*scores, *(delta.logprobs or ())]
                        logprobs = self._texts.completion(entries, offset=offset, with_top=self._body.logprobs > 0)
                    if not (text or logprobs or delta.finish_reason):
                        continue
                    choice = {
                        "index": answer.index,
                        "text": text,
                        "logprobs": logprobs,
                        "finish_reason": delta.finish_reason,
                    }
                    chunk = {**self._head, "choices": [choice]}
                    if options is not None and options.continuous_usage_stats:
                        chunk["usage"] = self._usage()
                    yield chunk
        if options is not None and options.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    def _all_prompts(self) -> list[list[int]]:
        """The prompt of every choice."""
        return [prompt for prompt in self._prompts for _ in range(self._body.n or 1)]

    def _usage(self) -> dict[str, Any]:
        if self._answers is not None:
            return self._answers.usage()
        count = sum(map(len, self._prompts))
        return {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count}

    def _echoed(self, answer: Answer) -> str:
        """The prompt's text, where it is asked for."""
        if not self._body.echo:
            return ""
        prompt = self._body.prompt
        if isinstance(prompt, str):
            return prompt
        number = answer.index // (self._body.n or 1)
        given = prompt[number] if prompt and not isinstance(prompt[0], int) else None
        if isinstance(given, str):
            return given
        return self._service.llm.tokenizer.decode(answer.prompt_token_ids, skip_special_tokens=False)

    def _echoed_scores(self, answer: Answer) -> list[TokenLogprobs | int]:
        return self._scores[answer.index // (self._body.n or 1)] if self._scores else []

    def _choice(self, answer: Answer) -> dict[str, Any]:
        """A whole answer."""
        logprobs = None
        if self._body.logprobs is not None:
            entries = [*self._echoed_scores(answer), *answer.logprobs]
            logprobs = self._texts.completion(entries, with_top=self._body.logprobs > 0)
        return {
            "index": answer.index,
            "text": self._echoed(answer) + answer.text,
            "logprobs": logprobs,
            "finish_reason": answer.finish_reason,
        }
