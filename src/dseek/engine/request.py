"""`Request`: one prompt on its way through the engine, its sampling parameters and what comes out.

A request is a mutable record that the scheduler and the engine fill; a user reads `Request.take_text()` while it runs
and `Request.output()` when it is done. Token ids, not text, are what the engine works on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dseek.core.errors import DseekError
from dseek.engine.sampler import Sampler
from dseek.engine.sampling_params import MAX_LOGPROBS, MAX_SEED, SamplingParams
from dseek.engine.text import TextAssembler

if TYPE_CHECKING:
    from dseek.engine.logprobs import TokenLogprobs
    from dseek.engine.lookup import DraftState
    from dseek.engine.token_filter import TokenFilter

__all__ = ["MAX_LOGPROBS", "MAX_SEED", "Request", "RequestOutput", "SamplingParams", "TokenStream"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """A finished (or stopped) request."""

    request_id: int
    """Number of the request in its engine, counted from 0."""
    prompt_token_ids: tuple[int, ...]
    """The prompt as the model saw it."""
    token_ids: tuple[int, ...]
    """The answer, with the end token if the model produced one."""
    text: str
    """The answer without special tokens and without the stop text."""
    finish_reason: str
    """stop (end token or stop text), length (answer or context full), abort or error."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One for each token of the answer, where they were asked for."""
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache."""
    first_token_s: float
    """Seconds from the request's arrival to its first token; 0 if there is none."""
    decode_s: float
    """Seconds from the first token to the last."""
    num_steps: int
    """Steps that gave it tokens: fewer than tokens where several were guessed at once."""

    @property
    def prefill_tokens_s(self) -> float:
        """Computed prompt tokens a second until the first token (waiting for other requests included)."""
        num_computed = len(self.prompt_token_ids) - self.num_cached_tokens
        return num_computed / self.first_token_s if self.first_token_s > 0 else 0.0

    @property
    def decode_tokens_s(self) -> float:
        """Tokens a second after the first one; 0 for an answer of one token."""
        return (len(self.token_ids) - 1) / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def decode_steps_s(self) -> float:
        """Steps a second after the first token, each of which read the weights once; 0 for an answer of one token."""
        return (self.num_steps - 1) / self.decode_s if self.decode_s > 0 else 0.0


class TokenStream(Protocol):
    """Turns ids into text that is final (`dseek.models.tokenizer` makes them)."""

    def push(self, token_id: int) -> str:
        """Take one id.

        Args:
            token_id: the next token of the answer.

        Returns:
            The text that can no longer change, perhaps empty.
        """

    def flush(self) -> str:
        """Return what was held back, when no more ids come."""


