"""`Scheduler`: decides which rows the next forward pass computes, and who has pages.

Continuous batching: every running answer gets its next token in every step, and what is left of the step's row budget
goes to prompts, cut in chunks, so that a long prompt neither stalls the answers nor overflows the workspace.

A request is let in when pages for the tokens it has are free, with a few to spare, and takes further pages one by one
as its answer grows. Where none is free, the request that matters least (the largest priority number, of these the
youngest) gives its pages back and waits; what it has said stays said, and it is computed again later. Its own full
pages are then the last that the prefix cache forgets, so that mostly little is computed twice.
"""

from __future__ import annotations

import bisect

from dseek.engine.cache import PageAllocator
from dseek.engine.counters import Counters
from dseek.engine.lookup import Speculator
from dseek.engine.prefix_cache import PrefixCache
from dseek.engine.request import Request


def rank(request: Request) -> tuple[int, int]:
    """Order requests: by priority, then first come, first served.

    Args:
        request: any.
    """
    return request.priority, request.request_id


class Scheduler:
    """Holds the waiting and the running requests, both ordered by `rank`.

    Args:
        allocator: the cache's pages.
        max_batch: requests that may run at once.
        chunk_tokens: rows of one step, answers and prompts together (at least `max_batch`, else raised to it).
        prefixes: finds pages that are computed already; None computes everything.
        counters: told of saved tokens and preemptions.
        speculator: guesses tokens of answers; None guesses none.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        *,
        max_batch: int,
        chunk_tokens: int,
        prefixes: PrefixCache | None = None,
        counters: Counters | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        assert max_batch > 0 and chunk_tokens > 0
        self.allocator = allocator
        self.max_batch = max_batch
        self.max_rows = max(chunk_tokens, max_batch)
        self.prefixes = prefixes
        self.counters = counters or Counters()
        self.speculator = speculator
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    @property
    def has_work(self) -> bool:
        """Some request has not finished."""
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        """Queue a request whose pages fit in an empty cache.

        Args:
            request: a new request.
        """
        assert self.allocator.pages_for(request.max_tokens) <= self.allocator.num_pages
        bisect.insort(self.waiting, request, key=rank)

    def schedule(self, prompt_rows: int | None = None) -> list[Request]:
        """Choose the rows of the next step.

        Args:
            prompt_rows: rows that prompts may have beside answers that wait for them; None: all that are left.

        Returns:
            Running requests with `num_scheduled` >= 1 rows each, answers with their drafts: answers first, then
            prompts, both by rank. Empty only if there is no work, or if somebody else holds the pages.
        """
        self._admit()
        answering: list[Request] = []
        prefilling: list[Request] = []
        for request in self.running.copy():
            request.drafts = []
            remaining = len(request.token_ids) - request.num_computed
            if remaining > 1:
                prefilling.append(request)
            elif request.pages and self._grow(request):
                request.num_scheduled = 1
                answering.append(request)
        budget = self.max_rows - len(answering)
        if answering and prompt_rows is not None:
            budget = min(budget, prompt_rows)
        if self.speculator is not None:
            budget -= self._draft(answering, budget, self.speculator)
        for request in prefilling:
            if budget == 0:
                break
            if request.pages:  # else it has just given them to an answer
                request.num_scheduled = min(len(request.token_ids) - request.num_computed, budget)
                budget -= request.num_scheduled
                answering.append(request)
        return answering

    def prompt_position(self) -> int:
        """Tell how many tokens of the prompt that comes next are computed; 0 where none is begun."""
        begun = (entry.num_computed for entry in self.running if len(entry.token_ids) - entry.num_computed > 1)
        return next(begun, 0)

    def advance(self, request: Request) -> None:
        """Note that more of a request has been computed.

        Args:
            request: a running one.
        """
        if self.prefixes is not None:
            self.prefixes.advance(request)

    def remove(self, request: Request) -> None:
        """Forget a request and free its pages; does nothing for one that is not here.

        Args:
            request: finished or aborted.
        """
        for requests in (self.running, self.waiting):
            index = bisect.bisect_left(requests, rank(request), key=rank)
            if index < len(requests) and requests[index] is request:
                del requests[index]
        self._give_back(request)

    def take(self, num_pages: int) -> list[int] | None:
        """Take pages for something that is no request, from the requests that matter least if it has to be.

        Args:
            num_pages: how many.

        Returns:
            Their indices, to be released by the caller; None if others than requests hold too many.
        """
        while self.allocator.num_free < num_pages and self.running:
            self._preempt(self.running[-1])
        return self.allocator.allocate(num_pages)

    def _admit(self) -> None:
        """Let waiting requests in by rank, while there is a place and there are pages for what they have so far."""
        index = 0
        while index < len(self.waiting):
            request = self.waiting[index]
            if len(self.running) >= self.max_batch and self.running[-1].priority <= request.priority:
                return
            shared = [] if self.prefixes is None else self.prefixes.match(request)
            if shared is None:
                index += 1
            elif self._has_room(request, shared):
                del self.waiting[index]
                self._let_in(request, shared)
            elif self.running and self.running[-1].priority > request.priority:
                self._preempt(self.running[-1])
            else:
                return

    def _has_room(self, request: Request, shared: list[int]) -> bool:
        """Tell whether a request finds a place and pages, with one more for each answer that may soon need it."""
        if len(self.running) >= self.max_batch:
            return False
        num_growing = sum(self.allocator.pages_for(other.max_tokens) > len(other.pages) for other in self.running)
        wanted = self._first_pages(request) - len(shared) + num_growing
        return wanted <= self.allocator.num_free - self.allocator.num_idle(shared)

    def _first_pages(self, request: Request) -> int:
        """Pages for the tokens of a request and the next one."""
        return self.allocator.pages_for(min(len(request.token_ids) + 1, request.max_tokens))

    def _let_in(self, request: Request, shared: list[int]) -> None:
        """Give a request its first pages and let it run."""
        self.allocator.share(shared)
        pages = self.allocator.allocate(self._first_pages(request) - len(shared))
        assert pages is not None
        request.take_pages(shared + pages)
        request.num_computed = len(shared) * self.allocator.page_tokens
        if self.prefixes is not None:
            self.prefixes.begin(request, len(shared))
        if len(request.token_ids) == request.num_prompt_tokens:
            request.num_cached_tokens = request.num_computed
        self.counters.saved_tokens += request.num_computed
        bisect.insort(self.running, request, key=rank)

    def _grow(self, request: Request) -> bool:
        """Make sure that an answer has a page for its newest token; False where it had to give way itself."""
        while self.allocator.pages_for(len(request.token_ids)) > len(request.pages):
            pages = self.allocator.allocate(1)
            if pages is not None:
                request.take_pages(pages)
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _draft(self, answering: list[Request], budget: int, speculator: Speculator) -> int:
        """Give answers their drafts, within the rows and the pages that nobody else needs; returns their rows."""
        used = 0
        for request in answering:
            num_tokens, share = len(request.token_ids), budget // len(answering)
            drafts = speculator.draft(request, share, len(answering))
            missing = self.allocator.pages_for(num_tokens + len(drafts)) - len(request.pages)
            if missing > 0 and missing + len(self.running) <= self.allocator.num_free:
                request.take_pages(self.allocator.allocate(missing) or [])
            request.drafts = drafts[: len(request.pages) * self.allocator.page_tokens - num_tokens]
            used += len(request.drafts)
        return used

    def _preempt(self, request: Request) -> None:
        """Let a running request wait again; its tokens and its random numbers stay as they are."""
        self.remove(request)
        request.num_computed = 0
        self.counters.preemptions += 1
        bisect.insort(self.waiting, request, key=rank)

    def _give_back(self, request: Request) -> None:
        """Release a request's pages, the last first: what others may begin with is kept longest."""
        if self.prefixes is not None:
            self.prefixes.leave(request)
        pages, request.pages = request.pages, []
        self.allocator.release(reversed(pages))
