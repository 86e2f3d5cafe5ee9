"""Chunks and owners: they cover the sequence, and are as balanced as is promised."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dseek.core.errors import ConfigError
from dseek.parallel import BlockAssignment, balanced_assignment, dynamic_sharding


@given(st.integers(1, 300_000), st.integers(1, 40_000), st.sampled_from([1, 16, 64, 128]))
def test_chunks_cover_the_sequence_and_are_balanced(length: int, maximum: int, block: int) -> None:
    chunks = dynamic_sharding(length, maximum, block_tokens=block)
    assert chunks[0].start == 0
    assert chunks[-1].stop == length
    assert all(a.stop == b.start for a, b in itertools.pairwise(chunks))
    sizes = [len(chunk) for chunk in chunks]
    assert min(sizes) >= 1
    assert max(sizes) <= maximum
    unit = block if maximum >= block else 1
    assert max(sizes) - min(sizes) <= unit
    assert all(chunk.start % unit == 0 for chunk in chunks)


@given(st.integers(1, 3000), st.integers(1, 700))
def test_no_fewer_chunks_would_do(length: int, maximum: int) -> None:
    chunks = dynamic_sharding(length, maximum)
    most = maximum // 64 * 64 or maximum
    assert (len(chunks) - 2) * most + maximum < length or len(chunks) == 1


def test_a_sequence_within_the_maximum_stays_whole() -> None:
    assert dynamic_sharding(100, 100) == (range(100),)
    assert dynamic_sharding(1, 10**9) == (range(1),)


def test_chunks_of_a_plain_case() -> None:
    assert dynamic_sharding(300, 128) == (range(64), range(64, 192), range(192, 300))
    assert dynamic_sharding(10, 4) == (range(3), range(3, 6), range(6, 10))


@pytest.mark.parametrize(
    ("length", "maximum", "block"), [(0, 64, 64), (-1, 64, 64), (5, 0, 64), (5, -3, 64), (5, 5, 0)]
)
def test_impossible_cuts_are_refused(length: int, maximum: int, block: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        dynamic_sharding(length, maximum, block_tokens=block)


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.integers(1, 20), st.sampled_from(["contiguous", "zigzag"])
)
def test_every_block_has_one_owner(cost: list[float], world_size: int, layout: str) -> None:
    assignment = balanced_assignment(len(cost), world_size, cost, layout=layout)  # type: ignore[arg-type]
    assert assignment.world_size == world_size
    assert assignment.num_blocks == len(cost)
    owners = assignment.owners()
    assert all(owners[block] == rank for rank, owned in enumerate(assignment.blocks) for block in owned)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.integers(1, 20))
def test_contiguous_shares_exceed_the_mean_by_one_block_at_most(cost: list[float], world_size: int) -> None:
    assignment = balanced_assignment(len(cost), world_size, cost)
    assert [block for owned in assignment.blocks for block in owned] == list(range(len(cost)))
    bound = sum(cost) / world_size + max(cost)
    assert max(assignment.loads(cost)) <= bound * (1 + 1e-9)


@given(st.integers(1, 400), st.integers(1, 16))
def test_equal_costs_give_equal_shares(num_blocks: int, world_size: int) -> None:
    for cost in (None, [0.0] * num_blocks):
        sizes = [len(owned) for owned in balanced_assignment(num_blocks, world_size, cost).blocks]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_zigzag_balances_tokens_and_causal_work(world_size: int) -> None:
    num_blocks = 2 * world_size * 5
    cost = [block + 0.5 for block in range(num_blocks)]
    assignment = balanced_assignment(num_blocks, world_size, cost, layout="zigzag")
    assert {len(owned) for owned in assignment.blocks} == {num_blocks // world_size}
    assert set(assignment.loads(cost)) == {sum(cost) / world_size}


def test_chunks_follow_each_other() -> None:
    first = balanced_assignment(4, 2, layout="zigzag")
    both = first.followed_by(balanced_assignment(3, 2))
    assert first.blocks == ((0, 3), (1, 2))
    assert both.blocks == ((0, 3, 4, 5), (1, 2, 6))
    with pytest.raises(ConfigError, match="3 ranks"):
        first.followed_by(balanced_assignment(4, 3))


@pytest.mark.parametrize("blocks", [(), ((1, 0),), ((0,), (0,)), ((0, 2),), ((0, 0),)])
def test_owners_that_are_none_are_refused(blocks: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ConfigError):
        BlockAssignment(blocks=blocks)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ((0, 1), "0 blocks"),
        ((1, 0), "0 ranks"),
        ((2, 1, [1.0]), "1 costs"),
        ((2, 1, [1.0, -1.0]), "negative"),
        ((2, 1, [1.0, float("nan")]), "not finite"),
        ((2, 1, [1.0, float("inf")]), "not finite"),
    ],
)
def test_impossible_shares_are_refused(arguments: tuple, found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        balanced_assignment(*arguments)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ConfigError, match="'spiral'"):
        balanced_assignment(2, 1, layout="spiral")  # type: ignore[arg-type]
