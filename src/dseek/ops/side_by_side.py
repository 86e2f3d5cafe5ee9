"""Run independent pieces of PyTorch code side by side, one thread each.

A piece made of many small operators loses more to the meeting of threads after each of them than it wins by sharing
them out, above all where a core is taken by somebody else for a moment. Pieces that know nothing of each other need
not meet at all; PyTorch lets go of the interpreter while an operator computes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def side_by_side(num_pieces: int, piece: Callable[[int], None]) -> None:
    """Call a function for every piece; what it computes must not depend on the order. Records no gradients.

    Where there are fewer pieces than threads, they run one after the other with all threads each.

    Args:
        num_pieces: how many.
        piece: computes one, given its index; writes to memory that no other piece touches.

    Raises:
        Exception: the first one that a piece raised, after all have ended.
    """
    num_threads = torch.get_num_threads()
    if num_threads == 1 or num_pieces < num_threads:
        with torch.no_grad():
            for index in range(num_pieces):
                piece(index)
        return

    def alone(index: int) -> None:
        with torch.no_grad():
            piece(index)

    try:
        # The number of threads is a thread's own, and the default of threads that are made later.
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as team:
            results = [team.submit(alone, index) for index in range(num_pieces)]
    finally:
        torch.set_num_threads(num_threads)
    for result in results:
        result.result()
