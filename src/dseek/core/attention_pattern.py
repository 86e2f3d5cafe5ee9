"""`AttentionPattern`: what a query attends to, in plain numbers, and the pyramid's arithmetic that goes with it.

The past of a sequence is a pyramid of cells: at level 0 a cell is a block of 64 tokens (a page of the cache), at each
level above it is eight cells of the one below. A cell is named by its level and its index from the left: it spans the
tokens from `index * cell_tokens(level)` to just before `(index + 1) * cell_tokens(level)`. The planner, the
references and the native kernels all read these definitions; what a pattern means for the output is said in
`dseek.ops.attention.dynamic_reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dseek.core.errors import ConfigError

BLOCK_TOKENS = 64
"""Tokens of a block, the pyramid's level 0: a page of the cache, and the queries that share a selection."""
RADIX = 8
"""Cells of one level in a cell of the next."""
WINDOWS = (64, 128, 256, 512, 1024, 2048, 4096)
"""Tokens before a query's own block that a window may hold."""
LOWEST_TOP_LEVEL = 2
"""Top level of short sequences: with the tokens themselves, four resolutions (1, 64, 512 and 4096 tokens)."""
MAX_TOP_CELLS = 32
"""Complete cells of the top level that a descent may start from; one more and the top level is the next one."""

Kind = Literal["dense", "window", "dynamic"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPattern:
    """What each query attends to besides its own block, which it always sees up to itself.

    Raises:
        ConfigError: a value outside of what its field says.
    """

    kind: Kind = "dense"
    """dense: everything before it. window: the window and block 0. dynamic: these, the blocks that the descent selects,
    and a summary of the rest. Under dense the other fields have no meaning, under window only `window_tokens` has."""
    window_tokens: int = 512
    """Tokens in the whole blocks before the query's own that are always seen; one of `WINDOWS`."""
    top_blocks: int = 16
    """Cells opened at every level of the descent, K: at most so many blocks are selected. With K at least the number of
    blocks nothing is left to be summarised, and the result is that of dense."""
    far: bool = True
    """Cells that the descent saw and did not open count through their mean key and mean value; else not at all."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"attention kind {self.kind!r}", needed="one of " + ", ".join(get_args(Kind)))
        check_window(self.window_tokens)
        if isinstance(self.top_blocks, bool) or not isinstance(self.top_blocks, int) or self.top_blocks < 0:
            raise ConfigError(
                f"top_blocks is {self.top_blocks!r}",
                needed="a whole number of blocks, 0 or more",
                remedy="use 0 to select none, or kind 'dense' to attend to all",
            )
        if not isinstance(self.far, bool):
            raise ConfigError(f"far is {self.far!r}", needed="true or false")


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
