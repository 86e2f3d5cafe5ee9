"""Who sends which key and value blocks to whom: agreed once for a pattern, used in every layer that shares it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dseek.parallel.block_lists import BlockLists
from dseek.parallel.ranks import Ranks
from dseek.parallel.sharding import BlockAssignment


@dataclass(frozen=True, kw_only=True, slots=True)
class Routes:
    """What this rank receives and sends, by peer."""

    key_blocks: tuple[torch.Tensor, ...]
    """int64, rising: blocks that this rank attends to, by owner. The entry of the rank itself is all that it owns."""
    lists: tuple[BlockLists, ...]
    """The pattern's lists, by owner: indices into the owner's entry of `key_blocks`."""
    sent: tuple[torch.Tensor, ...]
    """int64, rising: places among this rank's own blocks of what each peer receives; its own entry is empty."""


def agree(lists: BlockLists, assignment: BlockAssignment, ranks: Ranks) -> Routes:
    """Tell every owner which of its blocks this rank needs. All ranks call this together.

    Args:
        lists: of this rank's query blocks, by the blocks' places in the sequence.
        assignment: the owners.
        ranks: the peers.

    Returns:
        The routes.
    """
    # 1. Sort what is needed by its owner.
    owners = torch.tensor(assignment.owners())
    needed = lists.blocks.unique()
    wanted = [needed[owners[needed] == rank] for rank in range(ranks.world_size)]
    wanted[ranks.rank] = torch.tensor(assignment.blocks[ranks.rank], dtype=torch.int64)

    # 2. Tell how many, then which.
    counts = torch.tensor([blocks.numel() for blocks in wanted])
    counts[ranks.rank] = 0
    requests = [row[ranks.rank] for row in ranks.all_gather(counts)]
    asked = [torch.empty(int(number), dtype=torch.int64) for number in requests]
    messages = []
    for rank in range(ranks.world_size):
        if rank != ranks.rank and wanted[rank].numel():
            messages.append(ranks.send(wanted[rank], rank))
        if asked[rank].numel():
            messages.append(ranks.receive(asked[rank], rank))
    for message in messages:
        message.wait()

    # 3. Keep the lists by owner.
    own = wanted[ranks.rank]
    return Routes(
        key_blocks=tuple(wanted),
        lists=tuple(lists.only(blocks) for blocks in wanted),
        sent=tuple(torch.searchsorted(own, blocks) for blocks in asked),
    )
