"""`Scheduler`: decides which rows the next forward pass computes.

Continuous batching: every running answer gets its next token in every step, and what is left of the step's row budget
goes to prompts, cut in chunks, so that a long prompt neither stalls the answers nor overflows the workspace. A request
is admitted only when pages for its longest possible course are free, so a running one never has to give way.

Not known here: priorities and shared prefixes.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from dseek.engine.cache import PageAllocator
from dseek.engine.request import Request


class Scheduler:
    """Holds the waiting and the running requests; first come, first served.

    Args:
        allocator: the cache's pages.
        max_batch: requests that may run at once.
        chunk_tokens: rows of one step, answers and prompts together (at least `max_batch`, else raised to it).
    """

    def __init__(self, allocator: PageAllocator, *, max_batch: int, chunk_tokens: int) -> None:
        assert max_batch > 0 and chunk_tokens > 0
        self.allocator = allocator
        self.max_batch = max_batch
        self.max_rows = max(chunk_tokens, max_batch)
        self.waiting: deque[Request] = deque()
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
        self.waiting.append(request)

    def schedule(self) -> list[Request]:
        """Choose the rows of the next step.

        Returns:
            Running requests with `num_scheduled` >= 1 rows each: answers first, then prompts in order of arrival.
            Empty only if there is no work.
        """
        self._admit()
        answering: list[Request] = []
        prefilling: list[Request] = []
        for request in self.running:
            remaining = len(request.token_ids) - request.num_computed
            request.num_scheduled = remaining
            (answering if remaining == 1 else prefilling).append(request)
        if not prefilling:
            return answering
        budget = self.max_rows - len(answering)
        for request in prefilling:
            if budget == 0:
                break
            request.num_scheduled = min(request.num_scheduled, budget)
            budget -= request.num_scheduled
            answering.append(request)
        return answering

    def remove(self, request: Request) -> None:
        """Forget a request and free its pages; does nothing for one that is not here.

        Args:
            request: finished or aborted.
        """
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        pages, request.pages = request.pages, []
        self.allocator.release(pages)

    def _admit(self) -> None:
        """Let waiting requests in while there is a place and there are pages for all they may need."""
        while self.waiting and len(self.running) < self.max_batch:
            request = self.waiting[0]
            pages = self.allocator.allocate(self.allocator.pages_for(request.max_tokens))
            if pages is None:
                return
            request.pages = pages
            request.page_table = np.array(pages, dtype=np.int32)
            self.running.append(self.waiting.popleft())
