"""`Gate`: scores cells of keys for a query block, one gate for the heads of each group; and what it has to match.

    u     = rotate_t(norm(Wq [q_h, h in the group]))
    kappa = rotate_start(norm(Wk_level [largest; least; mean key of the cell]))
    s     = u . kappa / sqrt(g)

Queries and keys are those before the model's own rotation. B query blocks, C cells of a level, G groups, E = heads of a
group times head width, S = 3 times head width, g gate width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from dseek.core.attention_pattern import BLOCK_TOKENS, RADIX
from dseek.ops.attention.rotary import rotate


class Gate(nn.Module):
    """The gate of one layer.

    Args:
        num_groups: key and value heads G.
        query_size: E.
        key_size: S.
        gate_dim: g, even.
        num_levels: levels of cells.
        theta: base of the gate's rotation, the model's own.
    """

    def __init__(
        self, num_groups: int, query_size: int, key_size: int, *, gate_dim: int, num_levels: int, theta: float
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(num_groups, query_size, gate_dim) / math.sqrt(query_size))
        self.key = nn.Parameter(torch.randn(num_levels, num_groups, key_size, gate_dim) / math.sqrt(key_size))
        self.query_gain = nn.Parameter(torch.ones(num_groups, gate_dim))
        self.key_gain = nn.Parameter(torch.ones(num_levels, num_groups, gate_dim))
        exponents = torch.arange(0, gate_dim, 2, dtype=torch.float32) / gate_dim
        self.register_buffer("frequencies", theta**-exponents, persistent=False)
        self.frequencies: torch.Tensor

    def forward(self, queries_BGE: torch.Tensor, cells_CGS: torch.Tensor, level: int) -> torch.Tensor:
        """Score all cells of a level for all query blocks.

        Args:
            queries_BGE: queries of the first position of blocks 0 to B - 1.
            cells_CGS: statistics of the level's complete cells, from the first on.
            level: 0 for blocks.

        Returns:
            [B, G, C]; cells that a block cannot see are scored too.
        """
        u_BGg = F.rms_norm(torch.einsum("bge,geh->bgh", queries_BGE, self.query), self.query.shape[-1:])
        u_BGg = self._rotate(u_BGg * self.query_gain, BLOCK_TOKENS)
        kappa_CGg = F.rms_norm(torch.einsum("cgs,gsh->cgh", cells_CGS, self.key[level]), self.key.shape[-1:])
        kappa_CGg = self._rotate(kappa_CGg * self.key_gain[level], BLOCK_TOKENS * RADIX**level)
        return torch.einsum("bgh,cgh->bgc", u_BGg, kappa_CGg) / math.sqrt(self.query.shape[-1])

    def _rotate(self, x_NGg: torch.Tensor, stride: int) -> torch.Tensor:
        """Turn row i by the angle of position i * stride."""
        angles = torch.arange(len(x_NGg), dtype=torch.float32)[:, None] * stride * self.frequencies
        return rotate(x_NGg, angles.cos(), angles.sin())


def pool_statistics(blocks_BGS: torch.Tensor, level: int) -> torch.Tensor:
    """Summarise complete cells of a level from their blocks.

    Args:
        blocks_BGS: largest, least and mean key of each block.
        level: of the cells.

    Returns:
        [C, G, S].
    """
    size = RADIX**level
    num_cells = len(blocks_BGS) // size
    cells = blocks_BGS[: num_cells * size].unflatten(0, (num_cells, size))
    largest, least, mean = cells.chunk(3, dim=-1)
    return torch.cat((largest.amax(1), least.amin(1), mean.mean(1)), dim=-1)


def free_cells(num_blocks: int, level: int, near_blocks: int) -> torch.Tensor:
    """Say which cells a descent may choose or leave: visible, and neither near nor holding the first block.

    Args:
        num_blocks: query blocks B, and blocks of keys.
        level: of the cells.
        near_blocks: window in blocks.

    Returns:
        bool [B, C].
    """
    size = RADIX**level
    ends = (torch.arange(num_blocks // size) + 1) * size
    near_from = (torch.arange(num_blocks) - near_blocks).clamp(min=0)
    free = ends[None] <= near_from[:, None]
    free[:, :1] = False
    return free


def level_loss(
    scores_BGC: torch.Tensor, mass_BGC: torch.Tensor, free_BC: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kullback-Leibler divergence of the scores' softmax from the true mass among the free cells of a level.

    Args:
        scores_BGC: of the gate.
        mass_BGC: true mass of each cell.
        free_BC: cells that count.

    Returns:
        The mean over blocks and groups with each weighted by its free mass, and the sum of those weights.
    """
    rows = free_BC.sum(1) > 1
    free_B1C = free_BC[rows][:, None]
    mass = mass_BGC[rows] * free_B1C
    weight_BG1 = mass.sum(-1, keepdim=True)
    target = mass / weight_BG1.clamp(min=1e-9)
    log_chosen = scores_BGC[rows].masked_fill(~free_B1C, -1e9).log_softmax(-1)
    divergence_BG = (torch.xlogy(target, target) - target * log_chosen).sum(-1)
    return (divergence_BG * weight_BG1[..., 0]).sum(), weight_BG1.sum()
