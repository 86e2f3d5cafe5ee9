"""`AttentionPattern`: what the heads of a layer attend to, as plain data that the plan writes and the kernels follow.

Tokens come in blocks of 64, blocks in cells of 1, 8, 64, ... blocks. A query always sees its own block, the window
before it and the very first block; a dynamic pattern adds the cells that score best, found by a descent from the
largest cells down, and may let the cells that stay closed count by their means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dseek.core.errors import ConfigError

PatternKind = Literal["dense", "window", "dynamic"]
KINDS: tuple[PatternKind, ...] = ("dense", "window", "dynamic")

BLOCK_TOKENS = 64
"""Tokens of a block, which is a page of the cache."""

RADIX = 8
"""Cells of a level that make one of the next."""

WINDOWS = (64, 128, 256, 512, 1024, 2048, 4096)
"""Windows a key-value head may have, in tokens before the query's own block."""

LOWEST_TOP_LEVEL = 2
"""Top level of short sequences: with the tokens themselves, four resolutions (1, 64, 512 and 4096 tokens)."""

MAX_TOP_CELLS = 32
"""Complete cells of the top level that a descent may start from; one more and the top level is the next one."""

MAX_TOP_BLOCKS = 4096

OPENED_BLOCKS = {True: (0.29, -0.97), False: (1.46, -0.71)}
"""Blocks that sixteen queries open in the mean, with a gate and without: a factor and the power of the least share.

Beside the window and the first block, in heads that do not see everything. Measured on source code, 8,192 tokens, a
window of 64, shares from 0.01 to 0.1 (`benchmarks.experiments.row_patterns`): within 16 % of what was opened there,
with a gate of SmolLM2 that had one least share for all heads.
"""

EVERY_BLOCK = 2**20
"""Window in blocks of a head that sees everything: more than any sequence has, and what the kernels take at most."""

MAX_SHARE_FACTOR = 1024.0
"""On a head's least share; a share of 1 and more opens nothing."""

