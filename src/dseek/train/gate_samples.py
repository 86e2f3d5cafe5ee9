"""What a gate learns from: queries, keys and true attention mass of a frozen model, layer by layer, on real text.

The n x n map of weights is never kept: some rows are drawn, their weights are summed over blocks of keys at once, and
the rest is dropped. B blocks of 64 tokens, T tokens, R rows, H query heads, G key and value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dseek.core.attention_pattern import BLOCK_TOKENS
from dseek.models.block_mass import block_mass
from dseek.models.decoder import Decoder
from dseek.models.projections import layer_projections


@dataclass(frozen=True, slots=True)
class LayerSample:
    """One text in one layer."""

    rows: torch.Tensor
    """int64 [R], positions of the drawn rows, rising."""
    queries: torch.Tensor
    """[R, H, d], their queries before rotation."""
    rotated: torch.Tensor
    """[R, H, d], the same after it."""
    statistics: torch.Tensor
    """[B, G, 3 d], largest, least and mean of each block's keys, before rotation."""
    means: torch.Tensor
    """[B, G, d], mean of each block's keys after rotation."""
    mass: torch.Tensor
    """[R, H, B], attention mass that a row gives a block; its own block holds what the row may see of it."""


@torch.inference_mode()
def layer_samples(
    decoder: Decoder, token_ids: torch.Tensor, *, num_rows: int, generator: torch.Generator
) -> Iterator[LayerSample]:
    """Run a text through a model and give each layer's sample as it passes.

    Args:
        decoder: the model, not changed; its layers must attend to everything (no sliding window).
        token_ids: int64 [T]; what lies beyond the last whole block is dropped.
        num_rows: rows to draw, fewer where the text is shorter.
        generator: draws them.

    Yields:
        Samples in float32, from the first layer on.
    """
    assert decoder.shape.sliding_window is None, "a gate is trained where layers see everything"
    num_blocks = len(token_ids) // BLOCK_TOKENS
    num_tokens = num_blocks * BLOCK_TOKENS
    for projections in layer_projections(decoder, token_ids[:num_tokens]):
        rows_R = torch.randperm(num_tokens, generator=generator)[:num_rows].sort().values
        rotated_keys = projections.rotated_keys
        yield LayerSample(
            rows=rows_R,
            queries=projections.queries[rows_R].float(),
            rotated=projections.rotated_queries[rows_R].float(),
            statistics=key_statistics(projections.keys.float()),
            means=rotated_keys.float().unflatten(0, (-1, BLOCK_TOKENS)).mean(1),
            mass=block_mass(projections.rotated_queries[rows_R], rotated_keys, rows_R),
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
