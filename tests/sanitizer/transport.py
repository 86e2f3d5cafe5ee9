"""Two ranks over one segment, as two threads of one process: collectives and messages of odd sizes.

Run as `python -m tests.sanitizer.transport` by `test_sanitizer.py`. The bindings take addresses, so that they cannot be
called with anything: the arrays here are exactly as long as they say, and results are compared with plain numpy.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from tests.sanitizer.process import load

WORLD = 2
SLOT_BYTES = 16 << 10
COUNTS = (0, 1, 3, 16, 17, 1023, 4096, 4099, 20_001)
"""Elements; the longest take several slots."""
FLOAT32, SUM = 0, 0
TIMEOUT_S = 60.0


def main() -> None:
    """Run all collectives of all sizes, then messages."""
    native = load()
    descriptor = os.memfd_create("segment")
    os.ftruncate(descriptor, native.segment_bytes(WORLD, SLOT_BYTES))
    peers = [[-1 if peer == rank else os.pidfd_open(os.getpid()) for peer in range(WORLD)] for rank in range(WORLD)]
    # Rank 0 writes the token that rank 1 compares.
    segments = [native.Segment(descriptor, rank, WORLD, SLOT_BYTES, 7, peers[rank]) for rank in range(WORLD)]
    for count in COUNTS:
        _on_all(lambda rank, count=count: _collectives(segments[rank], rank, count))
    _on_all(lambda rank: _messages(native, segments[rank], rank))
    for segment in segments:
        segment.leave()
    os.close(descriptor)


def _on_all(run: Callable[[int], None]) -> None:
    """Run both ranks at once; what one raises is raised."""
    failures: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            run(rank)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _values(rank: int, count: int) -> np.ndarray:
    return np.random.default_rng(rank).standard_normal(count).astype(np.float32)


def _address(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def _collectives(segment: Any, rank: int, count: int) -> None:
    own, all_values = _values(rank, count), [_values(peer, count) for peer in range(WORLD)]
    total = all_values[0] + all_values[1]
    ending = (TIMEOUT_S, False)

    x = own.copy()
    segment.all_reduce(_address(x), count, FLOAT32, SUM, *ending)
    assert np.array_equal(x, total)

    x = own.copy()
    segment.reduce(_address(x), count, FLOAT32, SUM, 1, *ending)
    assert rank != 1 or np.array_equal(x, total)

    inputs, out = [own, own.copy()], np.empty_like(own)
    segment.reduce_scatter([_address(part) for part in inputs], _address(out), count, FLOAT32, SUM, *ending)
    assert np.array_equal(out, total)

    outs = [np.empty_like(own) for _ in range(WORLD)]
    segment.all_gather(_address(own), [_address(part) for part in outs], [part.nbytes for part in outs], *ending)
    assert all(map(np.array_equal, outs, all_values))

    x = own.copy()
    segment.broadcast(_address(x), x.nbytes, 1, *ending)
    assert np.array_equal(x, all_values[1])

    outs, sizes = [np.empty_like(own) for _ in range(WORLD)], [own.nbytes] * WORLD
    segment.all_to_all([_address(own)] * WORLD, sizes, [_address(part) for part in outs], sizes, *ending)
    assert all(map(np.array_equal, outs, all_values))
    segment.barrier(*ending)


def _messages(native: ModuleType, segment: Any, rank: int) -> None:
    messages = native.Messages(segment)
    for tag, count in enumerate(COUNTS):
        sent, received = _values(rank, count), np.empty(count, np.float32)
        waiting = {
            messages.send(_address(sent), sent.nbytes, 1 - rank, tag),
            messages.receive(_address(received), received.nbytes, 1 - rank, tag),
        }
        while waiting:
            for identity, _, error in messages.progress(0.1):
                assert not error, error
                waiting.discard(identity)
        assert np.array_equal(received, _values(1 - rank, count))
    segment.barrier(TIMEOUT_S, False)


if __name__ == "__main__":
    main()
