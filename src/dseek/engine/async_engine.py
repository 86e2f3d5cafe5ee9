"""`AsyncEngine`: one thread that steps an engine while there is work, and streams that anybody may read.

An engine may be used by one thread at a time, and a step takes as long as the model does. So a thread of its own runs
the steps; everybody else leaves commands (add, abort, call) that are taken between two steps, and reads what comes
out of a `Stream`, from a thread or from an asyncio loop. Nothing here waits for a step while it holds a lock.

A request whose numbers are not finite ends with its error while the others go on. A runner that fails ends all of them
with one error, and the engine takes no more.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from dseek.core.errors import DseekError
from dseek.core.logs import get_logger
from dseek.engine.engine import Engine
from dseek.engine.request import Request, SamplingParams
from dseek.engine.stream import Stream
from dseek.engine.whole_text import Pooling, embedding

if TYPE_CHECKING:
    from dseek.engine.token_filter import TokenFilter

logger = get_logger("dseek.engine")

IDLE_WAIT_S = 0.005
"""How long to wait for a command while requests wait for pages that none of them holds."""

RATE_SPAN_S = 10.0
"""Tokens a second are counted over the last so many seconds."""

Result = TypeVar("Result")


class EngineStoppedError(DseekError):
    """The engine takes no more requests: it was closed, or its runner failed."""

    exit_status = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """What an engine is doing, read between or during its steps."""

    running: int
    """Requests that are being computed."""
    waiting: int
    """Requests that wait for a place or for pages."""
    num_pages: int
    """Pages of the cache."""
    free_pages: int
    """Pages that a request may have at once, those that only the prefix cache holds included."""
    cached_pages: int
    """Pages that a later prompt with the same beginning can use."""
    tokens_s: float
    """New tokens a second over the last `RATE_SPAN_S` seconds, all requests together."""
    steps: int
    """Steps so far."""
    prefill_rows: int
    """Rows so far that belonged to prompts (or were computed again after a preemption)."""
    decode_rows: int
    """Rows so far of answers, drafts included."""
    generated_tokens: int
    """Tokens sampled so far."""
    saved_tokens: int
    """Prompt tokens so far that were found in the prefix cache and not computed."""
    preemptions: int
    """How often a request gave its pages to another."""
    drafted_tokens: int
    """Tokens guessed so far by speculation."""
    accepted_tokens: int
    """Of these, those that were right."""
    error: str | None
    """What ended the engine; None while it works."""


class AsyncEngine:
    """Runs an engine in a thread of its own.

    All methods may be called from any thread, `submit`, `abort` and `stats` from an asyncio loop too: they do not wait.
    While this object is open, nobody else may use the engine.

    Args:
        engine: the engine; still its owner's to close, after this object.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        engine.isolates_failures = engine.spares_answers = True
        self._changed = threading.Condition(threading.RLock())
        self._commands: deque[Callable[[], None]] = deque()
        self._streams: dict[int, Stream] = {}
        self._texts: deque[_Text] = deque()
        """Texts to embed, one at a time: each holds pages while it is under way."""
        self._accepting = True
        self._closing = False
        self._failure: DseekError | None = None
        self._recent: deque[tuple[float, int]] = deque()
        self._thread = threading.Thread(target=self._run, name="dseek-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        token_filter: TokenFilter | None = None,
    ) -> Stream:
        """Queue a prompt.

        Args:
            prompt_token_ids: at least one id; must leave room in the context for one more.
            params: how to sample and when to end.
            priority: smaller numbers are computed first.
            token_filter: keeps the answer to a grammar; for this request alone, called in the engine's thread.

        Returns:
            What comes out; leaving its loop before the end aborts the request.

        Raises:
            RequestError: the prompt cannot be served.
            EngineStoppedError: the engine takes no more requests.
        """
        request = self.engine.make_request(prompt_token_ids, params, priority=priority, token_filter=token_filter)
        stream = Stream(request, self.abort)
        with self._changed:
            self._leave(lambda: self._add(stream))
            self._streams[request.request_id] = stream
        return stream

    def abort(self, stream: Stream) -> None:
        """End a request early and free its pages; harmless on one that has ended.

        Args:
            stream: from `submit`.
        """
        with self._changed:
            if self._thread.is_alive():
                self._commands.append(lambda: self._abort(stream))
                self._changed.notify()

    def call(self, function: Callable[[Engine], Result]) -> Future[Result]:
        """Let the engine's thread do something between two steps, such as `engine.embed`.

        Args:
            function: called with the engine; all requests wait until it returns.

        Returns:
            Its result to come (`asyncio.wrap_future` makes it awaitable); cancelling it before it runs is heeded.

        Raises:
            EngineStoppedError: the engine takes no more work.
        """
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(self.engine))
            except Exception as error:  # it is the caller's
                future.set_exception(error)

        self._leave(run)
        return future

    def embed(
        self, token_ids: Sequence[int], *, pooling: Pooling = "mean", normalise: bool = True
    ) -> Future[np.ndarray]:
        """Embed a text piece by piece, between the steps that running requests need.

        Args:
            token_ids: at least one id, at most the context.
            pooling: see `Engine.embed`.
            normalise: divide by the length.

        Returns:
            float32 [D] to come, or the error that `Engine.embed` would raise; cancelling it before it runs is heeded.

        Raises:
            EngineStoppedError: the engine takes no more work.
        """
        future: Future[np.ndarray] = Future()
        text = _Text(future, embedding(self.engine, token_ids, pooling, normalise))

        def begin() -> None:
            self._texts.append(text)

        self._leave(begin)
        return future

    def stats(self) -> EngineStats:
        """Sum up what the engine is doing."""
        engine, counters = self.engine, self.engine.counters
        with self._changed:
            self._forget_old()
            tokens = sum(count for _, count in self._recent)
            span_s = time.perf_counter() - self._recent[0][0] if self._recent else 0.0
            running = len(engine.scheduler.running)
            waiting = max(0, len(self._streams) - running)
        return EngineStats(
            running=running,
            waiting=waiting,
            num_pages=engine.allocator.num_pages,
            free_pages=engine.allocator.num_free,
            cached_pages=engine.allocator.num_cached,
            tokens_s=tokens / span_s if span_s > 0 else 0.0,
            steps=counters.steps,
            prefill_rows=counters.prefill_rows,
            decode_rows=counters.decode_rows,
            generated_tokens=counters.generated_tokens,
            saved_tokens=counters.saved_tokens,
            preemptions=counters.preemptions,
            drafted_tokens=counters.drafted_tokens,
            accepted_tokens=counters.accepted_tokens,
            error=str(self._failure) if self._failure is not None else None,
        )

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let those that are here end, abort what is left, and end the thread.

        Args:
            drain_s: seconds that requests have to end by themselves. May be called twice, the second time with less.
        """
        with self._changed:
            self._accepting = False
            self._changed.wait_for(lambda: not self._streams or not self._thread.is_alive(), timeout=drain_s)
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _leave(self, command: Callable[[], None]) -> None:
        """Leave something to do for the thread."""
        with self._changed:
            if not self._accepting:
                raise self._failure or EngineStoppedError("the engine is closed", needed="an engine that is open")
            self._commands.append(command)
            self._changed.notify()

    def _run(self) -> None:
        """Take commands and step, until closed."""
        try:
            while self._next_commands():
                if self._texts and self._texts[0].advance():
                    self._texts.popleft()
                if self.engine.has_work:
                    self._step()
        except BaseException as error:
            logger.exception("the engine's runner failed")
            self._fail(error)
        else:
            self._end_all()

    def _step(self) -> None:
        """Step once; where others than requests hold all pages, wait a little for the command that frees them."""
        num_steps = self.engine.counters.steps
        self._deliver(self.engine.step())
        if self.engine.counters.steps == num_steps:
            with self._changed:
                if not (self._commands or self._texts or self._closing):
                    self._changed.wait(IDLE_WAIT_S)

    def _next_commands(self) -> bool:
        """Do what was left to do, waiting for it while there is no work; False once the engine is to close."""
        with self._changed:
            while not (self._commands or self._texts or self.engine.has_work or self._closing):
                self._changed.wait()
            if self._closing:
                return False
        self._do_commands()
        return True

    def _add(self, stream: Stream) -> None:
        if not stream.request.finished:
            self.engine.enqueue(stream.request)

    def _abort(self, stream: Stream) -> None:
        if not stream.request.finished:
            self.engine.abort(stream.request)
        self._finish(stream)

    def _deliver(self, requests: Sequence[Request]) -> None:
        """Hand out what a step brought."""
        now_s, num_tokens = time.perf_counter(), 0
        for request in requests:
            stream = self._streams.get(request.request_id)
            if stream is None:
                continue
            num_tokens += stream.push()
            if request.finished:
                self._finish(stream)
        with self._changed:
            self._recent.append((now_s, num_tokens))
            self._forget_old()

    def _finish(self, stream: Stream) -> None:
        """Close a stream and forget it."""
        stream.push()
        with self._changed:
            self._streams.pop(stream.request.request_id, None)
            if not self._streams:
                self._changed.notify_all()

    def _forget_old(self) -> None:
        """Drop what was counted too long ago."""
        oldest_s = time.perf_counter() - RATE_SPAN_S
        while self._recent and self._recent[0][0] < oldest_s:
            self._recent.popleft()

    def _end_all(self) -> None:
        """Abort what is left at the end."""
        self._do_commands()
        self._end_texts(EngineStoppedError("the engine was closed", needed="an engine that is open"))
        for stream in list(self._streams.values()):
            self._abort(stream)

    def _fail(self, error: BaseException) -> None:
        """End everything with one error."""
        failure = EngineStoppedError(
            f"the engine failed: {type(error).__name__}: {error}",
            remedy="start it again; the log has the details",
        )
        failure.__cause__ = error
        with self._changed:
            self._failure, self._accepting = failure, False
        self._do_commands()
        self._end_texts(failure)
        for stream in list(self._streams.values()):
            self.engine.fail(stream.request, failure)
            self._finish(stream)

    def _end_texts(self, error: DseekError) -> None:
        """Let nobody wait for an embedding any more."""
        while self._texts:
            self._texts.popleft().fail(error)

    def _do_commands(self) -> None:
        """Do what was left to do."""
        with self._changed:
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:
            command()


class _Text:
    """A text that is being embedded.

    Args:
        future: for whoever waits.
        steps: from `embedding`.
    """

    def __init__(self, future: Future[np.ndarray], steps: Generator[None, None, np.ndarray]) -> None:
        self._future = future
        self._steps = steps
        self._begun = False

    def advance(self) -> bool:
        """Compute a piece; True at the end, whatever it was."""
        if not self._begun and not self._future.set_running_or_notify_cancel():
            return True
        self._begun = True
        try:
            next(self._steps)
        except StopIteration as end:
            self._future.set_result(end.value)
        except Exception as error:  # it is the caller's
            self._future.set_exception(error)
        else:
            return False
        return True

    def fail(self, error: DseekError) -> None:
        """End early and free the pages."""
        self._steps.close()
        if self._begun or self._future.set_running_or_notify_cancel():
            self._future.set_exception(error)
