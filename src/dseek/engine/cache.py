"""`PageAllocator`: which pages of the key/value cache are free, and how often each of the others is used.

Pure bookkeeping: the memory itself belongs to the runner. Counts, rather than a flag, let several sequences share the
pages of a common prefix. A page that is kept for its contents stays where it is when its last use ends, and is handed
out again only when no other is free, the one first that has been of no use for longest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable


class PageAllocator:
    """Hands out pages and takes them back.

    Args:
        num_pages: pages in the runner's cache.
        page_tokens: positions a page holds.
    """

    __slots__ = ("_free", "_idle", "_kept", "_uses", "num_pages", "on_evict", "page_tokens")

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        assert num_pages > 0 and page_tokens > 0
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.on_evict: Callable[[int], None] | None = None
        """Called with a kept page whose memory is needed; has to drop it."""
        self._free = list(range(num_pages - 1, -1, -1))
        self._uses = [0] * num_pages
        self._kept: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Kept pages that nobody uses, the longest unused first."""

    @property
    def num_free(self) -> int:
        """Pages nobody uses, those included that are kept for their contents."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Pages that are kept for their contents, used or not."""
        return len(self._kept)

    def pages_for(self, num_tokens: int) -> int:
        """Count the pages that so many positions need.

        Args:
            num_tokens: positions.

        Returns:
            Pages, rounded up.
        """
        return -(-num_tokens // self.page_tokens)

    def num_idle(self, pages: Iterable[int]) -> int:
        """Count those pages that are kept and that nobody uses.

        Args:
            pages: their indices.
        """
        return sum(page in self._idle for page in pages)

    def allocate(self, num_pages: int) -> list[int] | None:
        """Take pages that nobody uses, each with one use from now on.

        Args:
            num_pages: how many.

        Returns:
            Page indices, or None (and nothing taken) if there are not enough.
        """
        if num_pages > self.num_free:
            return None
        pages = []
        for _ in range(num_pages):
            if not self._free:
                assert self.on_evict is not None
                self.on_evict(next(iter(self._idle)))
            page = self._free.pop()
            self._uses[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add a use to pages that are in use or kept.

        Args:
            pages: their indices.
        """
        for page in pages:
            assert self._uses[page] > 0 or page in self._idle, f"page {page} is free and cannot be shared"
            self._idle.pop(page, None)
            self._uses[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Take one use from each page; a page without uses may be handed out again, kept ones in this order.

        Args:
            pages: their indices.
        """
        for page in pages:
            assert self._uses[page] > 0, f"page {page} was released twice"
            self._uses[page] -= 1
            if self._uses[page] == 0:
                if page in self._kept:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def keep(self, page: int) -> None:
        """Keep a page that is in use for its contents, beyond its last use.

        Args:
            page: its index.
        """
        assert self._uses[page] > 0, f"page {page} is free and cannot be kept"
        self._kept.add(page)

    def drop(self, page: int) -> None:
        """Keep a page's contents no longer.

        Args:
            page: one that was kept.
        """
        self._kept.remove(page)
        if page in self._idle:
            del self._idle[page]
            self._free.append(page)
