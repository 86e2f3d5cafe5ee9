"""A batch cut for ranks: every row and every wanted logit has its rank, and what it costs decides who gets what."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dseek.core.attention_pattern import DENSE, AttentionPattern
from dseek.engine.batch import Batch
from dseek.engine.batch_parts import MANY_LOGIT_ROWS, MIN_ROWS, blocks_of, is_even_enough, owned_pages, part_of
from dseek.engine.shard_work import LayerWork, layer_works, share_out
from dseek.parallel import AttentionWork, Link, assign_blocks, balanced_assignment
from dseek.parallel.strategy import compare_assignments, predict_seconds
from dseek.plan.objective import Objective
from tests.plan.machines import SMALL

WORK = AttentionWork(num_blocks=1, block_s=1e-3, pair_s=1e-4, block_bytes=2**15, everywhere=True)


def make_batch(sequences: list[tuple[int, int]], logit_rows: list[int]) -> Batch:
    """A batch of sequences, each a first position and a number of rows."""
    width = max((start + count - 1) // 64 + 1 for start, count in sequences)
    starts = np.cumsum([0, *(count for _, count in sequences)], dtype=np.int32)
    return Batch(
        np.arange(starts[-1], dtype=np.int32),
        np.concatenate([np.arange(start, start + count, dtype=np.int32) for start, count in sequences]),
        starts,
        np.arange(len(sequences) * width, dtype=np.int32).reshape(-1, width) + 100,
        np.array(logit_rows, dtype=np.int32),
    )


@given(
    start=st.integers(0, 300),
    count=st.integers(1, 2500),
    world_size=st.integers(1, 8),
    layout=st.sampled_from(["contiguous", "zigzag"]),
    num_logits=st.integers(0, 40),
)
def test_every_row_and_logit_has_its_rank(
    start: int, count: int, world_size: int, layout: Any, num_logits: int
) -> None:
    sequences = [(17, 1), (start, count), (0, 3)]
    rows = sorted(set(np.linspace(0, count + 3, num_logits, dtype=int).tolist()))
    batch = make_batch(sequences, rows)
    blocks = blocks_of(batch, 1)
    assignment = balanced_assignment(blocks.num_blocks, world_size, layout=layout)
    if not is_even_enough(blocks, assignment):
        return
    assignments = [None, assignment, None]
    parts = [part_of(batch, assignments, rank) for rank in range(world_size)]
    pages = np.concatenate([owned_pages(batch, assignments, rank) for rank in range(world_size)])
    assert sorted(pages) == batch.page_tables[1, start // 64 : (start + count - 1) // 64 + 1].tolist()

    computed = Counter(token for part in parts for token in part.batch.token_ids.tolist())
    assert computed == {token: 1 if 0 < token <= count else world_size for token in range(count + 4)}
    for part in parts:
        piece = part.batch
        for sequence in range(piece.num_sequences):
            begin, end = piece.row_starts[sequence : sequence + 2]
            origin = np.searchsorted(batch.row_starts, piece.token_ids[begin], side="right") - 1
            np.testing.assert_array_equal(piece.page_tables[sequence], batch.page_tables[origin])
            np.testing.assert_array_equal(piece.positions[begin:end], batch.positions[piece.token_ids[begin:end]])
            assert (np.diff(piece.positions[begin:end]) == 1).all()
        asked = piece.token_ids[piece.logit_rows]
        np.testing.assert_array_equal(asked[part.wanted], batch.logit_rows[part.logit_rows])
        assert len(asked) >= min(len(rows), MANY_LOGIT_ROWS)
        assert (np.diff(piece.logit_rows) > 0).all()
    assert {row for part in parts for row in part.logit_rows.tolist()} == set(range(len(rows)))


def test_a_rank_with_few_rows_is_noticed() -> None:
    """Folded in four, a text that begins and ends with one row in a block leaves the first rank two rows."""
    batch = make_batch([(63, 2 * 64 + 2)], [0])
    blocks = blocks_of(batch, 0)
    assert (blocks.first_block, blocks.num_blocks) == (0, 4)
    assert not is_even_enough(blocks, balanced_assignment(4, 2, layout="zigzag"))
    contiguous = share_out({LayerWork(WORK): 1}, blocks, 2, "auto", None)
    assert contiguous == balanced_assignment(4, 2)
    assert share_out({LayerWork(WORK): 1}, blocks, 2, "zigzag", None) is None
    assert min(len(part_of(batch, [contiguous], rank).batch.token_ids) for rank in range(2)) == MIN_ROWS + 1


def test_auto_shares_out_what_pays() -> None:
    blocks = blocks_of(make_batch([(0, 64 * 32)], [0]), 0)
    works = {LayerWork(WORK): 30}
    fast, slow = Link(latency_s=1e-5, gbs=10.0), Link(latency_s=1e-5, gbs=1e-3)
    assert share_out(works, blocks, 4, "auto", fast) == balanced_assignment(32, 4, layout="zigzag")
    assert share_out(works, blocks, 4, "auto", slow) is None
    assert share_out(works, blocks, 4, "zigzag", slow) is not None
    assert share_out(works, blocks, 17, "zigzag", fast) is None  # fewer than two blocks a rank


def test_a_later_chunk_is_weighed_with_what_came_before() -> None:
    later = LayerWork(WORK)(100, 16)
    assert later.pairs() == [100.5 + block for block in range(16)]
    # Almost even: equal runs are as good as any, and a quarter of the blocks is received thrice.
    equal = balanced_assignment(16, 4)
    assert later.received_blocks(equal, 2) == 12.0
    seconds = 4 * 1e-3 + sum(later.pairs()[12:]) * 1e-4
    assert predict_seconds(later, equal) == pytest.approx(seconds)


def test_layers_that_differ_are_weighed_together() -> None:
    dense = LayerWork(WORK)(0, 64)
    window = LayerWork(AttentionWork(num_blocks=1, window_blocks=4, block_s=1e-3, pair_s=1e-4, block_bytes=1))(0, 64)
    for layers in ({dense: 30}, {window: 30}, {dense: 3, window: 27}):
        timed = compare_assignments(layers, 4)
        assert [seconds for seconds, _ in timed] == sorted(seconds for seconds, _ in timed)
        for seconds, owners in timed:
            assert seconds == pytest.approx(sum(n * predict_seconds(work, owners) for work, n in layers.items()))
    assert compare_assignments({dense: 1}, 4)[0][1] == assign_blocks(dense, 4, "zigzag")
    assert compare_assignments({window: 1}, 4)[0][1] == assign_blocks(window, 4, "contiguous")


def test_the_work_of_layers_adds_up_to_the_predicted_prompt() -> None:
    patterns = (DENSE, AttentionPattern(kind="dynamic", window_tokens=(128,), top_blocks=7)) * (SMALL.num_layers // 2)
    plan: Any = SimpleNamespace(
        shape=SMALL,
        attention_patterns=patterns,
        context_tokens=2176,
        objective=Objective(context_tokens=2176, prompt_tokens=2048, answer_tokens=128),
        predicted=SimpleNamespace(prefill_tokens_s=4096.0),
    )
    works = layer_works(plan, block_bytes=1000)
    assert sorted(works.values()) == [15, 15]
    assert {(work.work.window_blocks, work.work.top_blocks) for work in works} == {(None, 0), (2, 7)}
    alone = balanced_assignment(32, 1)
    total = sum(count * predict_seconds(work(0, 32), alone) for work, count in works.items())
    assert total == pytest.approx(0.5)
    one = next(iter(works)).work
    # Multiplications of 64 tokens in the linear layers, and of 64 queries with 64 keys and values.
    linear = 64 * 576 * (2 * 9 * 64 + 2 * 3 * 64 + 3 * 1536)
    assert one.block_s / one.pair_s == pytest.approx(linear / (2 * 64 * 64 * 9 * 64))
