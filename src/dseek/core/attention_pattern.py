"""`AttentionPattern`: what the heads of a layer attend to, as plain data that the plan writes and the kernels follow.

Tokens come in blocks of 64, blocks in cells of 1, 8, 64, ... blocks. A query always sees its own block, the window
before it and the very first block; a dynamic pattern adds the cells that score best, found by a descent from the
largest cells down, and may let the cells that stay closed count by their means.
"""

from __future__ import annotations

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

MAX_TOP_BLOCKS = 4096


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
    """Whether cells that stay closed count by their mean key and value; only for dynamic."""

    def __post_init__(self) -> None:
        """Check the values against each other.

        Raises:
            ConfigError: a value out of its range, or one that the kind has no use for.
        """
        if self.kind not in KINDS:
            raise ConfigError(f"the attention pattern is {self.kind!r}", needed="one of " + ", ".join(KINDS))
        for window in self.window_tokens:
            if window not in WINDOWS:
                raise ConfigError(
                    f"an attention window of {window} tokens", needed="one of " + ", ".join(map(str, WINDOWS))
                )
        if self.kind == "dense" and self.window_tokens:
            raise ConfigError("a dense attention pattern with a window", remedy="take the pattern window or dynamic")
        if self.kind != "dense" and not self.window_tokens:
            raise ConfigError(f"a {self.kind} attention pattern without a window", needed="a window for every head")
        least = 1 if self.kind == "dynamic" else 0
        most = MAX_TOP_BLOCKS if self.kind == "dynamic" else 0
        if not least <= self.top_blocks <= most:
            raise ConfigError(
                f"a {self.kind} attention pattern that selects {self.top_blocks} blocks", needed=f"{least} to {most}"
            )
        if self.far and self.kind != "dynamic":
            raise ConfigError(f"a {self.kind} attention pattern with far cells", remedy="take the pattern dynamic")

    def near_blocks(self, num_kv_heads: int) -> tuple[int, ...]:
        """Return every head's window in blocks.

        Args:
            num_kv_heads: heads that need one.

        Raises:
            ConfigError: the pattern has windows for another number of heads.
        """
        windows = self.window_tokens * num_kv_heads if len(self.window_tokens) == 1 else self.window_tokens
        if len(windows) != num_kv_heads:
            raise ConfigError(
                f"an attention pattern with {len(self.window_tokens)} windows", needed=f"1 or {num_kv_heads}"
            )
        return tuple(window // BLOCK_TOKENS for window in windows)

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
        blocks = sum(min(before, near + 1 + self.top_blocks) for near in self.near_blocks(num_kv_heads)) / num_kv_heads
        return own + blocks * BLOCK_TOKENS


DENSE = AttentionPattern()
"""Attention to everything before."""


def top_level(num_tokens: int) -> int:
    """Return the level of the largest cells of a context: 2 (4,096 tokens) up to 131,072, one more for each 8x beyond.

    Args:
        num_tokens: positions that the context may hold.
    """
    level, reach = 2, 2**17
    while reach < num_tokens and level < 5:
        level, reach = level + 1, reach * RADIX
    return level
