"""Which rank gets which blocks: the predicted time of each layout, and the choice between them.

A layer on several ranks has three phases that wait for each other: what is done for each token (linear layers), the
exchange of keys and values, and attention. A rank that is early in one waits, so the time is the sum of the *slowest*
rank's time in each. That is why dense causal attention takes the zigzag layout (a contiguous one can balance attention
or tokens, never both), while windows and dynamic patterns, whose cost hardly grows with the position, stay contiguous
and fetch fewer blocks. Overlap of the exchange with attention is not modelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from dseek.core.errors import ConfigError
from dseek.parallel.sharding import BLOCK_TOKENS, BlockAssignment, Layout, balanced_assignment

ShardStrategy = Literal["contiguous", "zigzag", "auto"]
"""A layout, or auto: the one with the lower predicted time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """The connection of a rank to the others."""

    latency_s: float
    """Time of a message without content."""
    gbs: float
    """10^9 bytes a second that a rank can receive."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a negative latency, or no bandwidth.
        """
        if not (self.latency_s >= 0.0 and self.gbs > 0.0):
            raise ConfigError(
                f"the link has {self.latency_s} s latency and {self.gbs} GB/s",
                needed="a latency from 0 and a bandwidth",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionWork:
    """What one layer costs on a sequence, by block."""

    num_blocks: int
    """Blocks of the sequence."""
    window_blocks: int | None = None
    """Blocks before its own that a query sees besides block 0; None is all of them: dense."""
    top_blocks: int = 0
    """Blocks beyond the window that are selected for a query block (0 with a plain window)."""
    block_s: float
    """Seconds that a block's tokens take outside of attention."""
    pair_s: float
    """Seconds of attention of one query block to one key block, all heads."""
    block_bytes: int
    """Keys and values of one block."""
    first_block: int = 0
    """Place of the first block in its sequence; the blocks before it are with every rank already."""
    everywhere: bool = False
    """Whether every rank receives all blocks, in messages of equal length, and not only those that it attends to."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: no block, or a negative value.
        """
        if self.num_blocks < 1:
            raise ConfigError(f"the sequence has {self.num_blocks} blocks", needed="at least 1")
        counts = (self.window_blocks or 0, self.top_blocks, self.first_block, self.block_bytes)
        if min(*counts, self.block_s, self.pair_s) < 0:
            raise ConfigError("a count, time or size of the attention's work is negative", needed="numbers from 0")
        if self.first_block and not self.everywhere:
            raise ConfigError(
                f"the work starts at block {self.first_block}", needed="0 where ranks receive only what they attend to"
            )

    def pairs(self) -> list[float]:
        """Count, for each query block, the key blocks it attends to; its own counts half, since half is masked."""
        blocks = range(self.first_block, self.first_block + self.num_blocks)
        return [self._num_near(block) + self._num_selected(block) + 0.5 for block in blocks]

    def received_blocks(self, assignment: BlockAssignment, rank: int) -> float:
        """Count the key and value blocks that a rank has to receive.

        Args:
            assignment: the owners.
            rank: whose messages are counted.

        Returns:
            Blocks: exact for dense and window; with selected blocks an upper bound, no two query blocks sharing one.
            The cells that a dynamic pattern gathers are in it, as 1/64 of a block each.
        """
        owned = assignment.blocks[rank]
        if self.everywhere:
            return float((assignment.world_size - 1) * max(map(len, assignment.blocks)))
        if not owned:
            return 0.0
        if self.window_blocks is None:
            return float(owned[-1] + 1 - len(owned))
        near = set().union(*map(self._near, owned)) - set(owned)
        if self.top_blocks == 0:
            return float(len(near))
        selected = sum(map(self._num_selected, owned))
        unseen = owned[-1] + 1 - len(owned) - len(near)
        return len(near) + min(selected, unseen) + (self.num_blocks - len(owned)) / BLOCK_TOKENS

    def _near(self, block: int) -> set[int]:
        """Blocks before a block that the window and block 0 give it."""
        assert self.window_blocks is not None
        return {0, *range(max(0, block - self.window_blocks), block)} if block else set()

    def _num_near(self, block: int) -> int:
        if self.window_blocks is None or block <= self.window_blocks:
            return block
        return self.window_blocks + 1

    def _num_selected(self, block: int) -> int:
        return min(self.top_blocks, block - self._num_near(block))


def predict_seconds(work: AttentionWork, assignment: BlockAssignment, link: Link | None = None) -> float:
    """Predict the time of one layer.

    Args:
        work: what the layer costs.
        assignment: the owners.
        link: between the ranks; None leaves messages out of the account.

    Returns:
        Seconds: the slowest rank's tokens, messages and attention, one after the other.
    """
    num_tokens = max(map(len, assignment.blocks))
    seconds = num_tokens * work.block_s + max(assignment.loads(work.pairs())) * work.pair_s
    if link is not None and assignment.world_size > 1:
        received = max(work.received_blocks(assignment, rank) for rank in range(assignment.world_size))
        seconds += received * work.block_bytes / (link.gbs * 1e9) + (assignment.world_size - 1) * link.latency_s
    return seconds


def choose_strategy(work: AttentionWork, world_size: int, link: Link | None = None) -> Layout:
    """Choose the layout with the lower predicted time.

    Args:
        work: what a layer costs.
        world_size: ranks.
        link: between the ranks; None leaves messages out of the account.

    Returns:
        zigzag where it is predicted to be faster, else contiguous.

    Raises:
        ConfigError: no rank.
    """
    contiguous, zigzag = (
        predict_seconds(work, assign_blocks(work, world_size, layout), link) for layout in get_args(Layout)
    )
    return "zigzag" if zigzag < contiguous else "contiguous"


def assign_blocks(
    work: AttentionWork, world_size: int, strategy: ShardStrategy = "auto", link: Link | None = None
) -> BlockAssignment:
    """Share out the blocks of a sequence.

    Args:
        work: what a layer costs. Every rank must be given the same, and so gets the same result.
        world_size: ranks.
        strategy: contiguous, zigzag, or auto to have `choose_strategy` decide.
        link: between the ranks; None leaves messages out of the account.

    Returns:
        The owners.

    Raises:
        ConfigError: no rank, or an unknown strategy.
    """
    check_strategy(strategy)
    layout = choose_strategy(work, world_size, link) if strategy == "auto" else strategy
    if layout == "zigzag":
        return balanced_assignment(work.num_blocks, world_size, layout=layout)
    # Runs of equal tokens and runs of equal attention balance one phase each, runs of equal sums both a little.
    pairs = work.pairs()
    sums = [work.block_s + work.pair_s * count for count in pairs]
    cuts = (balanced_assignment(work.num_blocks, world_size, cost) for cost in (None, sums, pairs))
    return min(cuts, key=lambda cut: predict_seconds(work, cut, link))


def compare_assignments(
    layers: Mapping[AttentionWork, int], world_size: int, strategy: ShardStrategy = "auto", link: Link | None = None
) -> list[tuple[float, BlockAssignment]]:
    """Compare the ways to share out the blocks of a sequence where layers differ in what they attend to.

    Args:
        layers: how many layers do which work; of the same blocks, at least one.
        world_size: ranks.
        strategy: contiguous, zigzag, or auto for both.
        link: between the ranks; None leaves messages out of the account.

    Returns:
        Predicted seconds of all layers, and the owners; the fastest first, of equally fast ones the contiguous.

    Raises:
        ConfigError: no rank, or an unknown strategy.
    """
    check_strategy(strategy)
    num_blocks = next(iter(layers)).num_blocks
    candidates = []
    if strategy != "zigzag":
        candidates += [assign_blocks(work, world_size, "contiguous", link) for work in layers]
        candidates.append(balanced_assignment(num_blocks, world_size))
    if strategy != "contiguous":
        candidates.append(balanced_assignment(num_blocks, world_size, layout="zigzag"))
    timed = [
        (sum(count * predict_seconds(work, owners, link) for work, count in layers.items()), owners)
        for owners in candidates
    ]
    return sorted(timed, key=lambda entry: entry[0])


def check_strategy(strategy: str) -> None:
    """Refuse what is no strategy.

    Args:
        strategy: what was asked for.

    Raises:
        ConfigError: it is none of `ShardStrategy`.
    """
    if strategy not in get_args(ShardStrategy):
        raise ConfigError(f"the shard strategy is {strategy!r}", needed="one of " + ", ".join(get_args(ShardStrategy)))
