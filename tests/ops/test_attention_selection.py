"""The descent: it parts the past exactly, follows the scores, sees no later token, and costs n log n."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dseek.core.attention_pattern import WINDOWS, AttentionPattern
from dseek.core.errors import ConfigError
from dseek.ops.attention.cell_scores import tabulated_scorer
from dseek.ops.attention.pyramid import build_pyramid
from dseek.ops.attention.selection import BlockChoice, choose, count_pairs, mean_key_scorer, select


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def random_scores(query_block: int, group: int, level: int, indices: Sequence[int]) -> list[float]:
    source = random.Random(f"{query_block} {group} {level}")
    return [source.choice((0.0, source.gauss(0, 1))) for _ in indices]  # with ties


def covered(choice: BlockChoice) -> list[int]:
    """Blocks that a choice accounts for, each as often as it does."""
    blocks = list(choice.exact_blocks)
    for level, index in choice.far_cells:
        blocks += range(index * 8**level, (index + 1) * 8**level)
    return sorted(blocks)


@settings(deadline=None)
@given(st.integers(0, 4000), st.integers(0, 70), st.sampled_from(WINDOWS), st.integers(0, 5))
def test_exact_blocks_and_far_cells_part_the_past(query_block: int, top_blocks: int, window: int, group: int) -> None:
    pattern = AttentionPattern(kind="dynamic", window_tokens=(window,), top_blocks=top_blocks, far=True)
    choice = choose(pattern, query_block, group, random_scores)
    assert covered(choice) == list(range(query_block))
    near = set(range(max(0, query_block - window // 64), query_block)) | set(range(min(1, query_block)))
    assert near <= set(choice.exact_blocks)
    assert len(choice.exact_blocks) <= len(near) + top_blocks
    assert list(choice.exact_blocks) == sorted(choice.exact_blocks)
    assert list(choice.far_cells) == sorted(choice.far_cells, key=lambda cell: (-cell[0], cell[1]))


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 127, 200, 640, 1000, 5000])
@pytest.mark.parametrize("windows", [(64, 64), (64, 512)])
def test_tokens_and_cells_count_each_past_token_once_for_every_query(num_tokens: int, windows: tuple[int, int]) -> None:
    q, k = draw(num_tokens, 4, 8), draw(num_tokens, 2, 8, seed=1)
    pattern = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=2, far=True)
    selection = select(q, k, pattern, windows=windows)
    assert sorted(selection) == list(range(-(-num_tokens // 64)))
    for position in range(num_tokens):
        choices = selection[position // 64]
        assert len(choices) == 2
        for choice in choices:
            own = position - position // 64 * 64 + 1
            far = sum(64 * 8**level for level, _ in choice.far_cells)
            assert own + 64 * len(choice.exact_blocks) + far == position + 1
            assert covered(choice) == list(range(position // 64))


def test_the_descent_of_a_worked_example() -> None:
    best = {1: {3: 2.0, 6: 1.0}, 0: {25: 5.0, 73: 5.0, 30: 4.0, 60: 9.0}}
    asked: list[tuple[int, list[int]]] = []

    def score(query_block: int, group: int, level: int, indices: Sequence[int]) -> list[float]:
        assert (query_block, group) == (77, 1)
        asked.append((level, list(indices)))
        return [best[level].get(index, 0.0) for index in indices]

    choice = choose(AttentionPattern(kind="dynamic", window_tokens=(128,), top_blocks=2, far=True), 77, 1, score)
    leaves = [*range(1, 8), *range(24, 32), *range(48, 56), 72, 73, 74]
    assert asked == [(1, list(range(1, 9))), (0, leaves)]  # 2, 0 and 1, 0 hold the sink and are opened unasked
    assert choice.exact_blocks == (0, 25, 73, 75, 76)  # 60 scores more, but its parent was not opened
    far = [(1, index) for index in (1, 2, 4, 5, 7, 8)] + [(0, leaf) for leaf in leaves if leaf not in (25, 73)]
    assert choice.far_cells == tuple(far)
    assert choice.num_scores == 8 + len(leaves)


def test_the_cell_that_the_window_cuts_is_opened_unasked() -> None:
    choice = choose(
        AttentionPattern(kind="dynamic", window_tokens=(256,), top_blocks=0, far=True), 72, 0, random_scores
    )
    # Blocks 68 to 71 are near: the cell of 64 to 71 is cut, its other half stays far, block by block.
    assert choice.exact_blocks == (0, 68, 69, 70, 71)
    assert [index for level, index in choice.far_cells if level == 0] == [*range(1, 8), 64, 65, 66, 67]
    assert choice.num_scores == 0


@pytest.mark.parametrize(("query_block", "highest"), [(2047, 2), (2048, 2), (2049, 3), (4000, 3)])
def test_the_descent_starts_from_the_level_of_the_position(query_block: int, highest: int) -> None:
    choice = choose(
        AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=0, far=True), query_block, 0, random_scores
    )
    assert max(level for level, _ in choice.far_cells) == highest


def test_among_equal_scores_the_lower_index_wins() -> None:
    def equal(query_block: int, group: int, level: int, indices: Sequence[int]) -> list[float]:
        return [1.0] * len(indices)

    choice = choose(AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=3, far=True), 60, 0, equal)
    assert choice.exact_blocks == (0, 1, 2, 3, 59)


def test_kinds_and_far_switched_off() -> None:
    dynamic = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=1, far=True)
    dense = choose(AttentionPattern(kind="dense"), 9, 0, None)
    assert dense == BlockChoice(exact_blocks=tuple(range(9)))
    assert choose(AttentionPattern(kind="window", window_tokens=(128,)), 9, 0, None).exact_blocks == (0, 7, 8)
    assert choose(AttentionPattern(kind="window", window_tokens=(512,)), 0, 0, None).exact_blocks == ()
    near = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=1, far=False)
    with_far, without = choose(dynamic, 9, 0, random_scores), choose(near, 9, 0, random_scores)
    assert with_far.far_cells and not without.far_cells
    assert with_far.exact_blocks == without.exact_blocks
    with pytest.raises(ConfigError):
        choose(dynamic, 9, 0, random_scores, window_tokens=96)


@pytest.mark.parametrize("query_block", [0, 1, 5, 64, 77, 700])
def test_with_an_unlimited_budget_nothing_is_far(query_block: int) -> None:
    pattern = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=query_block, far=True)
    choice = choose(pattern, query_block, 0, random_scores)
    assert choice == BlockChoice(exact_blocks=tuple(range(query_block)))


def test_the_untrained_score_is_that_of_the_mean_key_over_the_groups_heads() -> None:
    q, k = draw(640, 4, 16).double(), draw(640, 2, 16, seed=1).double()
    score = mean_key_scorer(q, build_pyramid(k), start=0)
    for level, tokens, index in ((0, 64, 3), (1, 512, 0)):
        for group in range(2):
            mean = k[index * tokens : (index + 1) * tokens, group].mean(0)
            products = q[576, 2 * group : 2 * group + 2] @ mean / 4 + math.log(tokens)
            assert score(9, group, level, [index]) == pytest.approx([products.max().item()], rel=1e-12)


def test_tabulated_scores_are_those_of_the_untrained_gate() -> None:
    q, k = draw(1300, 4, 8).double(), draw(1300, 2, 8, seed=1).double()
    pyramid = build_pyramid(k)
    asked = [3, 17, 20]
    one, other = (
        mean_key_scorer(q, pyramid, start=0),
        tabulated_scorer(q[[64 * block for block in asked]], asked, pyramid),
    )
    for block in asked:
        for group in range(2):
            for level, indices in ((0, [0, 2, 1]), (1, [0])):
                expected = one(block, group, level, indices)
                assert other(block, group, level, indices) == pytest.approx(expected, rel=1e-12)


def test_selection_finds_the_block_that_answers() -> None:
    q, k = 0.1 * draw(4096, 2, 16), 0.1 * draw(4096, 1, 16, seed=1)
    wanted = 23
    k[wanted * 64 : (wanted + 1) * 64] += 3.0
    q += 1.0
    selection = select(q, k, AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=1, far=True))
    for query_block in range(wanted + 1, 64):
        assert wanted in selection[query_block][0].exact_blocks


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 300, 511, 512, 700])
def test_no_choice_depends_on_a_later_token(cut: int) -> None:
    q, k = draw(900, 4, 8), draw(900, 2, 8, seed=1)
    pattern = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=1, far=True)
    other_q, other_k = q.clone(), k.clone()
    other_q[cut + 1 :] = 5 * draw(899 - cut, 4, 8, seed=2)
    other_k[cut + 1 :] = 5 * draw(899 - cut, 2, 8, seed=3)
    ours, theirs = select(q, k, pattern), select(other_q, other_k, pattern)
    alone = select(q[: cut + 1], k[: cut + 1], pattern)
    for query_block in range(cut // 64 + 1):
        assert ours[query_block] == theirs[query_block] == alone[query_block]
    assert ours != theirs


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 260), min_size=1, max_size=12))
def test_chunks_choose_what_the_whole_prompt_chooses(chunks: list[int]) -> None:
    num_tokens = sum(chunks)
    q, k = draw(num_tokens, 2, 8), draw(num_tokens, 1, 8, seed=1)
    pattern = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=1, far=True)
    whole = select(q, k, pattern)
    kept: dict[int, tuple[BlockChoice, ...]] = {}
    done = 0
    for chunk in chunks:
        kept |= select(q[done : done + chunk], k[: done + chunk], pattern, kept=kept)
        done += chunk
    assert kept == whole


def test_a_block_that_began_earlier_needs_its_choice_kept() -> None:
    q, k = draw(10, 1, 8), draw(100, 1, 8)
    with pytest.raises(AssertionError, match="must be kept"):
        select(q, k, AttentionPattern(kind="dynamic", far=True, window_tokens=(512,), top_blocks=16))


def work(num_tokens: int, pattern: AttentionPattern) -> tuple[float, float]:
    """Pairs and gate scores for each token of a sequence, by random scores."""
    selection = {block: (choose(pattern, block, 0, random_scores),) for block in range(num_tokens // 64)}
    counts = count_pairs(selection, num_tokens).values()
    return sum(count.pairs for count in counts) / num_tokens, sum(count.scores for count in counts) / num_tokens


def test_pairs_grow_with_the_logarithm_of_the_length() -> None:
    window, top_blocks = 512, 8
    pattern = AttentionPattern(kind="dynamic", window_tokens=(window,), top_blocks=top_blocks, far=True)
    per_log = []
    for num_tokens in (4096 << shift for shift in range(6)):
        pairs, scores = work(num_tokens, pattern)
        # Own block, window, sink and selected tokens; 32 start cells, and at each of two levels the children of K + 2.
        bound = 32.5 + window + 64 + 64 * top_blocks + 32 + 2 * 8 * (top_blocks + 3)
        assert pairs <= bound
        assert scores <= (32 + 2 * 8 * (top_blocks + 3)) / 64
        per_log.append(pairs / math.log2(num_tokens))
    assert max(per_log) <= 90
    # From 16K on, the budget is used up everywhere: the cost of a token grows more slowly than the logarithm.
    assert per_log[2:] == sorted(per_log[2:], reverse=True)
    assert work(32768, AttentionPattern(kind="dense"))[0] / 15 > 1000


def test_pairs_are_counted_to_the_last_row() -> None:
    choice = BlockChoice(exact_blocks=(0, 2), far_cells=((0, 1),), num_scores=7)
    counts = count_pairs({3: (choice, choice)}, 3 * 64 + 3)
    assert counts[3].pairs == 2 * (3 * (128 + 1) + 1 + 2 + 3)
    assert counts[3].scores == 14
