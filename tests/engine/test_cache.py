"""Page accounting under random use."""

from __future__ import annotations

import random

import pytest

from dseek.engine.cache import PageAllocator


def test_pages_are_never_handed_out_twice() -> None:
    generator = random.Random(0)
    allocator = PageAllocator(20, 4)
    held: list[list[int]] = []
    for _ in range(2000):
        if generator.random() < 0.5:
            wanted = generator.randint(0, 8)
            pages = allocator.allocate(wanted)
            assert (pages is None) == (wanted > 20 - sum(map(len, held)))
            if pages is not None:
                held.append(pages)
        elif held:
            allocator.release(held.pop(generator.randrange(len(held))))
        in_use = [page for pages in held for page in pages]
        assert len(set(in_use)) == len(in_use)
        assert allocator.num_free == 20 - len(in_use)


def test_a_shared_page_is_free_after_its_last_use() -> None:
    allocator = PageAllocator(2, 4)
    pages = allocator.allocate(1)
    assert pages is not None
    allocator.share(pages)
    allocator.release(pages)
    assert allocator.num_free == 1
    allocator.release(pages)
    assert allocator.num_free == 2
    with pytest.raises(AssertionError, match="twice"):
        allocator.release(pages)
    with pytest.raises(AssertionError, match="free"):
        allocator.share(pages)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (64, 1), (65, 2)])
def test_pages_for_rounds_up(tokens: int, pages: int) -> None:
    assert PageAllocator(1, 64).pages_for(tokens) == pages
