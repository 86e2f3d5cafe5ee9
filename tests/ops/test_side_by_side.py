"""Pieces side by side: all of them, each on one thread, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dseek.ops.side_by_side import side_by_side


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads of PyTorch's, for one test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_piece_is_computed_and_the_threads_are_as_before(threads: int) -> None:
    done = torch.zeros(7)
    seen = []

    def piece(index: int) -> None:
        assert not torch.is_grad_enabled()
        seen.append(torch.get_num_threads())
        done[index] += index + 1

    side_by_side(7, piece)
    assert done.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert seen == [1] * 7
    assert torch.get_num_threads() == threads and torch.is_grad_enabled()


def test_few_pieces_have_all_threads(threads: int) -> None:
    seen = []
    side_by_side(1, lambda _: seen.append(torch.get_num_threads()))
    assert seen == [threads]


def test_no_pieces(threads: int) -> None:
    side_by_side(0, lambda _: pytest.fail("there is none"))


def test_an_error_surfaces(threads: int) -> None:
    def piece(index: int) -> None:
        if index == 4:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        side_by_side(7, piece)
    assert torch.get_num_threads() == threads
