"""Windows chosen from attention mass: by hand, within a budget, and only from rows that can tell."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from dseek.core.attention_pattern import WINDOWS
from dseek.core.errors import ConfigError
from dseek.models.window_choice import WindowChoice, choose_windows, held_mass, windows_to_choose

UNLIMITED = WindowChoice(mean_tokens=4096)
SIZES = (64, 128, 256)


def test_held_mass_is_the_near_blocks_and_the_first_one() -> None:
    mass_RHB = torch.zeros(2, 2, 6)
    # Row 330 lies in block 5; head 0 spreads its mass, head 1 looks at the first block and its own.
    mass_RHB[0, 0] = torch.tensor([0.1, 0.2, 0.05, 0.15, 0.2, 0.3])
    mass_RHB[0, 1] = torch.tensor([0.75, 0.0, 0.0, 0.0, 0.0, 0.25])
    # Row 200 has three blocks before its own, fewer than the longest window, and does not count.
    mass_RHB[1, :, 3] = 1.0
    held = held_mass(mass_RHB, torch.tensor([330, 200]), (64, 128, 256))
    expected = [[0.1 + 0.3 + 0.2, 0.1 + 0.3 + 0.2 + 0.15, 1.0], [1.0, 1.0, 1.0]]
    torch.testing.assert_close(held, torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=0)
    # Where the window reaches the first block, that is not counted twice.
    whole = held_mass(mass_RHB[:1], torch.tensor([330]), (64, 128, 256, 320))
    torch.testing.assert_close(whole[:, -1], torch.ones(2, dtype=torch.float64), atol=1e-7, rtol=0)


def test_windows_that_too_few_rows_have_before_them_are_left_out() -> None:
    spread = torch.arange(0, 8192)
    assert windows_to_choose([spread]) == WINDOWS
    assert windows_to_choose([spread[:2048]]) == (64, 128, 256, 512, 1024)
    assert windows_to_choose([spread[:40]]) == (64,)
    # Of the layers the one that reaches least decides, and one far row is not enough.
    assert windows_to_choose([spread, spread[:2048]]) == (64, 128, 256, 512, 1024)
    assert windows_to_choose([torch.tensor([100, 100, 100, 100, 8000])]) == (64,)


def test_the_smallest_window_that_holds_enough_for_every_head_of_the_group() -> None:
    held_LHW = torch.tensor(
        [
            # Two key-value heads of two query heads each: the needier of the two decides.
            [[0.9, 0.95, 1.0], [0.1, 0.2, 0.2], [0.5, 0.5, 0.5], [0.45, 0.5, 0.5]],
            [[0.1, 0.2, 0.3], [0.3, 0.3, 0.3], [0.8, 0.91, 1.0], [0.2, 0.2, 0.2]],
        ],
        dtype=torch.float64,
    )
    assert choose_windows(held_LHW, held_LHW, 2, SIZES, UNLIMITED) == [[128, 64], [256, 128]]
    strict = WindowChoice(least_share=1.0, mean_tokens=4096)
    assert choose_windows(held_LHW, held_LHW, 2, SIZES, strict) == [[256, 128], [256, 256]]


def test_the_budget_is_taken_where_least_mass_per_token_is_lost() -> None:
    held_LHW = torch.tensor([[[0.1, 0.5, 1.0], [0.7, 0.7, 1.0], [0.6, 0.85, 1.0]]], dtype=torch.float64)
    means = (256, 255, 213, 170, 149, 127, 64)
    by_mean = {mean: choose_windows(held_LHW, held_LHW, 3, SIZES, WindowChoice(mean_tokens=mean))[0] for mean in means}
    assert by_mean[256] == [256, 256, 256]
    # The third head loses 0.15 over 128 tokens; the second 0.3 over 192, since half way there nothing is saved.
    assert by_mean[255] == [256, 256, 128]
    assert by_mean[213] == [256, 128, 128]  # half way is enough
    assert by_mean[170] == [256, 64, 128]
    # Now 0.25 over 64 tokens in the third head and 0.5 over 128 in the first: at the same price the first comes first.
    assert by_mean[149] == [128, 64, 128]
    assert by_mean[127] == [128, 64, 128]
    assert by_mean[64] == [64, 64, 64]


def test_a_block_with_much_mass_is_worth_more_than_many_with_little() -> None:
    """Two heads that would lose the same mass: one in a single block, the other in two."""
    mass_RHB = torch.zeros(1, 2, 8)
    mass_RHB[0, 0] = torch.tensor([0.2, 0.0, 0.0, 0.4, 0.0, 0.0, 0.2, 0.2])
    mass_RHB[0, 1] = torch.tensor([0.2, 0.0, 0.0, 0.2, 0.2, 0.0, 0.2, 0.2])
    rows_R = torch.tensor([450])
    held, squared = (held_mass(mass, rows_R, SIZES)[None] for mass in (mass_RHB, mass_RHB.square()))
    assert choose_windows(held, squared, 2, SIZES, UNLIMITED) == [[256, 256]]
    assert choose_windows(held, squared, 2, SIZES, WindowChoice(mean_tokens=192)) == [[256, 128]]
    assert choose_windows(held.flip(1), squared.flip(1), 2, SIZES, WindowChoice(mean_tokens=192)) == [[128, 256]]


def test_the_last_window_shrinks_no_farther_than_it_has_to() -> None:
    # From 256 to 64 loses least per token, but 128 is enough.
    held_LHW = torch.tensor([[[0.9, 0.5, 1.0], [0.1, 0.2, 1.0]]], dtype=torch.float64)
    held_LHW[0, 0, 1] = 0.92
    assert choose_windows(held_LHW, held_LHW, 2, SIZES, WindowChoice(least_share=0.99, mean_tokens=192)) == [[128, 256]]
    assert choose_windows(held_LHW, held_LHW, 2, SIZES, WindowChoice(least_share=0.99, mean_tokens=191)) == [[64, 256]]


def test_hardly_any_choice_within_the_budget_holds_more() -> None:
    generator = random.Random(4)
    for _ in range(40):
        # The gain of each doubling is at most that of the one before it, per token.
        heads = []
        for _ in range(4):
            gains = sorted((generator.random() for _ in range(2)), reverse=True)
            heads.append([0.5, 0.5 + 64 * gains[0] / 400, 0.5 + (64 * gains[0] + 128 * gains[1]) / 400])
        held_LHW = torch.tensor([heads], dtype=torch.float64)
        mean = generator.choice((64, 80, 112, 160, 200))
        (chosen,) = choose_windows(held_LHW, held_LHW, 4, SIZES, WindowChoice(least_share=1.0, mean_tokens=mean))
        assert sum(chosen) <= 4 * mean
        lost = sum(head[-1] - head[SIZES.index(window)] for head, window in zip(heads, chosen, strict=True))
        best = min(
            sum(head[-1] - head[SIZES.index(window)] for head, window in zip(heads, windows, strict=True))
            for windows in itertools.product(SIZES, repeat=4)
            if sum(windows) <= 4 * mean
        )
        # Steps that cost least per token are the best for the tokens they end at: only the last may take too many.
        one_step = max(wide - narrow for head in heads for narrow, wide in itertools.pairwise(head))
        assert best - 1e-12 <= lost <= best + one_step
        if sum(chosen) == 4 * mean:
            assert lost == pytest.approx(best)


@pytest.mark.parametrize("values", [{"mean_tokens": 63}, {"mean_tokens": 4097}, {"least_share": 0.0}])
def test_bad_choices(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        WindowChoice(**values)  # type: ignore[arg-type]