class Request:
    """The state of one prompt in the engine.

    Args:
        request_id: number in its engine.
        prompt_token_ids: checked ids, at least one.
        params: how to sample and when to end.
        eos_token_ids: ids that end the answer.
        max_tokens: prompt and answer together may not become longer.
        stream: makes text of the answer's ids; None makes no text.
        priority: smaller numbers are computed first.
        token_filter: keeps the answer to a grammar; None lets every token pass.
    """

    __slots__ = (
        "_assembler",
        "_num_taken",
        "_stream",
        "arrival_s",
        "draft_state",
        "drafts",
        "eos_token_ids",
        "error",
        "finish_reason",
        "first_token_s",
        "full_pages",
        "last_token_s",
        "logprobs",
        "max_tokens",
        "names_pages",
        "num_cached_tokens",
        "num_computed",
        "num_named",
        "num_prompt_tokens",
        "num_scheduled",
        "num_steps",
        "page_table",
        "pages",
        "params",
        "priority",
        "request_id",
        "sampler",
        "token_filter",
        "token_ids",
    )

    def __init__(
        self,
        request_id: int,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        eos_token_ids: frozenset[int],
        max_tokens: int,
        stream: TokenStream | None,
        priority: int = 0,
        token_filter: TokenFilter | None = None,
    ) -> None:
        self.request_id = request_id
        self.token_ids: list[int] = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.params = params
        self.priority = priority
        self.sampler = Sampler(params, self.num_prompt_tokens)
        self.token_filter = token_filter
        self.eos_token_ids = frozenset() if params.ignore_eos else eos_token_ids
        self.max_tokens = min(max_tokens, self.num_prompt_tokens + params.max_new_tokens)
        self.num_computed = 0
        """Tokens whose keys and values are in the cache."""
        self.num_scheduled = 0
        """Rows of this request in the step that is running."""
        self.num_steps = 0
        """Steps that gave it tokens."""
        self.drafts: list[int] = []
        """Guesses of the tokens after the last, checked in the step that is running."""
        self.draft_state: DraftState | None = None
        """What speculation knows of this text."""
        self.pages: list[int] = []
        self.page_table = np.empty(0, dtype=np.int32)
        """int32 [at least P], the same pages as they stand in `Batch.page_tables`."""
        self.full_pages: list[tuple[bytes, bytes]] = []
        """Names and tokens of full pages, for the prefix cache to fill."""
        self.num_named = 0
        """Pages that the prefix cache has seen full."""
        self.names_pages = True
        """Whether its pages follow pages that the prefix cache can find."""
        self.num_cached_tokens = 0
        """Prompt tokens that were found in the prefix cache when the request was first let in."""
        self.finish_reason: str | None = None
        self.error: DseekError | None = None
        """Why the request failed; None unless its `finish_reason` is error."""
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        """One for each token of the answer, where they are asked for."""
        self.arrival_s = time.perf_counter()
        self.first_token_s = 0.0
        self.last_token_s = 0.0
        self._num_taken = self.num_prompt_tokens
        self._stream = stream
        self._assembler = TextAssembler(params.stop)

    @property
    def finished(self) -> bool:
        """No more tokens will come."""
        return self.finish_reason is not None

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.token_ids)

    def take_pages(self, pages: Sequence[int]) -> None:
        """Append pages of the cache to its own.

        Args:
            pages: their indices.
        """
        start = len(self.pages)
        self.pages += pages
        if len(self.pages) > len(self.page_table):
            grown = np.full(2 * len(self.pages), -1, dtype=np.int32)
            grown[:start] = self.page_table[:start]
            self.page_table = grown
        self.page_table[start : len(self.pages)] = pages

    def accept(self, token_id: int, now_s: float) -> None:
        """Append a sampled token, make its text and decide whether the answer ends here.

        Args:
            token_id: the new token.
            now_s: clock reading of `time.perf_counter`.
        """
        self.token_ids.append(token_id)
        self.last_token_s = now_s
        if not self.first_token_s:
            self.first_token_s = now_s
        if token_id in self.eos_token_ids:
            self.finish("stop")
            return
        if self._stream is not None and self._assembler.push(self._stream.push(token_id)):
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_tokens:
            self.finish("length")

    def finish(self, reason: str) -> None:
        """End the request and release the text that was held back; does nothing if it has ended already.

        Args:
            reason: stop, length or abort.
        """
        if self.finish_reason is not None:
            return
        rest = self._stream.flush() if self._stream is not None else ""
        stopped = self._assembler.push(rest)
        self._assembler.flush()
        self.finish_reason = "stop" if stopped else reason

    def fail(self, error: DseekError) -> None:
        """End the request because it cannot go on; does nothing if it has ended already.

        Args:
            error: why, for whoever waits for the answer.
        """
        if self.finish_reason is None:
            self.error = error
            self.finish("error")
            self.finish_reason = "error"

    def take_tokens(self) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...] | None]:
        """Return the tokens of the answer that are new since the last call, and their log-probabilities if any."""
        start, self._num_taken = self._num_taken, len(self.token_ids)
        token_ids = tuple(self.token_ids[start:])
        if self.logprobs is None:
            return token_ids, None
        first = start - self.num_prompt_tokens
        return token_ids, tuple(self.logprobs[first : first + len(token_ids)])

    def take_text(self) -> str:
        """Return the text that became final since the last call.

        Returns:
            A piece of the answer, perhaps empty; never part of a stop text, never half a character.
        """
        return self._assembler.take()

    def output(self) -> RequestOutput:
        """Sum the request up.

        Returns:
            The prompt, the answer so far and how long it took; `finish_reason` is abort if it has not ended.
        """
        answered = self.first_token_s > 0
        return RequestOutput(
            request_id=self.request_id,
            prompt_token_ids=tuple(self.token_ids[: self.num_prompt_tokens]),
            token_ids=tuple(self.token_ids[self.num_prompt_tokens :]),
            text=self._assembler.text,
            finish_reason=self.finish_reason or "abort",
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
            num_cached_tokens=self.num_cached_tokens,
            first_token_s=self.first_token_s - self.arrival_s if answered else 0.0,
            decode_s=self.last_token_s - self.first_token_s if answered else 0.0,
            num_steps=self.num_steps,
        )
