"""`Gate`: expects how much attention mass each head gives each cell of keys, and what that has to match.

    u     = rotate_t(norm(Wq q))                              of one head
    kappa = rotate_start(norm(Wk_level [largest; least; mean key of the cell]))
    score = scale q . mean key / sqrt(d) + u . kappa / sqrt(g) + log(blocks of the cell)
    own   = a . q + b                                         of the query's own block

The first product takes queries and keys as the model rotates them, everything else takes them as they are before that.
Scores are natural logarithms of mass on one scale for all levels: their softmax over the cells that part the past, the
own block among them, is each cell's share. With kappa at zero, as training begins, a score is that of the mean key.

R rows, H query heads in G groups, B blocks, C cells of a level, d head width, g gate width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from dseek.core.attention_pattern import BLOCK_TOKENS, RADIX, cell_blocks
from dseek.ops.attention.rotary import rotate


class Gate(nn.Module):
    """The gate of one layer.

    Args:
        num_heads: query heads H.
        num_groups: key and value heads G.
        head_dim: d.
        gate_dim: g, even.
        num_levels: levels of cells.
        theta: base of the gate's rotation, the model's own.
    """

    def __init__(
        self, num_heads: int, num_groups: int, head_dim: int, *, gate_dim: int, num_levels: int, theta: float
    ) -> None:
        super().__init__()
        key_size = 3 * head_dim
        self.query = nn.Parameter(torch.randn(num_heads, head_dim, gate_dim) / math.sqrt(head_dim))
        self.key = nn.Parameter(torch.randn(num_levels, num_groups, key_size, gate_dim) / math.sqrt(key_size))
        self.query_gain = nn.Parameter(torch.ones(num_heads, gate_dim))
        self.key_gain = nn.Parameter(torch.zeros(num_levels, num_groups, gate_dim))
        self.scale = nn.Parameter(torch.ones(num_heads))
        self.own = nn.Parameter(torch.zeros(num_heads, head_dim))
        self.own_bias = nn.Parameter(torch.zeros(num_heads))
        exponents = torch.arange(0, gate_dim, 2, dtype=torch.float32) / gate_dim
        self.register_buffer("frequencies", theta**-exponents, persistent=False)
        self.frequencies: torch.Tensor

    def forward(
        self,
        queries_RHd: torch.Tensor,
        rotated_RHd: torch.Tensor,
        blocks_R: torch.Tensor,
        statistics_CGS: torch.Tensor,
        means_CGd: torch.Tensor,
        level: int,
    ) -> torch.Tensor:
        """Score all cells of a level for all rows.

        Args:
            queries_RHd: queries before rotation.
            rotated_RHd: the same after it.
            blocks_R: int [R], block of each row.
            statistics_CGS: largest, least and mean key before rotation of the level's complete cells, S = 3 d.
            means_CGd: mean key after rotation.
            level: 0 for blocks.

        Returns:
            [R, H, C]; cells that a row cannot see are scored too.
        """
        num_groups, width = self.key.shape[1], self.query.shape[-1]
        u_RHg = F.rms_norm(torch.einsum("rhd,hdg->rhg", queries_RHd, self.query), (width,)) * self.query_gain
        u_RHg = self._rotate(u_RHg, blocks_R) / math.sqrt(width)
        kappa_CGg = F.rms_norm(torch.einsum("cks,ksg->ckg", statistics_CGS, self.key[level]), (width,))
        first_C = torch.arange(len(statistics_CGS)) * cell_blocks(level)
        kappa_CGg = self._rotate(kappa_CGg * self.key_gain[level], first_C)
        plain_RHd = rotated_RHd * (self.scale / math.sqrt(rotated_RHd.shape[-1]))[:, None]
        left = torch.cat((plain_RHd, u_RHg), dim=-1).unflatten(1, (num_groups, -1))
        right = torch.cat((means_CGd, kappa_CGg), dim=-1)
        return torch.einsum("rkpe,cke->rkpc", left, right).flatten(1, 2) + math.log(cell_blocks(level))

    def own_block(self, queries_RHd: torch.Tensor) -> torch.Tensor:
        """Score each row's own block, up to the row.

        Args:
            queries_RHd: queries before rotation.

        Returns:
            [R, H].
        """
        return (queries_RHd * self.own).sum(-1) + self.own_bias

    def _rotate(self, x_NMg: torch.Tensor, blocks_N: torch.Tensor) -> torch.Tensor:
        """Turn row i by the angle of the first position of block i."""
        angles = blocks_N[:, None].float() * BLOCK_TOKENS * self.frequencies
        return rotate(x_NMg, angles.cos(), angles.sin())


def pool_statistics(blocks_BGS: torch.Tensor, level: int) -> torch.Tensor:
    """Summarise complete cells of a level from their blocks.

    Args:
        blocks_BGS: largest, least and mean key of each block.
        level: of the cells.

    Returns:
        [C, G, S].
    """
    cells = _by_cells(blocks_BGS, level)
    largest, least, mean = cells.chunk(3, dim=-1)
    return torch.cat((largest.amax(1), least.amin(1), mean.mean(1)), dim=-1)


def pool_means(means_BGd: torch.Tensor, level: int) -> torch.Tensor:
    """Average the complete cells of a level over their blocks.

    Args:
        means_BGd: of each block.
        level: of the cells.

    Returns:
        [C, G, d].
    """
    return _by_cells(means_BGd, level).mean(1)


def _by_cells(blocks_B: torch.Tensor, level: int) -> torch.Tensor:
    size = RADIX**level
    num_cells = len(blocks_B) // size
    return blocks_B[: num_cells * size].unflatten(0, (num_cells, size))


def free_cells(blocks_R: torch.Tensor, num_cells: int, level: int, near_blocks: int) -> torch.Tensor:
    """Say which cells a row may open or leave: visible, and neither near nor holding the first block.

    Args:
        blocks_R: block of each row.
        num_cells: complete cells C of the level.
        level: of the cells.
        near_blocks: window in blocks.

    Returns:
        bool [R, C].
    """
    ends = (torch.arange(num_cells) + 1) * RADIX**level
    free = ends[None] <= (blocks_R - near_blocks)[:, None]
    free[:, :1] = False
    return free


def partition_loss(
    scores: list[torch.Tensor],
    masses: list[torch.Tensor],
    counted: list[torch.Tensor],
    own: torch.Tensor,
    own_mass: torch.Tensor,
) -> torch.Tensor:
    """Kullback-Leibler divergence of expected from true shares, over cells of several levels that part the past.

    Args:
        scores: by level, [R, H, C].
        masses: likewise, true attention mass.
        counted: by level, bool [R, C]: cells of the partition.
        own: [R, H] scores of the rows' own blocks.
        own_mass: [R, H] their mass.

    Returns:
        The mean over rows and heads.
    """
    parts = [score.masked_fill(~some[:, None], -1e9) for score, some in zip(scores, counted, strict=True)]
    expected = torch.cat((*parts, own[..., None]), dim=-1).log_softmax(-1)
    true = torch.cat([mass * some[:, None] for mass, some in zip(masses, counted, strict=True)], dim=-1)
    true = torch.cat((true, own_mass[..., None]), dim=-1)
    true = true / true.sum(-1, keepdim=True).clamp(min=1e-9)
    return (torch.xlogy(true, true) - true * expected).sum(-1).mean()
