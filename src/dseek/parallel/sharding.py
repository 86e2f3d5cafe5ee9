"""How a sequence is cut: into chunks that are computed one after the other, and into blocks that ranks own.

Plain data and no PyTorch. What a block costs is the caller's knowledge (`strategy.py` has a model of it).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dseek.core.errors import ConfigError

BLOCK_TOKENS = 64
"""Tokens of a block: the page of the cache and the finest cell of the pyramid."""

Layout = Literal["contiguous", "zigzag"]
"""contiguous: each rank owns one run of blocks; zigzag: an early run and its mirror image, a late one."""


def dynamic_sharding(
    sequence_length: int, max_chunk_size: int, *, block_tokens: int = BLOCK_TOKENS
) -> tuple[range, ...]:
    """Cut a sequence into the fewest balanced chunks that a maximum allows.

    Every chunk starts on a block boundary, and the chunks' sizes differ by at most one block. The maximum is a matter
    of memory and comes before alignment: where it is smaller than a block, chunks start anywhere and differ by at most
    one token.

    Args:
        sequence_length: tokens, at least 1.
        max_chunk_size: tokens that no chunk exceeds, at least 1.
        block_tokens: tokens of a block.

    Returns:
        The positions of each chunk, in order; together they are 0 to sequence_length - 1, and none is empty.

    Raises:
        ConfigError: a length, maximum or block below 1.
    """
    for what, value in (
        ("sequence length", sequence_length),
        ("largest chunk", max_chunk_size),
        ("block", block_tokens),
    ):
        if value < 1:
            raise ConfigError(f"the {what} is {value} tokens", needed="at least 1")
    unit = block_tokens if max_chunk_size >= block_tokens else 1
    most = max_chunk_size // unit * unit
    num_chunks = 1 + max(0, -(-(sequence_length - max_chunk_size) // most))

    # The last chunk is the one that may end inside a block, so the larger chunks come last: in tokens it then lies
    # between the others.
    num_units = -(-sequence_length // unit)
    smaller, num_larger = divmod(num_units, num_chunks)
    sizes = [smaller * unit] * (num_chunks - num_larger) + [(smaller + 1) * unit] * num_larger
    cuts = [0, *itertools.accumulate(sizes)]
    cuts[-1] = sequence_length
    return tuple(range(start, stop) for start, stop in itertools.pairwise(cuts))


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockAssignment:
    """Which blocks of a sequence each rank owns: their queries, keys and values."""

    blocks: tuple[tuple[int, ...], ...]
    """Of each rank, ascending; a rank may own nothing. Together they are 0 to num_blocks - 1, each once."""

    def __post_init__(self) -> None:
        """Check that every block has one owner.

        Raises:
            ConfigError: no rank, a block missing or twice, or a rank's blocks out of order.
        """
        if not self.blocks:
            raise ConfigError("blocks are assigned to no rank", needed="at least one rank")
        for rank, owned in enumerate(self.blocks):
            if any(a >= b for a, b in itertools.pairwise(owned)):
                raise ConfigError(f"the blocks of rank {rank} are out of order", needed="ascending blocks")
        every = sorted(itertools.chain.from_iterable(self.blocks))
        if every != list(range(len(every))):
            raise ConfigError(
                "blocks are missing or have two owners", needed="each of 0 to the number of blocks - 1 once"
            )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.blocks)

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole sequence."""
        return sum(len(owned) for owned in self.blocks)

    def owners(self) -> list[int]:
        """List the owning rank of each block."""
        owner = [0] * self.num_blocks
        for rank, owned in enumerate(self.blocks):
            for block in owned:
                owner[block] = rank
        return owner

    def loads(self, cost: Sequence[float]) -> list[float]:
        """Add up what each rank has to do.

        Args:
            cost: of each block, in any unit.

        Returns:
            The cost of each rank.
        """
        return [sum(cost[block] for block in owned) for owned in self.blocks]

    def followed_by(self, other: BlockAssignment) -> BlockAssignment:
        """Append the blocks of the next chunk of the same sequence.

        Args:
            other: the chunk's own assignment, its blocks counted from 0, over as many ranks.

        Returns:
            The assignment of both.

        Raises:
            ConfigError: another number of ranks.
        """
        if other.world_size != self.world_size:
            raise ConfigError(f"a chunk is assigned to {other.world_size} ranks", needed=f"{self.world_size}")
        start = self.num_blocks
        return BlockAssignment(
            blocks=tuple(
                (*mine, *(start + block for block in more))
                for mine, more in zip(self.blocks, other.blocks, strict=True)
            )
        )


def balanced_assignment(
    num_blocks: int, world_size: int, cost: Sequence[float] | None = None, *, layout: Layout = "contiguous"
) -> BlockAssignment:
    """Share the blocks out so that every rank has about the same to do.

    Contiguous runs are cut by cost: no rank exceeds the mean by more than the dearest block. Zigzag cuts 2 * world_size
    runs of equal length and gives rank r the r-th and the r-th from the end: where the cost rises evenly, as that of
    dense causal attention does, ranks have equal work *and* equal numbers of tokens.

    Args:
        num_blocks: blocks of the sequence, at least 1.
        world_size: ranks, at least 1.
        cost: of each block, not negative, in any unit; None is the same for all. Zigzag does not look at it.
        layout: contiguous or zigzag.

    Returns:
        The owner of each block.

    Raises:
        ConfigError: counts below 1, an unknown layout, or costs that are negative, not finite or of another number.
    """
    if num_blocks < 1 or world_size < 1:
        raise ConfigError(f"{num_blocks} blocks are to be shared by {world_size} ranks", needed="at least 1 of each")
    if cost is not None and len(cost) != num_blocks:
        raise ConfigError(f"{len(cost)} costs were given", needed=f"{num_blocks}, one a block")
    if cost is not None and not all(0.0 <= value < float("inf") for value in cost):
        raise ConfigError("a block's cost is negative or not finite", needed="a number from 0")
    if layout == "zigzag":
        return _zigzag(num_blocks, world_size)
    if layout == "contiguous":
        return _contiguous([1.0] * num_blocks if cost is None or not any(cost) else cost, world_size)
    raise ConfigError(f"the layout is {layout!r}", needed="contiguous or zigzag")


def _contiguous(cost: Sequence[float], world_size: int) -> BlockAssignment:
    """Cut where the running cost comes nearest to each rank's share."""
    running = [0.0, *itertools.accumulate(cost)]
    cuts = [0]
    for rank in range(1, world_size):
        share = running[-1] * rank / world_size
        cut = cuts[-1]
        while cut < len(cost) and abs(running[cut + 1] - share) <= abs(running[cut] - share):
            cut += 1
        cuts.append(cut)
    cuts.append(len(cost))
    return BlockAssignment(blocks=tuple(tuple(range(start, stop)) for start, stop in itertools.pairwise(cuts)))


def _zigzag(num_blocks: int, world_size: int) -> BlockAssignment:
    """Fold a strip of 2 * world_size runs in the middle."""
    cuts = [num_blocks * run // (2 * world_size) for run in range(2 * world_size + 1)]
    runs = [range(start, stop) for start, stop in itertools.pairwise(cuts)]
    return BlockAssignment(blocks=tuple((*runs[rank], *runs[-1 - rank]) for rank in range(world_size)))
