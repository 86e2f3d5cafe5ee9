"""One sequence on 1, 2, 4 and 8 ranks: the same output, whatever the length, pattern, layout and order of messages."""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
import pytest
import torch

from dseek.ops.attention.partial import attend_blocks
from dseek.ops.attention.partial_gathered import attend_gathered_blocks
from dseek.parallel import AttentionWork, BlockAssignment, balanced_assignment, dynamic_sharding
from dseek.parallel.block_lists import window_lists
from dseek.parallel.context_parallel import Attend, ContextParallel
from dseek.parallel.ranks import Ranks
from tests.parallel.distributed import run_ranks
from tests.parallel.patterns import (
    DTYPES,
    WINDOW_BLOCKS,
    Case,
    attend_far,
    block_means,
    inputs,
    lists_of,
    oracle,
    select,
)

WORLD_SIZES = (1, 2, 4, pytest.param(8, marks=pytest.mark.slow))
LENGTHS = (1, 63, 64, 65, 1000, 4097)
CASES = (
    *(Case(length, pattern) for length in LENGTHS for pattern in ("dense", "window", "dynamic")),
    *(Case(1000, pattern, layout="contiguous") for pattern in ("dense", "window", "dynamic")),
    *(Case(1000, pattern, dtype=dtype) for pattern in ("dense", "window", "dynamic") for dtype in ("fp32", "bf16")),
)
TOLERANCE = {"fp64": 1e-12, "fp32": 2e-6, "bf16": 2e-2}
CHUNKED = Case(1000, "dense", dtype="fp64")

Piece = tuple[np.ndarray, np.ndarray]
"""Positions and outputs of one rank."""


