"""How ranks share the new rows of a sequence, decided by what the layers of the plan cost."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dseek.engine.batch_parts import Blocks, is_even_enough
from dseek.parallel.sharding import BLOCK_TOKENS, BlockAssignment, balanced_assignment
from dseek.parallel.strategy import AttentionWork, Link, ShardStrategy, compare_assignments, predict_seconds

if TYPE_CHECKING:
    from dseek.core.shape import ModelShape
    from dseek.plan.plan import Plan

BLOCKS_PER_RANK = 2
"""A sequence with fewer new blocks a rank is not shared out."""


@dataclass(frozen=True, slots=True)
class LayerWork:
    """What a layer costs on any piece of a sequence."""

    work: AttentionWork
    """The costs; of one block."""

    def __call__(self, first_block: int, num_blocks: int) -> AttentionWork:
        """Return the work on a piece.

        Args:
            first_block: place of its first block in the sequence.
            num_blocks: its blocks.
        """
        return dataclasses.replace(self.work, first_block=first_block, num_blocks=num_blocks)


def layer_works(plan: Plan, *, block_bytes: int) -> Counter[LayerWork]:
    """Derive what layers cost from the time that the plan predicts for its typical prompt.

    The predicted time is that of this machine's measured rates; it is shared out to linear layers and to attention by
    their numbers of multiplications, as if both ran at one rate.

    Args:
        plan: the plan, with its prediction.
        block_bytes: keys and values of 64 positions in one layer.

    Returns:
        How many layers have each work.
    """
    shape = plan.shape
    prompt_tokens, _ = plan.objective.request(plan.context_tokens)
    prompt_blocks = -(-prompt_tokens // BLOCK_TOKENS)
    linear = BLOCK_TOKENS * _weights(shape)
    pair = 2 * BLOCK_TOKENS**2 * shape.num_heads * shape.head_dim
    layers = [
        AttentionWork(
            num_blocks=prompt_blocks,
            block_s=float(linear),
            pair_s=float(pair),
            block_bytes=block_bytes,
            everywhere=True,
            **_seen_blocks(plan, layer),
        )
        for layer in range(shape.num_layers)
    ]
    multiplications = sum(prompt_blocks * linear + sum(work.pairs()) * pair for work in layers)
    seconds = prompt_tokens / plan.predicted.prefill_tokens_s / multiplications
    return Counter(
        LayerWork(dataclasses.replace(work, block_s=linear * seconds, pair_s=pair * seconds)) for work in layers
    )


def share_out(
    works: Mapping[LayerWork, int], blocks: Blocks, world_size: int, strategy: ShardStrategy, link: Link | None
) -> BlockAssignment | None:
    """Share out the new blocks of a sequence, or say that every rank should compute all of them.

    Args:
        works: how many layers do which work.
        blocks: the new blocks.
        world_size: ranks.
        strategy: contiguous, zigzag, or auto for the faster of the two.
        link: between the ranks; None leaves messages out of the account.

    Returns:
        The owners, counted from the first new block. None where the sequence is short, a rank would have fewer than 64
        rows, or, with auto, one rank alone is predicted to be as fast.
    """
    if blocks.num_blocks < BLOCKS_PER_RANK * world_size:
        return None
    layers: Counter[AttentionWork] = Counter()
    for work, count in works.items():
        layers[work(blocks.first_block, blocks.num_blocks)] += count
    alone = balanced_assignment(blocks.num_blocks, 1)
    alone_s = sum(count * predict_seconds(work, alone) for work, count in layers.items())
    for seconds, assignment in compare_assignments(layers, world_size, strategy, link):
        if strategy == "auto" and seconds >= alone_s:
            return None
        if is_even_enough(blocks, assignment):
            return assignment
    return None


def _weights(shape: ModelShape) -> int:
    """Multiplications of a token in the linear layers of one block."""
    heads = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    return shape.hidden_size * (heads + 3 * shape.intermediate_size)


def _seen_blocks(plan: Plan, layer: int) -> dict[str, int]:
    """Blocks that a query block attends to in a layer, rounded: of the window, and selected."""
    shape, pattern = plan.shape, plan.attention_patterns[layer]
    if pattern.kind != "dense":
        near = pattern.near_blocks(shape.num_kv_heads)
        return {"window_blocks": round(sum(near) / len(near)), "top_blocks": round(pattern.expected_blocks)}
    if shape.sliding_window is None or (shape.window_layers is not None and not shape.window_layers[layer]):
        return {}
    return {"window_blocks": -(-shape.sliding_window // BLOCK_TOKENS)}
