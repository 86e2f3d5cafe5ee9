"""`Engine`: the loop that turns requests into answers, one step at a time.

A step schedules rows, runs them, and samples a token for each request whose rows are all computed. One thread at a
time may use an engine. Nothing here knows how the model is computed: that is the runner's business.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from dseek.core import events
from dseek.core.errors import ConfigError, DseekError, NotFiniteError, RequestError
from dseek.engine.answering import extend
from dseek.engine.batch import gather
from dseek.engine.cache import PageAllocator
from dseek.engine.counters import Counters
from dseek.engine.finite import first_bad_row, not_finite_error
from dseek.engine.lookup import Speculator
from dseek.engine.prefix_cache import PrefixCache
from dseek.engine.request import Request, SamplingParams
from dseek.engine.runner import Runner
from dseek.engine.scheduler import Scheduler
from dseek.engine.step_clock import StepClock
from dseek.engine.whole_text import Pooling, embedding, pieces

if TYPE_CHECKING:
    from dseek.engine.token_filter import TokenFilter
    from dseek.models.files import ModelFiles
    from dseek.models.tokenizer import Tokenizer
    from dseek.plan.plan import Plan

MAX_DRAFT_TOKENS = 64
"""Longest draft of an answer: all its logits are computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """What a user decides about the loop; none of it changes an answer."""

    prefix_cache: bool = True
    """Keep computed pages for later prompts that begin alike."""
    speculate: int = 0
    """Guess so many tokens of an answer at a time, by prompt lookup; 0 guesses none."""

    def __post_init__(self) -> None:
        if not 0 <= self.speculate <= MAX_DRAFT_TOKENS:
            raise ConfigError(f"speculate is {self.speculate}", needed=f"0 to {MAX_DRAFT_TOKENS} tokens")


