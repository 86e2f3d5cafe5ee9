"""`Answers`: the `n` answers to each prompt of one request, read together as pieces, and measured.

Every answer is a stream of the engine. One task a stream moves its pieces into one queue, in which they keep their
order within an answer; leaving the loop, or cancelling the task that reads, ends them all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dseek.engine.request import SamplingParams
from dseek.engine.stream import Delta, Stream
from dseek.serve.service import Service

if TYPE_CHECKING:
    from dseek.engine.logprobs import TokenLogprobs


@dataclass(slots=True)
class Answer:
    """One answer as far as it has come."""

    index: int
    """Number of the choice in the response."""
    prompt_token_ids: list[int]
    """Its prompt."""
    text: str = ""
    """Its text so far."""
    token_ids: list[int] = field(default_factory=list)
    """Its tokens so far."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One a token, where they were asked for."""
    finish_reason: str | None = None
    """stop or length; None while it runs."""


class Answers:
    """Answers to one request.

    Args:
        service: the model.
        prompts: token ids, one list a prompt.
        params: gives the parameters of an answer by its number among those of its prompt.
        n: answers to each prompt.
        priority: smaller goes first.
        arrival_s: when the request arrived, by `time.perf_counter`.
        make_filter: makes what binds an answer, or None.
        deadline_s: seconds that all answers have; the reader gets a TimeoutError afterwards.

    Raises:
        RequestError: a prompt cannot be served; then none is.
    """

    def __init__(
        self,
        service: Service,
        prompts: Sequence[list[int]],
        params: Callable[[int], SamplingParams],
        *,
        n: int,
        priority: int,
        arrival_s: float,
        make_filter: Callable[[], Any] | None = None,
        deadline_s: float | None = None,
    ) -> None:
        self._service = service
        self._arrival_s = arrival_s
        self._deadline_s = service.config.request_timeout_s if deadline_s is None else deadline_s
        self._prompts = prompts
        self.answers: list[Answer] = []
        self._streams: list[Stream] = []
        try:
            for prompt in prompts:
                for choice in range(n):
                    options: dict[str, Any] = {} if make_filter is None else {"token_filter": make_filter()}
                    stream = service.engine.submit(prompt, params(choice), priority=priority, **options)
                    self._streams.append(stream)
                    self.answers.append(Answer(len(self.answers), prompt))
        except BaseException:
            self._close()
            raise

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self._prompts))

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(len(answer.token_ids) for answer in self.answers)

    def usage(self) -> dict[str, Any]:
        """Count tokens as OpenAI does."""
        prompt, answer = self.num_prompt_tokens, self.num_answer_tokens
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    async def pieces(self) -> AsyncGenerator[tuple[Answer, Delta]]:
        """Read all answers.

        Yields:
            The answer, which holds the piece already, and the piece.

        Raises:
            DseekError: an answer failed.
            TimeoutError: the answers took too long.
        """
        arrived: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue()

        async def move(number: int) -> None:
            try:
                async for delta in self._streams[number]:
                    arrived.put_nowait((number, delta))
                arrived.put_nowait((number, None))
            except Exception as error:
                arrived.put_nowait((number, error))

        movers = [asyncio.create_task(move(number)) for number in range(len(self._streams))]
        last_s = [0.0] * len(movers)
        left = len(movers)
        end_s = self._arrival_s + self._deadline_s
        try:
            while left:
                async with asyncio.timeout(max(0.0, end_s - time.perf_counter())):
                    number, found = await arrived.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    left -= 1
                    continue
                answer = self.answers[number]
                self._note(answer, found, last_s)
                yield answer, found
        finally:
            for mover in movers:
                mover.cancel()
            await asyncio.gather(*movers, return_exceptions=True)
            self._close()

    async def finish(self) -> list[Answer]:
        """Read all answers to their end.

        Returns:
            The answers, in order.
        """
        async for _ in self.pieces():
            pass
        return self.answers

    def _note(self, answer: Answer, delta: Delta, last_s: list[float]) -> None:
        """Add a piece to its answer, and measure."""
        metrics, now_s = self._service.metrics, time.perf_counter()
        if delta.token_ids:
            if not answer.token_ids:
                metrics.first_token(now_s - self._arrival_s)
            else:
                metrics.between_tokens((now_s - last_s[answer.index]) / len(delta.token_ids))
            last_s[answer.index] = now_s
        answer.text += delta.text
        answer.token_ids.extend(delta.token_ids)
        answer.logprobs.extend(delta.logprobs or ())
        if delta.finish_reason is not None:
            answer.finish_reason = delta.finish_reason
            metrics.answered(
                prompt_tokens=len(answer.prompt_token_ids),
                answer_tokens=len(answer.token_ids),
                seconds=now_s - self._arrival_s,
                reason=delta.finish_reason,
            )

    def _close(self) -> None:
        for stream in self._streams:
            stream.close()
