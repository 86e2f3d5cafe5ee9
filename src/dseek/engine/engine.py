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
from dseek.core.errors import DseekError, NotFiniteError, RequestError
from dseek.engine.batch import Batch, gather
from dseek.engine.cache import PageAllocator
from dseek.engine.counters import Counters
from dseek.engine.prefix_cache import PrefixCache
from dseek.engine.request import Request, SamplingParams
from dseek.engine.runner import Runner
from dseek.engine.scheduler import Scheduler
from dseek.engine.step_clock import StepClock

if TYPE_CHECKING:
    from dseek.models.files import ModelFiles
    from dseek.models.tokenizer import Tokenizer
    from dseek.plan.plan import Plan

MAX_LOGIT_ROWS = 256
"""Rows of logits asked for at once by `Engine.logits` (256 rows of 49,152 tokens are 50 MB)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """What a user decides about the loop; none of it changes an answer."""

    prefix_cache: bool = True
    """Keep computed pages for later prompts that begin alike."""


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
        self.prefixes = PrefixCache(self.allocator) if options.prefix_cache else None
        self.scheduler = Scheduler(
            self.allocator,
            max_batch=plan.max_batch,
            chunk_tokens=plan.prefill_chunk_tokens,
            prefixes=self.prefixes,
            counters=self.counters,
        )
        self.clock = StepClock.predicted(plan)
        self.now = time.perf_counter
        """Tells the time in seconds."""
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

    def add(self, prompt_token_ids: Sequence[int], params: SamplingParams, *, priority: int = 0) -> Request:
        """Queue a prompt.

        Args:
            prompt_token_ids: at least one id; must leave room in the context for one more.
            params: how to sample and when to end.
            priority: smaller numbers are computed first.

        Returns:
            The request; `step` fills it.

        Raises:
            RequestError: an id is out of range, or the prompt is empty or too long.
        """
        request = self.make_request(prompt_token_ids, params, priority=priority)
        self.enqueue(request)
        return request

    def make_request(self, prompt_token_ids: Sequence[int], params: SamplingParams, *, priority: int = 0) -> Request:
        """Check a prompt and make a request of it, for `enqueue`; any thread may.

        Args:
            prompt_token_ids: at least one id; must leave room in the context for one more.
            params: how to sample and when to end.
            priority: smaller numbers are computed first.

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
        num_answers, prompt_rows = self.counters.count(scheduled)
        self.clock.note(self.now() - start_s, num_answers=num_answers, prompt_rows=prompt_rows)
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
            RequestError: an id is out of range, the text is empty or too long, or running requests hold its pages.
            NotFiniteError: logits are NaN or infinite.
        """
        ids = np.array(self.check_token_ids(token_ids), dtype=np.int32)
        if len(ids) > self.context_tokens:
            raise RequestError(f"the text has {len(ids)} tokens", needed=f"at most the context's {self.context_tokens}")
        pages = self.allocator.allocate(self.allocator.pages_for(len(ids)))
        if pages is None:
            raise RequestError(
                f"only {self.allocator.num_free} cache pages are free",
                needed=f"{self.allocator.pages_for(len(ids))} for the text",
                remedy="wait until running requests have finished",
            )
        page_tables = np.array([pages], dtype=np.int32)
        num_rows = min(MAX_LOGIT_ROWS, self.scheduler.max_rows)
        try:
            for start in range(0, len(ids), num_rows):
                piece = ids[start : start + num_rows]
                positions = np.arange(start, start + len(piece), dtype=np.int32)
                row_starts = np.array([0, len(piece)], dtype=np.int32)
                logit_rows = np.arange(len(piece), dtype=np.int32)
                logits = self.runner.forward(Batch(piece, positions, row_starts, page_tables, logit_rows))
                bad_row = first_bad_row(logits)
                if bad_row is not None:
                    raise self._not_finite(ids[: start + bad_row + 1].tolist())
                yield start, logits
        finally:
            self.allocator.release(pages)

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

    def _prompt_rows(self) -> int | None:
        """Rows that prompts may have in a step that answers wait for; None where ranks must decide alike."""
        return None if self.runner.is_shared else self.clock.prompt_rows(self.scheduler.max_rows)

    def _not_finite(self, token_ids: Sequence[int]) -> NotFiniteError:
        """Say where the numbers of a sequence, whose last token's logits are wrong, stopped being finite."""
        where = "`dseek generate` with this prompt finds out where that began"
        if not self.isolates_failures:
            where = _origin(self.files, self.plan, token_ids)
        return NotFiniteError(
            f"the logits after token {len(token_ids) - 1} are not finite; {where}",
            needed="finite numbers",
            remedy="check the weights, or try fp32",
        )

    def _postprocess(self, scheduled: list[Request], logits: np.ndarray) -> list[Request]:
        """Advance every request by its rows, sample for those that are complete and retire the finished."""
        for request in scheduled:
            request.num_computed += request.num_scheduled
            self.scheduler.advance(request)
        due = [request for request in scheduled if request.num_computed == len(request.token_ids)]
        if not due:
            return due
        now_s = self.now()
        is_sound = first_bad_row(logits) is None
        for request, logits_V in zip(due, logits, strict=True):
            if is_sound or np.isfinite(logits_V).all():
                request.accept(request.sampler.choose(logits_V, request.token_ids), now_s)
                self.counters.generated_tokens += 1
            else:
                request.fail(self._not_finite(request.token_ids))
                self._forget(request)
            if request.finished:
                self.scheduler.remove(request)
        if not (is_sound or self.isolates_failures):
            raise next(request.error for request in due if request.error is not None)
        return due

    def _forget(self, request: Request) -> None:
        """Let nobody find pages whose numbers are not finite."""
        if self.prefixes is not None:
            self.prefixes.forget(request.pages)


def _origin(files: ModelFiles, plan: Plan, token_ids: Sequence[int]) -> str:
    """Say where the numbers of a text stopped being finite."""
    try:
        from dseek.engine.number_trace import first_not_finite

        origin = first_not_finite(files, plan, token_ids)
    except Exception as error:  # the search must not hide what it was made for
        return f"where that began could not be found ({type(error).__name__}: {error})"
    if origin is None:
        return "the reference stays finite: a narrow cache, a choice of blocks, or a faulty kernel made them"
    return f"first, {origin}"


def first_bad_row(logits: np.ndarray) -> int | None:
    """Find logits that are not finite.

    Args:
        logits: float32 [L, V].

    Returns:
        Index of the first row that has some, or None. One sum decides, as a NaN or an infinity is never added away;
        only where the sum is not finite is every number looked at.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.add.reduce(logits, axis=None)
    if np.isfinite(total):
        return None
    bad = ~np.isfinite(logits).all(axis=1)
    return int(bad.argmax()) if bad.any() else None