class Engine:
    """Runs requests by continuous batching.

    Args:
        files: the opened model, for its shape and tokenizer.
        plan: sizes: context, batch, chunk, pages.
        runner: computes batches; closed with the engine.
        options: what else the user decides; None is the defaults.
    """

    def __init__(self, files: ModelFiles, plan: Plan, runner: Runner, options: EngineOptions | None = None) -> None:
        self.files = files
        self.plan = plan
        self.runner = runner
        self.options = options = options or EngineOptions()
        self.counters = Counters()
        self.allocator = PageAllocator(runner.num_pages, plan.page_tokens)
        self.clock = StepClock.predicted(plan)
        self.spares_answers = False
        """Cut prompts so that running answers wait no longer than `StepClock` says: where somebody reads along."""
        self.now = time.perf_counter
        """Tells the time in seconds."""
        self.prefixes = PrefixCache(self.allocator) if options.prefix_cache else None
        self.scheduler = Scheduler(
            self.allocator,
            max_batch=plan.max_batch,
            chunk_tokens=plan.prefill_chunk_tokens,
            prefixes=self.prefixes,
            counters=self.counters,
            speculator=self._speculator(),
        )
        self.context_tokens = min(plan.context_tokens, runner.num_pages * plan.page_tokens)
        self.isolates_failures = False
        """Whether a request whose logits are not finite only ends with its error (`Request.error`). Otherwise `step`
        raises the error too, which then says where those numbers began; finding out takes as long as a load."""
        self._request_ids = itertools.count()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, read on first use."""
        return self.files.tokenizer()

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end an answer, from the shape and the tokenizer's files."""
        return frozenset(self.files.shape.eos_token_ids) | frozenset(self.tokenizer.eos_token_ids)

    @property
    def has_work(self) -> bool:
        """Some request has not finished."""
        return self.scheduler.has_work

    def add(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        token_filter: TokenFilter | None = None,
    ) -> Request:
        """Queue a prompt.

        Args:
            prompt_token_ids: at least one id; must leave room in the context for one more.
            params: how to sample and when to end.
            priority: smaller numbers are computed first.
            token_filter: keeps the answer to a grammar; for this request alone.

        Returns:
            The request; `step` fills it.

        Raises:
            RequestError: an id is out of range, or the prompt is empty or too long.
        """
        request = self.make_request(prompt_token_ids, params, priority=priority, token_filter=token_filter)
        self.enqueue(request)
        return request

    def make_request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        token_filter: TokenFilter | None = None,
    ) -> Request:
        """Check a prompt and make a request of it, for `enqueue`; any thread may.

        Args:
            prompt_token_ids: at least one id; must leave room in the context for one more.
            params: how to sample and when to end.
            priority: smaller numbers are computed first.
            token_filter: keeps the answer to a grammar; for this request alone.

        Returns:
            The request; nothing of the engine has changed.

        Raises:
            RequestError: an id is out of range, or the prompt is empty or too long.
        """
        token_ids = self.check_token_ids(prompt_token_ids)
        if len(token_ids) >= self.context_tokens:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens",
                needed=f"fewer than the context's {self.context_tokens}",
                remedy="shorten it or raise the context",
            )
        if params.seed is None and params.temperature > 0:
            params = dataclasses.replace(params, seed=self.runner.fresh_seed())
        return Request(
            next(self._request_ids),
            token_ids,
            params,
            eos_token_ids=frozenset() if params.ignore_eos else self.eos_token_ids,
            max_tokens=self.context_tokens,
            stream=self.tokenizer.stream() if params.detokenize else None,
            priority=priority,
            token_filter=token_filter,
        )

    def enqueue(self, request: Request) -> None:
        """Queue a request.

        Args:
            request: from `make_request`.
        """
        self.scheduler.add(request)

    def step(self) -> list[Request]:
        """Compute one batch and give every request that is due a token; emits the event `engine.step`.

        Returns:
            The requests that got one, finished or not, and those that failed; empty while only parts of prompts were
            computed.

        Raises:
            NotFiniteError: the logits of a request are NaN or infinite. It has ended, all others are as after any step.
        """
        scheduled = self.scheduler.schedule(self._prompt_rows())
        if not scheduled:
            return []
        batch = gather(scheduled)
        start_s = self.now()
        logits = self.runner.forward(batch)
        num_answers, other_rows, pairs = self.counters.count(scheduled)
        self.clock.note(self.now() - start_s, num_answers=num_answers, other_rows=other_rows, pairs=pairs)
        events.emit("engine.step", num_rows=batch.num_rows, num_sequences=batch.num_sequences)
        return self._postprocess(scheduled, logits)

    def abort(self, request: Request) -> None:
        """Stop a request, waiting or running, and free its pages. Harmless on a finished one.

        Args:
            request: one that `add` returned.
        """
        request.finish("abort")
        self.scheduler.remove(request)

    def fail(self, request: Request, error: DseekError) -> None:
        """End a request with an error and free its pages. Harmless on a finished one.

        Args:
            request: one that `add` or `make_request` returned.
            error: why.
        """
        request.fail(error)
        self.scheduler.remove(request)

    def logits(self, token_ids: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Compute the logits of every position of one text, piece by piece, beside whatever else runs.

        Args:
            token_ids: at least one id, at most the context.

        Yields:
            Index of the first position and float32 [n, V]; the array is valid until the next piece.

        Raises:
            RequestError: an id is out of range, the text is empty or too long, or other texts hold its pages.
            NotFiniteError: logits are NaN or infinite.
        """
        yield from pieces(self, token_ids, self.runner.forward)

    def embed(self, token_ids: Sequence[int], *, pooling: Pooling = "mean", normalise: bool = True) -> np.ndarray:
        """Embed a text.

        Args:
            token_ids: at least one id, at most the context.
            pooling: mean of all positions' last hidden states (after the final norm), or that of the last position.
            normalise: divide by the length.

        Returns:
            float32 [D].

        Raises:
            RequestError: an id is out of range, the text is empty or too long, or other texts hold its pages.
            ConfigError: the runner gives no hidden states.
            NotFiniteError: numbers are NaN or infinite.
        """
        steps = embedding(self, token_ids, pooling, normalise)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                vector: np.ndarray = end.value
                return vector

    @property
    def free_rows(self) -> int:
        """Rows that a batch may have without keeping running answers waiting for long."""
        most = self.scheduler.max_rows
        rows = self._prompt_rows() if self.scheduler.running else None
        return most if rows is None else rows

    @property
    def traced_model(self) -> tuple[ModelFiles, Plan] | None:
        """What is searched for where numbers stopped being finite; None where that would keep others waiting."""
        return None if self.isolates_failures else (self.files, self.plan)

    def check_token_ids(self, token_ids: Sequence[int]) -> list[int]:
        """Check ids from outside.

        Args:
            token_ids: whole numbers (numpy's too).

        Returns:
            The same as a list of int.

        Raises:
            RequestError: there are none, or one is no whole number or outside the vocabulary.
        """
        vocab_size = self.files.shape.vocab_size
        try:
            ids = list(map(operator.index, token_ids))
        except TypeError as error:
            raise RequestError(f"token ids of the wrong kind ({error})", needed="whole numbers") from error
        if not ids:
            raise RequestError("the prompt has no tokens", needed="at least one")
        if min(ids) < 0 or max(ids) >= vocab_size:
            bad = next(i for i in ids if not 0 <= i < vocab_size)
            raise RequestError(f"token id {bad} is out of range", needed=f"0 to {vocab_size - 1}")
        return ids

    def close(self) -> None:
        """Drop all requests and free the runner. May be called twice."""
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self.abort(request)
        self.runner.close()

    def _speculator(self) -> Speculator | None:
        """Make what guesses tokens, where that is asked for."""
        if self.options.speculate == 0:
            return None
        return Speculator(self.options.speculate, None if self.runner.is_shared else self.clock)

    def _prompt_rows(self) -> int | None:
        """Rows that prompts may have in a step that answers wait for; None: all, as where ranks must decide alike."""
        if not self.spares_answers or self.runner.is_shared:
            return None
        return self.clock.prompt_rows(self.scheduler.max_rows, self.scheduler.prompt_position())

    def _not_finite(self, request: Request) -> NotFiniteError:
        """Make the error of a request whose last token's logits are not finite."""
        return not_finite_error(request.token_ids, self.traced_model)

    def _postprocess(self, scheduled: list[Request], logits: np.ndarray) -> list[Request]:
        """Advance every request by its rows, choose tokens for those that are complete and retire the finished."""
        due: list[Request] = []
        row, now_s = 0, self.now()
        not_finite = None if first_bad_row(logits) is None else self._not_finite
        for request in scheduled:
            request.num_computed += request.num_scheduled
            if request.num_computed == len(request.token_ids):
                num_tokens, num_rows = len(request.token_ids), 1 + len(request.drafts)
                num_right = extend(request, logits[row : row + num_rows], now_s, not_finite)
                request.num_computed += num_right
                self._count(request, len(request.token_ids) - num_tokens, num_right)
                row += num_rows
                due.append(request)
            self.scheduler.advance(request)
            if request.finished:
                if isinstance(request.error, NotFiniteError) and self.prefixes is not None:
                    self.prefixes.forget(request.pages)
                self.scheduler.remove(request)
        if not self.isolates_failures:
            _raise_failure(due)
        return due

    def _count(self, request: Request, num_tokens: int, num_right: int) -> None:
        """Count what a request got, and let speculation learn from it."""
        self.counters.generated_tokens += num_tokens
        self.counters.accepted_tokens += num_right
        if self.scheduler.speculator is not None:
            self.scheduler.speculator.learn(request, num_right)


def _raise_failure(requests: list[Request]) -> None:
    """Raise the error of the first request that has one."""
    for request in requests:
        if request.error is not None:
            raise request.error
