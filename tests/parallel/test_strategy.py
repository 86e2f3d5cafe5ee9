"""The layout follows the predicted time, and the prediction counts what a rank really needs."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dseek.core.errors import ConfigError
from dseek.parallel import AttentionWork, Link, assign_blocks, balanced_assignment, choose_strategy
from dseek.parallel.sharding import Layout
from dseek.parallel.strategy import predict_seconds

DENSE = AttentionWork(num_blocks=256, block_s=1e-3, pair_s=1e-5, block_bytes=2**15)
WINDOW = dataclasses.replace(DENSE, window_blocks=16)
DYNAMIC = dataclasses.replace(DENSE, window_blocks=8, top_blocks=16)
LAYOUTS: tuple[Layout, ...] = ("contiguous", "zigzag")
LINK = Link(latency_s=1e-5, gbs=5.0)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_dense_is_folded_and_near_linear_patterns_stay_contiguous(world_size: int) -> None:
    assert choose_strategy(DENSE, world_size, LINK) == "zigzag"
    assert choose_strategy(WINDOW, world_size, LINK) == "contiguous"
    assert choose_strategy(DYNAMIC, world_size, LINK) == "contiguous"


def test_one_rank_needs_no_folding() -> None:
    assert choose_strategy(DENSE, 1, LINK) == "contiguous"


def test_folding_a_window_doubles_what_its_halo_costs() -> None:
    link = Link(latency_s=0.0, gbs=1e-6)
    seconds_of_a_block = WINDOW.block_bytes / 1e3
    times = [predict_seconds(WINDOW, balanced_assignment(256, 4, layout=layout), link) for layout in LAYOUTS]
    alone = [predict_seconds(WINDOW, balanced_assignment(256, 4, layout=layout)) for layout in LAYOUTS]
    # Sixteen blocks before a run, and block 0.
    assert times[0] - alone[0] == pytest.approx(17 * seconds_of_a_block)
    assert times[1] - alone[1] == pytest.approx(33 * seconds_of_a_block)


def test_a_contiguous_cut_weighs_tokens_against_attention() -> None:
    for block_s, pair_s in ((1.0, 0.0), (0.0, 1.0), (1e-3, 1e-5)):
        work = dataclasses.replace(DENSE, block_s=block_s, pair_s=pair_s)
        cut = predict_seconds(work, assign_blocks(work, 4, "contiguous"))
        bound = 64 * block_s + (sum(work.pairs()) / 4 + 256) * pair_s
        equal = predict_seconds(work, balanced_assignment(256, 4))
        assert cut <= (bound if 0.0 in (block_s, pair_s) else equal)


def test_prediction_of_a_plain_case_by_hand() -> None:
    work = AttentionWork(num_blocks=4, block_s=10.0, pair_s=1.0, block_bytes=10**9)
    assignment = balanced_assignment(4, 2)
    # Pairs are 0.5, 1.5 | 2.5, 3.5; the second rank receives blocks 0 and 1.
    assert predict_seconds(work, assignment) == 20.0 + 6.0
    assert predict_seconds(work, assignment, Link(latency_s=100.0, gbs=0.5)) == 20.0 + 6.0 + 2 / 0.5 + 100.0


@given(st.integers(1, 60), st.integers(0, 12), st.integers(0, 9), st.integers(1, 8), st.booleans())
def test_received_blocks_are_what_the_window_needs(
    num_blocks: int, window: int, top: int, world_size: int, folded: bool
) -> None:
    work = dataclasses.replace(DENSE, num_blocks=num_blocks, window_blocks=window)
    assignment = balanced_assignment(num_blocks, world_size, layout="zigzag" if folded else "contiguous")
    for rank, owned in enumerate(assignment.blocks):
        needed = {k for q in owned for k in range(q) if k == 0 or q - k <= window}
        assert work.received_blocks(assignment, rank) == len(needed - set(owned))
        dense = dataclasses.replace(work, window_blocks=None)
        assert dense.received_blocks(assignment, rank) == len({k for q in owned for k in range(q)} - set(owned))
        selecting = dataclasses.replace(work, top_blocks=top)
        cells = num_blocks / 64
        assert selecting.received_blocks(assignment, rank) <= dense.received_blocks(assignment, rank) + cells
        assert selecting.received_blocks(assignment, rank) >= work.received_blocks(assignment, rank)
    expected = [sum(k == 0 or q - k <= window for k in range(q)) + 0.5 for q in range(num_blocks)]
    assert work.pairs() == expected
    far = [q + 0.5 - near for q, near in enumerate(expected)]
    assert dataclasses.replace(work, top_blocks=top).pairs() == [
        near + min(top, rest) for near, rest in zip(expected, far, strict=True)
    ]


def test_auto_is_the_layout_that_was_chosen() -> None:
    for work in (DENSE, WINDOW):
        layout = choose_strategy(work, 4, LINK)
        assert assign_blocks(work, 4, "auto", LINK) == assign_blocks(work, 4, layout)


@pytest.mark.parametrize("name", ["num_blocks", "window_blocks", "top_blocks", "block_s", "pair_s", "block_bytes"])
def test_impossible_work_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(DYNAMIC, **{name: -1})


def test_impossible_links_and_strategies_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"0\.0 GB/s"):
        Link(latency_s=0.0, gbs=0.0)
    with pytest.raises(ConfigError, match="'best'"):
        assign_blocks(DENSE, 2, "best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="0 ranks"):
        choose_strategy(DENSE, 0)
