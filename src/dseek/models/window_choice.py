"""Chooses a window for every key-value head from the attention mass of sampled rows, within a mean over all heads.

1. Every head gets the smallest window that holds, for each of its query heads, at least 90 % of the mass that the
   longest window would hold. Each query head counts by itself, since what one needs is not made up for by what its
   neighbours do not need. The row's own block and the first block are seen with any window and count as held.
2. While the mean is above what is allowed, the window shrinks that loses least squared mass for each token it is
   shortened by, added up over the query heads, to the size at which that is so. The last one shrinks no farther than it
   has to. Squares, since one block with half of the mass is missed more than many that have as much together; by plain
   mass, windows went to heads that look everywhere a little, and lost more than one window for all (docs/lab-log.md).

Rows that have less before them than the longest window would hold more of their mass in a short one for want of
anything farther away; they are left out. R rows, H query heads, G key-value heads, B blocks, W windows, L layers.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dseek.core.attention_pattern import BLOCK_TOKENS, WINDOWS
from dseek.core.errors import ConfigError

LEAST_ROWS = 0.25
"""Share of the rows that must have a window before them, or it is not among those to choose from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowChoice:
    """What windows have to hold, and how long they may be."""

    least_share: float = 0.9
    """Of the longest window's mass."""
    mean_tokens: int = 512
    """Most tokens that windows may have in the mean over all heads: 1/8 of the longest, so that at 16,384 tokens they
    take 6 % of the causal pairs, where windows of 4096 for all would take 44 %."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value out of its range.
        """
        if not 0.0 < self.least_share <= 1.0:
            raise ConfigError(f"windows that hold a share of {self.least_share}", needed="above 0 and at most 1")
        if not WINDOWS[0] <= self.mean_tokens <= WINDOWS[-1]:
            raise ConfigError(
                f"a mean window of {self.mean_tokens} tokens", needed=f"{WINDOWS[0]} to {WINDOWS[-1]} tokens"
            )


def windows_to_choose(rows_by_layer: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """List the windows that enough rows have before them.

    Args:
        rows_by_layer: int64 [R] of each layer, positions of all its rows.

    Returns:
        The first of `WINDOWS`, at least the shortest.
    """
    least = [torch.quantile(rows_R.double(), 1.0 - LEAST_ROWS, interpolation="lower") for rows_R in rows_by_layer]
    reach = int(min(least)) // BLOCK_TOKENS * BLOCK_TOKENS
    return tuple(window for window in WINDOWS if window <= max(reach, WINDOWS[0]))


def held_mass(mass_RHB: torch.Tensor, rows_R: torch.Tensor, windows: Sequence[int]) -> torch.Tensor:
    """Sum the mass that windows hold, over the rows that have the longest one before them.

    Args:
        mass_RHB: attention mass of rows on blocks, or its square.
        rows_R: int64, their positions.
        windows: tokens, rising.

    Returns:
        float64 [H, W]: of the own block, the blocks of the window before it and the first block.
    """
    own_R = rows_R // BLOCK_TOKENS
    whole_R = own_R * BLOCK_TOKENS >= windows[-1]
    mass_RHB, own_R = mass_RHB[whole_R].double(), own_R[whole_R]
    blocks_B = torch.arange(mass_RHB.shape[-1])
    held = []
    for window in windows:
        first_R = own_R - window // BLOCK_TOKENS
        near_RB = (blocks_B >= first_R[:, None]) & (blocks_B <= own_R[:, None]) | (blocks_B == 0)
        held.append(torch.einsum("rhb,rb->h", mass_RHB, near_RB.double()))
    return torch.stack(held, dim=-1)


def choose_windows(
    held_LHW: torch.Tensor, squared_LHW: torch.Tensor, num_kv_heads: int, windows: Sequence[int], choice: WindowChoice
) -> list[list[int]]:
    """Choose a window for every key-value head.

    Args:
        held_LHW: mass that windows hold, in one unit for all heads and layers.
        squared_LHW: the same of squared mass.
        num_kv_heads: G.
        windows: tokens, rising, W of them.
        choice: what they have to hold, and their mean.

    Returns:
        Windows in tokens, by layer and key-value head.
    """
    held_LGPW = held_LHW.unflatten(1, (num_kv_heads, -1))
    enough_LGW = (held_LGPW >= choice.least_share * held_LGPW[..., -1:]).all(2)
    places = enough_LGW.int().argmax(-1).flatten().tolist()
    squared = squared_LHW.unflatten(1, (num_kv_heads, -1)).sum(2).flatten(0, 1).tolist()
    places = _shrunk(places, squared, windows, choice.mean_tokens * len(places))
    chosen = [windows[place] for place in places]
    return [chosen[start : start + num_kv_heads] for start in range(0, len(chosen), num_kv_heads)]


def _shrunk(places: list[int], held: list[list[float]], windows: Sequence[int], most_tokens: int) -> list[int]:
    """Shorten windows until their sum is within `most_tokens`; places are indices of windows, by head."""

    def cheapest_step(head: int, place: int) -> tuple[float, int, int]:
        """What is lost for each token, the head, and the place it would have then."""
        lost = [
            ((held[head][place] - held[head][shorter]) / (windows[place] - windows[shorter]), head, shorter)
            for shorter in range(place)
        ]
        # Among equals the shortest step, so that no window is shorter than it has to be.
        return min(lost, key=lambda step: (step[0], -step[2]))

    places = list(places)
    tokens = sum(windows[place] for place in places)
    steps = [cheapest_step(head, place) for head, place in enumerate(places) if place]
    heapq.heapify(steps)
    while tokens > most_tokens and steps:
        _, head, shorter = heapq.heappop(steps)
        left = tokens - windows[places[head]]
        while shorter + 1 < places[head] and left + windows[shorter + 1] <= most_tokens:
            shorter += 1
        places[head], tokens = shorter, left + windows[shorter]
        if shorter:
            heapq.heappush(steps, cheapest_step(head, shorter))
    return places