def _assignment(case: Case, world_size: int) -> BlockAssignment:
    return balanced_assignment(-(-case.length // 64), world_size, layout=case.layout)  # type: ignore[arg-type]


def _compute(
    case: Case, context: ContextParallel, delay_s: float = 0.0, operator: Attend = attend_blocks, at_once: bool = False
) -> torch.Tensor:
    """Output of this rank's queries."""
    q, k, v = (x[context.positions] for x in inputs(case))

    def attend(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(delay_s)
        return operator(*arguments)

    if case.pattern != "dynamic":
        return context.attention(q, k, v, context.routes(lists_of(case.pattern, context)), attend, at_once=at_once)
    means_k, means_v = context.gather_blocks(block_means(k)), context.gather_blocks(block_means(v))
    lists, far = select(context, q.to(means_k.dtype), means_k)
    partials = [attend_far(q, means_k, means_v, far)]
    return context.attention(q, k, v, context.routes(lists), attend, partials, at_once=at_once)


@functools.cache
def _alone(case: Case) -> torch.Tensor:
    """Output of one rank that has no process group."""
    return _compute(case, ContextParallel(_assignment(case, 1), case.length))


def _piece(context: ContextParallel, out: torch.Tensor) -> Piece:
    return context.positions.numpy(), out.double().numpy()


def _in_chunks(case: Case, ranks: Ranks, max_chunk_size: int) -> list[Piece]:
    """Compute a sequence chunk by chunk, each over all ranks, the keys of earlier chunks kept where they are."""
    whole_q, whole_k, whole_v = inputs(case)
    assignment, pieces = None, []
    for chunk in dynamic_sharding(case.length, max_chunk_size):
        more = balanced_assignment(-(-len(chunk) // 64), ranks.world_size, layout="zigzag")
        assignment = more if assignment is None else assignment.followed_by(more)
        context = ContextParallel(assignment, chunk.stop, ranks, start=chunk.start)
        kept = ContextParallel(assignment, chunk.stop, ranks).positions
        routes = context.routes(lists_of(case.pattern, context))
        out = context.attention(whole_q[context.positions], whole_k[kept], whole_v[kept], routes, attend_blocks)
        pieces.append(_piece(context, out))
    return pieces


class _CountingRanks(Ranks):
    """Counts what this rank receives."""

    def __init__(self) -> None:
        super().__init__()
        self.received_bytes = 0

    def receive(self, x: torch.Tensor, rank: int) -> Any:
        self.received_bytes += x.nbytes
        return super().receive(x, rank)


def _traffic(world_size: int) -> list[tuple[int, float]]:
    """Bytes that this rank received, and the blocks that were predicted, for each pattern and layout."""
    counted = []
    for pattern, window in (("dense", None), ("window", WINDOW_BLOCKS)):
        for layout in ("zigzag", "contiguous"):
            case = Case(1000, pattern, layout)
            ranks = _CountingRanks()
            context = ContextParallel(_assignment(case, world_size), case.length, ranks)
            routes = context.routes(lists_of(pattern, context))
            q, k, v = (x[context.positions] for x in inputs(case))
            ranks.received_bytes = 0
            context.attention(q, k, v, routes, attend_blocks)
            work = AttentionWork(num_blocks=16, window_blocks=window, block_s=1.0, pair_s=1.0, block_bytes=1)
            counted.append((ranks.received_bytes, work.received_blocks(context.assignment, ranks.rank)))
    return counted


def _everything(rank: int, world_size: int) -> dict[str, Any]:
    """All that the tests look at, in one start of the processes."""
    # Memory that was never written is NaN, so that what no message filled shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    found: dict[str, Any] = {}
    for case in CASES:
        context = ContextParallel(_assignment(case, world_size), case.length)
        out = _compute(case, context)
        found[str(case)] = _piece(context, out)
        at_once = _compute(case, context, operator=attend_gathered_blocks, at_once=True)
        found[f"{case} at once"] = _piece(context, at_once)
    found["whole"] = context.gather_tokens(out).double().numpy()
    found["last"] = str(case)

    case = Case(1000, "dynamic", dtype="fp32")
    context = ContextParallel(_assignment(case, world_size), case.length)
    late = (rank * 5 % world_size) * 0.01
    found["late"] = _piece(context, _compute(case, context, delay_s=late))
    found["early"] = _piece(context, _compute(case, context, delay_s=0.01 * world_size - late))
    found["chunks"] = _in_chunks(CHUNKED, context.ranks, 320)
    found["traffic"] = _traffic(world_size)
    return found


@pytest.fixture(scope="module", params=WORLD_SIZES, ids=lambda size: f"world{size}")
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each rank computed, for one number of ranks."""
    return run_ranks(request.param, _everything)


def _joined(pieces: list[Piece], length: int) -> torch.Tensor:
    """Put the ranks' rows in order; every row must come from one rank."""
    positions = np.concatenate([positions for positions, _ in pieces])
    assert sorted(positions.tolist()) == list(range(length))
    rows = np.concatenate([out for _, out in pieces])
    return torch.from_numpy(rows[np.argsort(positions)])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("way", ["", " at once"], ids=["by peer", "at once"])
def test_every_number_of_ranks_computes_the_whole(found: list[dict[str, Any]], case: Case, way: str) -> None:
    whole = _joined([of_rank[f"{case}{way}"] for of_rank in found], case.length)
    assert (whole - oracle(case)).abs().max() <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype != "bf16"], ids=str)
def test_ranks_equal_one_process_without_a_group(found: list[dict[str, Any]], case: Case) -> None:
    alone = _alone(case)
    assert alone.dtype == DTYPES[case.dtype]
    whole = _joined([of_rank[str(case)] for of_rank in found], case.length)
    assert (whole - alone.double()).abs().max() <= TOLERANCE[case.dtype]


def test_the_order_of_messages_does_not_matter(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        expected = of_rank[str(Case(1000, "dynamic", dtype="fp32"))]
        for delayed in ("late", "early"):
            assert np.array_equal(of_rank[delayed][1], expected[1])


def test_every_rank_can_have_the_whole(found: list[dict[str, Any]]) -> None:
    (last,) = {of_rank["last"] for of_rank in found}
    whole = _joined([of_rank[last] for of_rank in found], 1000)
    assert all(np.array_equal(of_rank["whole"], whole.numpy()) for of_rank in found)


def test_chunks_one_after_the_other_compute_the_whole(found: list[dict[str, Any]]) -> None:
    assert {len(of_rank["chunks"]) for of_rank in found} == {4}
    whole = _joined([piece for of_rank in found for piece in of_rank["chunks"]], CHUNKED.length)
    assert (whole - oracle(CHUNKED)).abs().max() <= TOLERANCE[CHUNKED.dtype]


def test_no_more_blocks_travel_than_were_predicted(found: list[dict[str, Any]]) -> None:
    block_bytes = 2 * 64 * 2 * 8 * 8
    for of_rank in found:
        for received_bytes, predicted_blocks in of_rank["traffic"]:
            assert received_bytes == predicted_blocks * block_bytes
    if len(found) > 1:
        assert sum(received for of_rank in found for received, _ in of_rank["traffic"]) > 0


def test_a_younger_block_is_refused() -> None:
    context = ContextParallel(balanced_assignment(3, 1), 130)
    with pytest.raises(AssertionError, match="younger"):
        context.routes(window_lists([1, 1, 2], 0))


def test_a_window_without_sink() -> None:
    lists = window_lists([0, 1, 5], 2, sink=False)
    assert lists.starts.tolist() == [0, 1, 3, 6]
    assert lists.blocks.tolist() == [0, 0, 1, 3, 4, 5]
    kept = lists.only(torch.tensor([1, 4, 9]))
    assert kept.starts.tolist() == [0, 0, 1, 2]
    assert kept.blocks.tolist() == [0, 1]
