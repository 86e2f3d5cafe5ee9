"""`AttentionWish`: what the user decided about attention, and the patterns that leaves to the search; their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from dseek.core.attention_pattern import KINDS, MAX_TOP_BLOCKS, WINDOWS, AttentionPattern
from dseek.core.errors import ConfigError
from dseek.plan.head_facts import AUTO, HeadFacts

SEARCHED_WINDOWS = (256, 512, 1024, 2048)
SEARCHED_SHARES = (0.1, 0.05, 0.03, 0.02, 0.01)
"""Least shares of attention mass to choose among, where nobody asked for one or for a number of blocks."""
SEARCHED_TOP_BLOCKS = (4, 8, 16, 32)
MOST_BLOCKS = 64
"""Blocks that sixteen queries may open where a least share decides and nobody asked for another bound."""
DYNAMIC_WINDOW = 256
"""Window beside blocks that are selected by number, where nobody asked for another."""
ROW_WINDOW = 64
"""Window where a least share decides: what lies beyond it is found like anything else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionWish:
    """What the user decided about attention; None leaves it to the search."""

    kind: str | None = None
    """auto, dense, window or dynamic; None is what the other wishes are about, else auto where more than the usual loss
    of quality is accepted, and dense where it is not."""
    window_tokens: int | str | None = None
    """Window in tokens, or auto: each head's own, as `HeadFacts` has it. Alone it means the kind window."""
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
        if isinstance(self.window_tokens, str) and self.window_tokens != AUTO:
            raise ConfigError(
                f"a window of {self.window_tokens!r} tokens", needed="auto, or " + ", ".join(map(str, WINDOWS))
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

    @property
    def own_windows(self) -> bool:
        """Whether every head is to have its own window."""
        return self.window_tokens == AUTO

    @property
    def may_be_by_rows(self) -> bool:
        """Whether a pattern with a least share is among those to consider."""
        return any(pattern.min_share for pattern in self.patterns())

    def patterns(self) -> list[AttentionPattern]:
        """List the patterns to consider besides dense attention, before the heads' own windows and dense heads are set.

        Raises:
            ConfigError: a window or number of blocks that there is not.
        """
        kind = self.settled_kind
        asked = self.window_tokens if isinstance(self.window_tokens, int) else None
        found = []
        if kind in (None, "window"):
            windows = SEARCHED_WINDOWS if asked is None else (asked,)
            # The heads' own windows are one choice, whatever window stands for them here.
            windows = windows[:1] if self.own_windows else windows
            found += [AttentionPattern(kind="window", window_tokens=(window,)) for window in windows]
        if kind in (None, "dynamic"):
            # Means of the rest cost time and, with no bias learned for them, quality too.
            found += [
                AttentionPattern(
                    kind="dynamic",
                    window_tokens=(asked or (ROW_WINDOW if share else DYNAMIC_WINDOW),),
                    top_blocks=count,
                    far=bool(self.far),
                    min_share=share,
                )
                for count, share in self._budgets()
            ]
        return found

    def by_layer(self, num_layers: int, heads: HeadFacts) -> list[tuple[AttentionPattern, ...]]:
        """List what to consider besides dense attention, layer by layer.

        Args:
            num_layers: of the model.
            heads: what is known of its heads.

        Raises:
            ConfigError: the heads' own windows are asked for and not known.
        """
        return [heads.fitted(pattern, num_layers, own_windows=self.own_windows) for pattern in self.patterns()]

    def _budgets(self) -> list[tuple[int, float]]:
        """Numbers of blocks and least shares to consider."""
        if self.min_share is None and (self.top_blocks is not None or self.far):
            counts = SEARCHED_TOP_BLOCKS if self.top_blocks is None else (self.top_blocks,)
            return [(count, 0.0) for count in counts]
        most = MOST_BLOCKS if self.top_blocks is None else self.top_blocks
        return [(most, share) for share in (SEARCHED_SHARES if self.min_share is None else (self.min_share,))]

    def check_against(self, patterns: Sequence[AttentionPattern], num_kv_heads: int) -> None:
        """Make sure that decided patterns are what was wished for.

        Args:
            patterns: of all layers.
            num_kv_heads: key-value heads.

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
                and self._is_window_of(pattern, num_kv_heads)
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

    def _is_window_of(self, pattern: AttentionPattern, num_kv_heads: int) -> bool:
        """Whether a pattern's windows are what was wished for."""
        if self.own_windows:
            return len(pattern.window_tokens) == num_kv_heads
        return self.window_tokens is None or set(pattern.window_tokens) == {self.window_tokens}


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
        Such as `dense`, or `window 512 in 20 of 30 layers, dense in 10`. Where heads have windows of their own, all
        layers' are told together, with their mean: `windows 64 to 4096 (508 in the mean)`.
    """
    alike: dict[AttentionPattern, list[AttentionPattern]] = {}
    by_head = any(len(pattern.window_tokens) > 1 for pattern in patterns)
    for pattern in patterns:
        windows = WINDOWS[:1] if by_head and pattern.kind != "dense" else pattern.window_tokens
        key = dataclasses.replace(pattern, window_tokens=windows, dense_heads=(), share_factors=())
        alike.setdefault(key, []).append(pattern)
    groups = sorted(alike.values(), key=len, reverse=True)
    texts = [_alike_text(group) for group in groups]
    if len(groups) == 1:
        return texts[0]
    texts = [f"{text} in {len(group)}" for text, group in zip(texts, groups, strict=True)]
    return ", ".join([f"{texts[0]} of {len(patterns)} layers", *texts[1:]])


def _alike_text(patterns: Sequence[AttentionPattern]) -> str:
    """Name patterns that differ in their windows and dense heads at most."""
    windows = [window for pattern in patterns for window in pattern.window_tokens]
    if len(set(windows)) < 2:
        return pattern_text(patterns[0])
    text = pattern_text(dataclasses.replace(patterns[0], window_tokens=(min(windows), max(windows))))
    head, _, rest = text.partition(f"to {max(windows)}")
    return f"{head}to {max(windows)} ({sum(windows) / len(windows):.0f} in the mean){rest}"


def dense_heads_text(patterns: Sequence[AttentionPattern], num_kv_heads: int) -> str:
    """Say which share of the heads stays dense beside a selection, for people.

    Args:
        patterns: layer by layer.
        num_kv_heads: key-value heads of a layer.

    Returns:
        Such as `5 of 90 key-value heads stay dense (retrieval heads found by training)`, or nothing if none does.
    """
    count = sum(len(pattern.dense_heads) for pattern in patterns)
    if not count:
        return ""
    heads = len(patterns) * num_kv_heads
    verb = "stays" if count == 1 else "stay"
    return f"{count} of {heads} key-value heads {verb} dense (retrieval heads found by training)"
