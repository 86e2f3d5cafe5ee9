"""`PageAllocator`: which pages of the key/value cache are free, and how often each of the others is used.

Pure bookkeeping: the memory itself belongs to the runner. Counts, rather than a flag, let several sequences share the
pages of a common prefix.
"""

from __future__ import annotations

from collections.abc import Iterable


class PageAllocator:
    """Hands out pages and takes them back.

    Args:
        num_pages: pages in the runner's cache.
        page_tokens: positions a page holds.
    """

    __slots__ = ("_free", "_uses", "num_pages", "page_tokens")

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        assert num_pages > 0 and page_tokens > 0
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._free = list(range(num_pages - 1, -1, -1))
        self._uses = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages nobody uses."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages whose contents a later prompt can use."""
        return 0

    def pages_for(self, num_tokens: int) -> int:
        """Count the pages that so many positions need.

        Args:
            num_tokens: positions.

        Returns:
            Pages, rounded up.
        """
        return -(-num_tokens // self.page_tokens)

    def allocate(self, num_pages: int) -> list[int] | None:
        """Take free pages, each with one use.

        Args:
            num_pages: how many.

        Returns:
            Page indices, or None (and nothing taken) if there are not enough.
        """
        if num_pages > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self._uses[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add a use to pages that are in use already.

        Args:
            pages: their indices.
        """
        for page in pages:
            assert self._uses[page] > 0, f"page {page} is free and cannot be shared"
            self._uses[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Take one use from each page; a page without uses is free again.

        Args:
            pages: their indices.
        """
        for page in pages:
            assert self._uses[page] > 0, f"page {page} was released twice"
            self._uses[page] -= 1
            if not self._uses[page]:
                self._free.append(page)
