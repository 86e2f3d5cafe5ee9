"""A trained gate as what `dseek.ops.attention.selection` takes for a scorer: the native descent's scores in PyTorch.

    u     = rotate(norm(Wq [queries of the group's heads]))    at the query block's first position
    kappa = rotate(norm(Wk_level [largest; least; mean key]))  at the cell's first position
    score = u . kappa

Queries and keys are those before the model's own rotation. B query blocks, C cells of a level, G groups, E = heads of a
group times head width, S = 3 times head width, g gate width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from dseek.core.attention_pattern import BLOCK_TOKENS, cell_blocks
from dseek.models.gate_file import Gates
from dseek.ops.attention.pyramid import CellLevel
from dseek.ops.attention.rotary import rotate
from dseek.ops.attention.selection import CellScorer


def gate_scorer(gates: Gates, layer: int, q_THd: torch.Tensor, pyramid: Sequence[CellLevel]) -> CellScorer:
    """Make the scorer of one layer for a text from its start.

    Args:
        gates: of the model.
        layer: whose gate is taken.
        q_THd: [T, H, d] queries of positions 0 to T - 1, not rotated.
        pyramid: levels of the text's cells, built with the keys before rotation.

    Returns:
        The scorer, in float32; cells of levels that have no gate of their own are scored by the last one that has.
    """
    gate = gates.layers[layer]
    num_groups, query_size, gate_dim = gate.query.shape
    num_blocks = -(-len(q_THd) // BLOCK_TOKENS)
    cos_Bg, sin_Bg = (torch.from_numpy(table) for table in gates.rotation(num_blocks))

    def projected(x_NGE: torch.Tensor, weight: np.ndarray, gain: np.ndarray, stride: int) -> torch.Tensor:
        """Project, norm and turn rows that begin every `stride` blocks: [N, G, g]."""
        y_NGg = F.rms_norm(torch.einsum("nge,geh->ngh", x_NGE.float(), torch.from_numpy(weight)), (gate_dim,))
        cos, sin = (table[::stride][: len(x_NGE)] for table in (cos_Bg, sin_Bg))
        return rotate(y_NGg * torch.from_numpy(gain), cos, sin)

    queries_BGE = q_THd.detach()[::BLOCK_TOKENS].reshape(num_blocks, num_groups, query_size)
    u_BGg = projected(queries_BGE, gate.query, gate.query_gain, 1)
    kappas_CGg = []
    for level, cells in enumerate(pyramid):
        assert cells.plain_max is not None and cells.plain_min is not None, "the gate needs keys before rotation"
        statistics_CGS = torch.cat((cells.plain_max, cells.plain_min, cells.plain_mean), dim=-1)
        own = min(level, len(gate.key) - 1)
        kappas_CGg.append(projected(statistics_CGS, gate.key[own], gate.key_gain[own], cell_blocks(level)))

    def score(query_block: int, group: int, level: int, indices: Sequence[int]) -> list[float]:
        kappa_Cg = kappas_CGg[level][list(indices), group]
        return [float(value) for value in (kappa_Cg * u_BGg[query_block, group]).sum(-1).tolist()]

    return score
