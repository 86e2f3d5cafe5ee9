"""`AttentionWish`: what the user decided about attention, and the patterns that leaves to the search; their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dseek.core.attention_pattern import KINDS, MAX_TOP_BLOCKS, AttentionPattern
from dseek.core.errors import ConfigError

SEARCHED_WINDOWS = (256, 512, 1024, 2048)
SEARCHED_SHARES = (0.1, 0.05, 0.03, 0.02, 0.01)
"""Least shares of attention mass to choose among, where nobody asked for one or for a number of blocks."""
SEARCHED_TOP_BLOCKS = (4, 8, 16, 32)
MOST_BLOCKS = 64
"""Blocks that sixteen queries may open where a least share decides and nobody asked for another bound."""
DYNAMIC_WINDOW = 256
"""Window beside selected blocks, where nobody asked for another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionWish:
    """What the user decided about attention; None leaves it to the search."""

    kind: str | None = None
    """auto, dense, window or dynamic; None is what the other wishes are about, else auto where more than the usual loss
    of quality is accepted, and dense where it is not."""
    window_tokens: int | None = None
    """Window; alone it means the kind window."""
    top_blocks: int | None = None
    """Blocks to select; means the kind dynamic."""
    far: bool | None = None
    """Whether cells that stay closed count by their means; means the kind dynamic, None that they do not."""
    min_share: float | None = None
    """Least share of attention mass that opens a block; means the kind dynamic. None leaves it to the search, but where
    a number of blocks or means were asked for, it is none: a block's first query then chooses for all."""

    def __post_init__(self) -> None:
        """Check the values against each other.

        Raises:
            ConfigError: an unknown kind, or a wish that the kind has no use for.
        """
        if self.kind not in (None, "auto", *KINDS):
            raise ConfigError(f"attention is {self.kind!r}", needed="one of auto, " + ", ".join(KINDS))
        about_cells = self._is_about_cells
        if (self.kind == "dense" and (about_cells or self.window_tokens is not None)) or (
            self.kind == "window" and about_cells
        ):
            raise ConfigError(
                f"{self.kind} attention with a wish about {'selected blocks' if about_cells else 'the window'}",
                remedy="leave that out, or take attention dynamic",
            )
        if self.top_blocks is not None and not 1 <= self.top_blocks <= MAX_TOP_BLOCKS:
            raise ConfigError(
                f"a dynamic attention pattern that selects {self.top_blocks} blocks", needed=f"1 to {MAX_TOP_BLOCKS}"
            )
        self.patterns()  # refuses windows, numbers of blocks and shares that there are not

    @property
    def _is_about_cells(self) -> bool:
        return self.top_blocks is not None or self.far is not None or self.min_share is not None

    @property
    def settled_kind(self) -> str | None:
        """dense, window or dynamic where that is decided, else None."""
        if self.kind in KINDS:
            return self.kind
        if self._is_about_cells:
            return "dynamic"
        return None if self.window_tokens is None else "window"

    def patterns(self) -> list[AttentionPattern]:
        """List the patterns to consider besides dense attention.

        Raises:
            ConfigError: a window or number of blocks that there is not.
        """
        kind = self.settled_kind
        found = []
        if kind in (None, "window"):
            windows = SEARCHED_WINDOWS if self.window_tokens is None else (self.window_tokens,)
            found += [AttentionPattern(kind="window", window_tokens=(window,)) for window in windows]
        if kind in (None, "dynamic"):
            window = DYNAMIC_WINDOW if self.window_tokens is None else self.window_tokens
            # Means of the rest cost time and, with no bias learned for them, quality too.
            found += [
                AttentionPattern(
                    kind="dynamic", window_tokens=(window,), top_blocks=count, far=bool(self.far), min_share=share
                )
                for count, share in self._budgets()
            ]
        return found

    def _budgets(self) -> list[tuple[int, float]]:
        """Numbers of blocks and least shares to consider."""
        if self.min_share is None and (self.top_blocks is not None or self.far):
            counts = SEARCHED_TOP_BLOCKS if self.top_blocks is None else (self.top_blocks,)
            return [(count, 0.0) for count in counts]
        most = MOST_BLOCKS if self.top_blocks is None else self.top_blocks
        return [(most, share) for share in (SEARCHED_SHARES if self.min_share is None else (self.min_share,))]

    def check_against(self, patterns: Sequence[AttentionPattern]) -> None:
        """Make sure that decided patterns are what was wished for.

        Args:
            patterns: of all layers.

        Raises:
            ConfigError: they are something else.
        """
        kind = self.settled_kind
        sparse = {pattern for pattern in patterns if pattern.kind != "dense"}
        agrees = kind is None or (
            not sparse
            if kind == "dense"
            else bool(sparse)
            and all(
                pattern.kind == kind
                and (self.window_tokens is None or set(pattern.window_tokens) == {self.window_tokens})
                and self.top_blocks in (None, pattern.top_blocks)
                and self.far in (None, pattern.far)
                and self.min_share in (None, pattern.min_share)
                for pattern in sparse
            )
        )
        if not agrees:
            raise ConfigError(
                f"the attention asked for contradicts the plan, which says {patterns_text(patterns)}",
                remedy="leave out the attention's options or the plan",
            )


def pattern_text(pattern: AttentionPattern) -> str:
    """Name a pattern for people.

    Args:
        pattern: the pattern.

    Returns:
        Such as `window 256 and 8 blocks, means of the rest`.
    """
    if pattern.kind == "dense":
        return "dense"
    windows = sorted(set(pattern.window_tokens))
    text = f"window {windows[0]}" if len(windows) == 1 else f"windows {windows[0]} to {windows[-1]}"
    if pattern.kind == "dynamic":
        blocks = f"{pattern.top_blocks} block{'' if pattern.top_blocks == 1 else 's'}"
        text += f" and shares from {pattern.min_share:g}, up to {blocks}" if pattern.min_share else f" and {blocks}"
    return text + (", means of the rest" if pattern.far else "")


def patterns_text(patterns: Sequence[AttentionPattern]) -> str:
    """Name the patterns of all layers for people.

    Args:
        patterns: layer by layer.

    Returns:
        Such as `dense`, or `window 512 in 20 of 30 layers, dense in 10`.
    """
    counts = Counter(patterns).most_common()
    if len(counts) == 1:
        return pattern_text(counts[0][0])
    texts = [f"{pattern_text(pattern)} in {count}" for pattern, count in counts]
    return ", ".join([f"{texts[0]} of {len(patterns)} layers", *texts[1:]])
