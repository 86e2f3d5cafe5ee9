"""The untrained gate for many query blocks at once: every cell's score from one product, looked up by the descent.

Q query blocks, C cells of a level, H query heads in G groups, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dseek.ops.attention.pyramid import CellLevel
from dseek.ops.attention.selection import CellScorer


def tabulated_scorer(first_QHd: torch.Tensor, query_blocks: Sequence[int], pyramid: Sequence[CellLevel]) -> CellScorer:
    """Score all cells of a sequence for some of its query blocks.

    Args:
        first_QHd: [Q, H, d] the first rotated query of each query block.
        query_blocks: places of those blocks in the sequence.
        pyramid: the levels with the keys' sums.

    Returns:
        The scorer: that of `mean_key_scorer` but for the order in which a product is summed, so that where two cells
        are as good as equal, another one may win. Only the given blocks can be asked for.
    """
    rows = {block: row for row, block in enumerate(query_blocks)}
    tables = []
    for cells in pyramid:
        mean_GdC = cells.key_mean.permute(1, 2, 0)
        q_GhQd = first_QHd.to(mean_GdC.dtype).unflatten(1, (len(mean_GdC), -1)).permute(1, 2, 0, 3)
        z_GhQC = (q_GhQd / math.sqrt(first_QHd.shape[2])) @ mean_GdC[:, None] + math.log(cells.num_tokens)
        tables.append(z_GhQC.amax(1).numpy())

    def score(query_block: int, group: int, level: int, indices: Sequence[int]) -> list[float]:
        scores: list[float] = tables[level][group, rows[query_block]][list(indices)].tolist()
        return scores

    return score
