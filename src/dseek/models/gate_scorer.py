"""`GateRowScorer`: a gate file as what `dseek.ops.attention.row_selection` takes for a scorer, in PyTorch.

The formulas are those of `dseek.train.gate`. B blocks, C cells of a level, H query heads in G groups, d head width, g
gate width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dseek.core.attention_pattern import BLOCK_TOKENS, cell_blocks
from dseek.models.gate_file import Gates
from dseek.ops.attention.pyramid import build_pyramid
from dseek.ops.attention.rotary import rotate


class GateRowScorer:
    """Scores of one layer for a text from its start, in float32.

    Args:
        gates: of the model.
        layer: whose gate is taken.
        q_THd: [T, H, d] queries of positions 0 to T - 1, not rotated.
        rotated_q_THd: the same, rotated.
        k_TGd: [T, G, d] keys, not rotated.
        rotated_k_TGd: the same, rotated.
    """

    def __init__(
        self,
        gates: Gates,
        layer: int,
        q_THd: torch.Tensor,
        rotated_q_THd: torch.Tensor,
        k_TGd: torch.Tensor,
        rotated_k_TGd: torch.Tensor,
    ) -> None:
        gate = gates.layers[layer]
        parts = {part: torch.from_numpy(getattr(gate, part)) for part in ("query", "key", "query_gain", "key_gain")}
        width = parts["query"].shape[-1]
        self._heads = q_THd.shape[1] // k_TGd.shape[1]
        cos_Bg, sin_Bg = (torch.from_numpy(table) for table in gates.rotation(-(-len(q_THd) // BLOCK_TOKENS)))
        blocks_T = torch.arange(len(q_THd)) // BLOCK_TOKENS
        u_THg = F.rms_norm(torch.einsum("thd,hdg->thg", q_THd.float(), parts["query"]), (width,))
        u_THg = rotate(u_THg * parts["query_gain"], cos_Bg[blocks_T], sin_Bg[blocks_T]) / math.sqrt(width)
        scale_H1 = torch.from_numpy(gate.scale)[:, None] / math.sqrt(q_THd.shape[2])
        self._left_THe = torch.cat((rotated_q_THd.float() * scale_H1, u_THg), dim=-1)
        self._own_TH = (q_THd.float() * torch.from_numpy(gate.own)).sum(-1) + torch.from_numpy(gate.own_bias)
        self._right_CGe = []
        for level, cells in enumerate(build_pyramid(rotated_k_TGd.float(), plain_k_SGd=k_TGd.float())):
            assert cells.plain_max is not None and cells.plain_min is not None
            own = min(level, len(parts["key"]) - 1)
            statistics_CGS = torch.cat((cells.plain_max, cells.plain_min, cells.plain_mean), dim=-1)
            kappa_CGg = F.rms_norm(torch.einsum("cks,ksg->ckg", statistics_CGS, parts["key"][own]), (width,))
            cos, sin = (table[:: cell_blocks(level)][: len(statistics_CGS)] for table in (cos_Bg, sin_Bg))
            kappa_CGg = rotate(kappa_CGg * parts["key_gain"][own], cos, sin)
            self._right_CGe.append(torch.cat((cells.key_mean, kappa_CGg), dim=-1))

    def cells(self, position: int, group: int, level: int, indices: Sequence[int]) -> torch.Tensor:
        """Score cells for one query.

        Args:
            position: of the query.
            group: its group of heads.
            level: of the cells; one that has no gate of its own takes the last one that has.
            indices: of C cells.

        Returns:
            [h, C].
        """
        left_he = self._left_THe[position, group * self._heads : (group + 1) * self._heads]
        return left_he @ self._right_CGe[level][list(indices), group].T + math.log(cell_blocks(level))

    def own_block(self, position: int, group: int) -> torch.Tensor:
        """Score the query's own block.

        Args:
            position: of the query.
            group: its group of heads.

        Returns:
            [h].
        """
        return self._own_TH[position, group * self._heads : (group + 1) * self._heads]
