"""The attention pattern: what it accepts, and the arithmetic of the pyramid."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dseek.core.attention_pattern import (
    WINDOWS,
    AttentionPattern,
    cell_blocks,
    cell_tokens,
    num_levels,
    start_cells,
    top_level,
)
from dseek.core.config import from_mapping, to_plain
from dseek.core.errors import ConfigError


def test_a_pattern_survives_json() -> None:
    pattern = AttentionPattern(kind="dynamic", window_tokens=(1024, 64), top_blocks=3, far=True)
    assert from_mapping(AttentionPattern, json.loads(json.dumps(to_plain(pattern)))) == pattern
    assert from_mapping(AttentionPattern, {}) == AttentionPattern(kind="dense")


@pytest.mark.parametrize(
    ("values", "found", "needed"),
    [
        ({"kind": "sparse"}, "sparse", "dense, window, dynamic"),
        ({"kind": "window", "window_tokens": (64, 100)}, "100", "64, 128, 256"),
        ({"kind": "window", "window_tokens": (True,)}, "True", "64, 128, 256"),
        ({"kind": "window"}, "without a window", "for every head"),
        ({"kind": "window", "window_tokens": (64,), "top_blocks": 1}, "selects 1 blocks", "0 to 0"),
        ({"kind": "dynamic", "window_tokens": (64,), "top_blocks": -1}, "-1", "0 to 4096"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], found: str, needed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AttentionPattern(**values)
    assert found in caught.value.found and needed in (caught.value.needed or "")


@pytest.mark.parametrize(("window", "nearest"), [(0, 64), (100, 128), (5000, 4096)])
def test_the_nearest_window_is_named(window: int, nearest: int) -> None:
    with pytest.raises(ConfigError) as caught:
        AttentionPattern(kind="window", window_tokens=(window,))
    assert f"use {nearest}," in (caught.value.remedy or "")


def test_what_a_kind_has_no_use_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="dense attention pattern with a window"):
        AttentionPattern(window_tokens=(64,))
    with pytest.raises(ConfigError, match="window attention pattern with far cells"):
        AttentionPattern(kind="window", window_tokens=(64,), far=True)
    with pytest.raises(ConfigError, match="2 windows"):
        AttentionPattern(kind="window", window_tokens=(64, 128)).near_blocks(3)


def test_visible_tokens_stop_growing_with_the_context() -> None:
    pattern = AttentionPattern(kind="dynamic", window_tokens=(128, 256), top_blocks=2)
    assert pattern.visible_tokens(1, 2) == 1
    assert pattern.visible_tokens(130, 2) == 130
    assert pattern.visible_tokens(64 * 100, 2) == 64 + 64 * (2 + 4 + 2 * 3) / 2
    assert AttentionPattern().visible_tokens(6400, 2) == 6400


def test_windows_and_cells_have_the_sizes_of_the_definition() -> None:
    assert WINDOWS == (64, 128, 256, 512, 1024, 2048, 4096)
    assert [cell_blocks(level) for level in range(4)] == [1, 8, 64, 512]
    assert [cell_tokens(level) for level in range(3)] == [64, 512, 4096]


def test_one_more_level_for_each_eightfold() -> None:
    assert [top_level(tokens) for tokens in (0, 64, 131_072)] == [2, 2, 2]
    assert [top_level(tokens) for tokens in (131_136, 1_048_576)] == [3, 3]
    assert top_level(1_048_577) == 4
    assert num_levels(131_072) == 3 and num_levels(131_073) == 4


def test_start_cells_of_the_worked_example() -> None:
    assert start_cells(77, 2) == [(2, 0), (1, 8), (0, 72), (0, 73), (0, 74), (0, 75), (0, 76)]
    assert start_cells(77, 0) == [(0, block) for block in range(77)]
    assert start_cells(0, 2) == []


@given(st.integers(0, 5000), st.integers(0, 4))
def test_start_cells_tile_the_blocks(num_blocks: int, highest: int) -> None:
    cells = start_cells(num_blocks, highest)
    tiled = [block for level, index in cells for block in range(index * 8**level, (index + 1) * 8**level)]
    assert tiled == list(range(num_blocks))
    levels = [level for level, _ in cells]
    assert levels == sorted(levels, reverse=True)
    for level in range(highest):
        assert levels.count(level) < 8  # eight would be one of the next level