MAX_FLAT_BLOCKS = 256
"""Cells that a selection by rows may start from; one more and it starts a level higher."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPattern:
    """How a layer attends."""

    kind: PatternKind = "dense"
    """dense: to everything before; window: to the first block and the window; dynamic: to the best cells too."""
    window_tokens: tuple[int, ...] = ()
    """Window of each key-value head, or one for all; empty for dense."""
    top_blocks: int = 0
    """Cells opened at every level, and so blocks selected; only for dynamic."""
    far: bool = False
    """Whether cells that stay closed count by their mean key and value; only for dynamic, without a least share."""
    min_share: float = 0.0
    """Where above 0, every query opens the cells that hold this share of some head's attention mass, and sixteen
    neighbouring queries up to `top_blocks` of them at each level; otherwise a block's first query opens the best
    `top_blocks` for all 64. Only for dynamic."""
    gate: bool = False
    """Whether the model's trained gate expects the shares, rather than the mean keys; only with a least share."""
    dense_heads: tuple[int, ...] = ()
    """Key-value heads that see everything all the same, rising; only with a least share."""
    share_factors: tuple[float, ...] = ()
    """By how much each key-value head's least share is larger; empty where all have the same. Only with a gate."""

    def __post_init__(self) -> None:
        """Check the values against each other.

        Raises:
            ConfigError: a value out of its range, or one that the kind has no use for.
        """
        if self.kind not in KINDS:
            raise ConfigError(f"the attention pattern is {self.kind!r}", needed="one of " + ", ".join(KINDS))
        for window in self.window_tokens:
            check_window(window)
        if self.kind == "dense" and self.window_tokens:
            raise ConfigError("a dense attention pattern with a window", remedy="take the pattern window or dynamic")
        if self.kind != "dense" and not self.window_tokens:
            raise ConfigError(f"a {self.kind} attention pattern without a window", needed="a window for every head")
        most = MAX_TOP_BLOCKS if self.kind == "dynamic" else 0
        if not 0 <= self.top_blocks <= most:
            raise ConfigError(
                f"a {self.kind} attention pattern that selects {self.top_blocks} blocks", needed=f"0 to {most}"
            )
        if self.far and self.kind != "dynamic":
            raise ConfigError(f"a {self.kind} attention pattern with far cells", remedy="take the pattern dynamic")
        if not 0.0 <= self.min_share < 1.0:
            raise ConfigError(f"a least share of {self.min_share}", needed="at least 0 and below 1")
        if self.min_share and self.kind == "dynamic" and not self.top_blocks:
            raise ConfigError("a least share with no blocks to select", needed=f"1 to {MAX_TOP_BLOCKS} blocks")
        if self.min_share and (self.kind != "dynamic" or self.far):
            raise ConfigError(
                "a least share without a dynamic attention pattern, or with far cells",
                remedy="take the pattern dynamic without far cells",
            )
        if (self.gate or self.dense_heads) and not self.min_share:
            raise ConfigError(
                f"a {self.kind} attention pattern with a gate or dense heads, but without a least share",
                remedy="take the pattern dynamic with a least share",
            )
        if self.share_factors and not self.gate:
            raise ConfigError("an attention pattern with factors on the least share, but without a gate")
        if not all(0.0 < factor <= MAX_SHARE_FACTOR for factor in self.share_factors):
            raise ConfigError(
                f"the factors {list(self.share_factors)} on the least share", needed=f"above 0 to {MAX_SHARE_FACTOR:g}"
            )
        if list(self.dense_heads) != sorted({head for head in self.dense_heads if head >= 0}):
            raise ConfigError(f"the dense heads {list(self.dense_heads)}", needed="indices from 0 on, rising")

    def near_blocks(self, num_kv_heads: int) -> tuple[int, ...]:
        """Return every head's window in blocks, `EVERY_BLOCK` for heads that see everything.

        Args:
            num_kv_heads: heads that need one.

        Raises:
            ConfigError: the pattern is for another number of heads.
        """
        windows = self.window_tokens * num_kv_heads if len(self.window_tokens) == 1 else self.window_tokens
        if len(windows) != num_kv_heads:
            raise ConfigError(
                f"an attention pattern with {len(self.window_tokens)} windows", needed=f"1 or {num_kv_heads}"
            )
        if self.dense_heads and self.dense_heads[-1] >= num_kv_heads:
            raise ConfigError(
                f"an attention pattern with a dense head {self.dense_heads[-1]}", needed=f"fewer than {num_kv_heads}"
            )
        return tuple(
            EVERY_BLOCK if head in self.dense_heads else window // BLOCK_TOKENS for head, window in enumerate(windows)
        )

    def min_shares(self, num_kv_heads: int) -> tuple[float, ...]:
        """Return every head's least share; 0 in all of them where a block's first query chooses.

        Args:
            num_kv_heads: heads that need one.

        Raises:
            ConfigError: the pattern is for another number of heads.
        """
        factors = self.share_factors or (1.0,) * num_kv_heads
        if len(factors) != num_kv_heads:
            raise ConfigError(
                f"an attention pattern with {len(factors)} factors on the least share", needed=f"{num_kv_heads}"
            )
        return tuple(self.min_share * factor for factor in factors)

    @property
    def expected_blocks(self) -> float:
        """Blocks that are opened beside the window and the first one: all of `top_blocks`, or what shares let expect.

        By rows, a strip's queries together, in the mean over heads that do not see everything (`OPENED_BLOCKS`).
        """
        if not self.min_share:
            return float(self.top_blocks)
        factor, power = OPENED_BLOCKS[self.gate]
        shares = [
            self.min_share * larger
            for head, larger in enumerate(self.share_factors or (1.0,))
            if head not in self.dense_heads or not self.share_factors
        ]
        opened = [min(float(self.top_blocks), factor * math.pow(share, power)) for share in shares if share < 1.0]
        return sum(opened) / max(len(shares), 1)

    def visible_tokens(self, context_tokens: int, num_kv_heads: int) -> float:
        """Return how many exact tokens the newest query of a context sees, in the mean over heads.

        Args:
            context_tokens: positions so far, the query's own included.
            num_kv_heads: heads.
        """
        if self.kind == "dense":
            return float(context_tokens)
        own = (context_tokens - 1) % BLOCK_TOKENS + 1
        before = (context_tokens - own) // BLOCK_TOKENS
        opened = self.expected_blocks
        blocks = sum(min(before, near + 1 + opened) for near in self.near_blocks(num_kv_heads)) / num_kv_heads
        return own + blocks * BLOCK_TOKENS


