"""`PrefixCache`: finds the pages of a prompt's beginning that some earlier request has computed.

Full pages are named by a chained hash of their tokens, so that a name stands for everything from the sequence's start
to the page's end. The hash is keyed afresh in each process, and a hit is believed only if the page holds these tokens
and follows these very pages: nobody can make two prompts share what they should not.

A page's name hangs on the page before it, the physical one. What dynamic attention keeps beside a page (the means of
cells, what its queries have opened) was made by whoever went on from that page, and so is there for whoever finds it:
whatever a query may look at lies in pages that are followed by a page of the same chain, or is made when the next block
begins. The last page of a prompt is always computed anew, as the logits of its last token are needed.

Two requests that begin alike and run at once would both compute the same pages. `match` holds the second one back
until the first has computed what both need; this is also how the samples of one prompt share it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dseek.engine.cache import PageAllocator
from dseek.engine.request import Request

NAME_BYTES = 16
"""Bytes of a page's name."""


@dataclass(slots=True)
class _Node:
    """A page that can be found."""

    name: bytes
    page: int
    parent: _Node | None
    tokens: bytes
    """Its token ids, int32."""
    children: dict[bytes, None] = field(default_factory=dict)
    """Names of pages that go on from this one, in an order that is the same on every rank."""


class PrefixCache:
    """Names pages, finds them and forgets them when their memory is needed.

    Args:
        allocator: the cache's pages; tells this object which it takes back.
        salt: key of the hash; None draws one.
    """

    def __init__(self, allocator: PageAllocator, salt: bytes | None = None) -> None:
        self.allocator = allocator
        self._salt = os.urandom(32) if salt is None else salt
        self._nodes: dict[bytes, _Node] = {}
        self._of_page: dict[int, _Node] = {}
        self._under_way: dict[bytes, Request] = {}
        """Names of pages that a running request is about to compute."""
        allocator.on_evict = lambda page: self.forget([page])

    def match(self, request: Request) -> list[int] | None:
        """Find the pages that a request need not compute.

        Args:
            request: holds no pages.

        Returns:
            Pages of its first tokens in order, not yet shared, at most up to the page of the last token; None where a
            running request of no lower priority is computing the next one, which is worth waiting for.
        """
        page_tokens = self.allocator.page_tokens
        pages: list[int] = []
        parent: _Node | None = None
        for index in range((len(request.token_ids) - 1) // page_tokens):
            name, tokens = self._full_page(request, index)
            node = self._nodes.get(name)
            if node is None or node.parent is not parent or node.tokens != tokens:
                computing = self._under_way.get(name)
                return None if computing is not None and computing.priority <= request.priority else pages
            pages.append(node.page)
            parent = node
        return pages

    def begin(self, request: Request, num_shared: int) -> None:
        """Note that a request has its pages and will compute those that it did not find.

        Args:
            request: it.
            num_shared: how many of its pages `match` found.
        """
        request.num_named = num_shared
        request.names_pages = True
        for index in range(num_shared, len(request.token_ids) // self.allocator.page_tokens):
            self._under_way.setdefault(self._full_page(request, index)[0], request)

    def advance(self, request: Request) -> None:
        """Name the pages that a request has filled since the last call.

        Args:
            request: it, its `num_computed` being up to date.
        """
        page_tokens = self.allocator.page_tokens
        for index in range(request.num_named, request.num_computed // page_tokens):
            name, tokens = self._full_page(request, index)
            self._end(name, request)
            if request.names_pages:
                self._add(request, index, name, tokens)
            request.num_named = index + 1

    def leave(self, request: Request) -> None:
        """Note that a request gives its pages back, finished or not.

        Args:
            request: it.
        """
        for name, _ in request.full_pages[request.num_named :]:
            self._end(name, request)

    def forget(self, pages: Sequence[int]) -> None:
        """Let nobody find some pages again, nor what goes on from them: what they hold is not sound.

        Args:
            pages: their indices, named or not.
        """
        for page in pages:
            if page in self._of_page:
                self._forget_node(self._of_page[page])

    def _add(self, request: Request, index: int, name: bytes, tokens: bytes) -> None:
        """Name a page, unless the same was computed elsewhere; then what follows hangs on no named page of this one."""
        parent = self._of_page.get(request.pages[index - 1]) if index else None
        if name in self._nodes or (index and parent is None):
            request.names_pages = False
            return
        page = request.pages[index]
        node = _Node(name, page, parent, tokens)
        if parent is not None:
            parent.children[name] = None
        self._nodes[name] = self._of_page[page] = node
        self.allocator.keep(page)

    def _full_page(self, request: Request, index: int) -> tuple[bytes, bytes]:
        """Name and tokens of a page; the name hashes all tokens from the start to the page's end."""
        pages, size = request.full_pages, self.allocator.page_tokens
        while len(pages) <= index:
            before = pages[-1][0] if pages else b""
            ids = request.token_ids[len(pages) * size : (len(pages) + 1) * size]
            tokens = np.array(ids, dtype=np.int32).tobytes()
            name = hashlib.blake2b(before + tokens, digest_size=NAME_BYTES, key=self._salt).digest()
            pages.append((name, tokens))
        return pages[index]

    def _end(self, name: bytes, request: Request) -> None:
        """Note that a request computes a page no longer."""
        if self._under_way.get(name) is request:
            del self._under_way[name]

    def _forget_node(self, node: _Node) -> None:
        """Forget a page and all that go on from it."""
        if node.parent is not None:
            del node.parent.children[node.name]
        doomed = [node]
        while doomed:
            node = doomed.pop()
            doomed += [self._nodes[name] for name in node.children]
            del self._nodes[node.name], self._of_page[node.page]
            self.allocator.drop(node.page)
