"""What a gate learns from: queries, keys and true attention mass of a frozen model, layer by layer, on real text.

The n x n map of weights is never kept: a few rows of each query block are drawn, their weights are summed over blocks
of keys at once, and the rest is dropped. B blocks of 64 tokens, T tokens, H query heads, G key and value heads,
P = H / G heads of a group, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dseek.core.attention_pattern import BLOCK_TOKENS
from dseek.models.decoder import Decoder
from dseek.models.projections import layer_projections


@dataclass(frozen=True, slots=True)
class LayerSample:
    """One text in one layer."""

    queries: torch.Tensor
    """[B, G, P d], queries of each block's first position, before rotation."""
    keys: torch.Tensor
    """[B, G, 3 d], largest, least and mean of each block's keys, before rotation."""
    mass: torch.Tensor
    """[B, G, B], attention mass that a query block (rows) gives a block of keys (columns): the largest of the group's
    heads, the mean of the drawn rows; a row's own block holds what the row may see of it."""


@torch.inference_mode()
def layer_samples(
    decoder: Decoder, token_ids: torch.Tensor, *, rows_per_block: int, generator: torch.Generator
) -> Iterator[LayerSample]:
    """Run a text through a model and give each layer's sample as it passes.

    Args:
        decoder: the model, not changed; its layers must attend to everything (no sliding window).
        token_ids: int64 [T]; what lies beyond the last whole block is dropped.
        rows_per_block: rows of each query block whose weights are computed, 1 to 64.
        generator: draws them.

    Yields:
        Samples in float32, from the first layer on.
    """
    assert decoder.shape.sliding_window is None, "a gate is trained where layers see everything"
    num_blocks = len(token_ids) // BLOCK_TOKENS
    num_tokens = num_blocks * BLOCK_TOKENS
    for projections in layer_projections(decoder, token_ids[:num_tokens]):
        offsets_BR = torch.rand(num_blocks, BLOCK_TOKENS, generator=generator).argsort(dim=1)[:, :rows_per_block]
        rows_BR = torch.arange(num_blocks)[:, None] * BLOCK_TOKENS + offsets_BR
        yield LayerSample(
            queries=projections.queries[::BLOCK_TOKENS].reshape(num_blocks, decoder.shape.num_kv_heads, -1).float(),
            keys=key_statistics(projections.keys.float()),
            mass=pooled_mass(projections.rotated_queries, projections.rotated_keys, rows_BR),
        )


def key_statistics(k_TGd: torch.Tensor) -> torch.Tensor:
    """Summarise blocks of keys.

    Args:
        k_TGd: [T, G, d], T a multiple of 64.

    Returns:
        [B, G, 3 d]: largest, least and mean of each element over the block.
    """
    k_BSGd = k_TGd.unflatten(0, (-1, BLOCK_TOKENS))
    return torch.cat((k_BSGd.amax(1), k_BSGd.amin(1), k_BSGd.mean(1)), dim=-1)


def pooled_mass(q_THd: torch.Tensor, k_TGd: torch.Tensor, rows_BR: torch.Tensor) -> torch.Tensor:
    """Compute the attention mass of some rows on every block of keys.

    Args:
        q_THd: [T, H, d] rotated queries.
        k_TGd: [T, G, d] rotated keys.
        rows_BR: [B, R] positions of the rows, by query block.

    Returns:
        float32 [B, G, B]; see `LayerSample.mass`.
    """
    num_tokens, num_groups, head_dim = k_TGd.shape
    num_blocks, rows_per_block = rows_BR.shape
    heads = q_THd.shape[1] // num_groups
    rows = rows_BR.flatten()
    hidden_RT = torch.arange(num_tokens)[None] > rows[:, None]
    masses = []
    for group in range(num_groups):
        q_PRd = q_THd[rows, group * heads : (group + 1) * heads].transpose(0, 1)
        scores_PRT = (q_PRd @ k_TGd[:, group].T).float() / math.sqrt(head_dim)
        weights_PRT = scores_PRT.masked_fill_(hidden_RT, float("-inf")).softmax(dim=-1)
        mass_PRB = weights_PRT.unflatten(-1, (num_blocks, BLOCK_TOKENS)).sum(-1)
        masses.append(mass_PRB.amax(0).unflatten(0, (num_blocks, rows_per_block)).mean(1))
    return torch.stack(masses, dim=1)