DENSE = AttentionPattern()
"""Attention to everything before."""


def check_window(window_tokens: int) -> None:
    """Refuse a window that is none of `WINDOWS`.

    Args:
        window_tokens: tokens.

    Raises:
        ConfigError: another value.
    """
    if isinstance(window_tokens, int) and not isinstance(window_tokens, bool) and window_tokens in WINDOWS:
        return
    nearest = None
    if isinstance(window_tokens, int):
        nearest = f"use {min(WINDOWS, key=lambda size: abs(size - window_tokens))}, the nearest one"
    raise ConfigError(
        f"a window of {window_tokens!r} tokens", needed="one of " + ", ".join(map(str, WINDOWS)), remedy=nearest
    )


def cell_blocks(level: int) -> int:
    """Blocks in a cell.

    Args:
        level: level of the cell, 0 or more.

    Returns:
        1, 8, 64, ...
    """
    return int(RADIX**level)


def cell_tokens(level: int) -> int:
    """Tokens in a cell.

    Args:
        level: level of the cell, 0 or more.

    Returns:
        64, 512, 4096, ...
    """
    return BLOCK_TOKENS * cell_blocks(level)


def top_level(num_tokens: int) -> int:
    """Level that a descent over the first tokens of a sequence starts from.

    It depends on what lies before the query's block alone, never on the length of the sequence, so that a sequence that
    grows does not change what earlier queries attended to.

    Args:
        num_tokens: tokens in the complete blocks before the query's block.

    Returns:
        2 up to 131,072 tokens, 3 up to 1,048,576, and so on: the lowest level from 2 on with at most 32 complete cells.
    """
    level = LOWEST_TOP_LEVEL
    while num_tokens > MAX_TOP_CELLS * cell_tokens(level):
        level += 1
    return level


def row_top_level(num_blocks: int) -> int:
    """Level that a selection by rows starts from.

    Args:
        num_blocks: complete blocks before the query's block.

    Returns:
        0 up to 256 blocks (16,384 tokens), 1 up to 2048, and so on.
    """
    level = 0
    while num_blocks > MAX_FLAT_BLOCKS * cell_blocks(level):
        level += 1
    return level


def num_levels(num_tokens: int) -> int:
    """Levels of cells that a sequence needs, the tokens themselves not counted.

    Args:
        num_tokens: length of the sequence.

    Returns:
        `top_level(num_tokens) + 1`: 3 up to 131,072 tokens.
    """
    return top_level(num_tokens) + 1


def start_cells(num_blocks: int, highest: int) -> list[tuple[int, int]]:
    """Tile the first blocks of a sequence with complete cells, from the left, always the largest that fits.

    Args:
        num_blocks: blocks to tile.
        highest: level of the largest cells to use.

    Returns:
        (level, index) of each cell, from left to right; levels never rise.
    """
    cells: list[tuple[int, int]] = []
    tiled = 0
    for level in range(highest, -1, -1):
        width = cell_blocks(level)
        first, past = tiled // width, num_blocks // width
        cells += [(level, index) for index in range(first, past)]
        tiled = past * width
    return cells
