"""What a gate learns from: queries, keys and true attention mass of a frozen model, layer by layer, on real text.

The n x n map of weights is never kept: some rows are drawn, their weights are summed over blocks of keys at once, and
the rest is dropped. B blocks of 64 tokens, T tokens, R rows, H query heads, G key and value heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dseek.core.attention_pattern import BLOCK_TOKENS
from dseek.models.decoder import Attention, Block, Decoder
from dseek.ops.attention.rotary import rotate


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
    model = decoder.model
    x_TD = model.embed_tokens(token_ids[:num_tokens])
    rotation = model.rotary_emb(torch.arange(num_tokens), x_TD.dtype)
    for block in model.layers:
        assert isinstance(block, Block)
        attention = block.self_attn
        q_THd, k_TGd, v_TGd = _project(attention, block.input_layernorm(x_TD))
        q_rotated_THd, k_rotated_TGd = rotate(q_THd, *rotation), rotate(k_TGd, *rotation)
        out_1HTd = F.scaled_dot_product_attention(
            q_rotated_THd.transpose(0, 1)[None],
            k_rotated_TGd.transpose(0, 1)[None],
            v_TGd.transpose(0, 1)[None],
            is_causal=True,
            enable_gqa=attention.grouped,
        )
        rows_R = torch.randperm(num_tokens, generator=generator)[:num_rows].sort().values
        yield LayerSample(
            rows=rows_R,
            queries=q_THd[rows_R].float(),
            rotated=q_rotated_THd[rows_R].float(),
            statistics=key_statistics(k_TGd.float()),
            means=k_rotated_TGd.float().unflatten(0, (-1, BLOCK_TOKENS)).mean(1),
            mass=block_mass(q_rotated_THd[rows_R], k_rotated_TGd, rows_R),
        )
        x_TD = x_TD + attention.o_proj(out_1HTd[0].transpose(0, 1).flatten(1))
        x_TD = x_TD + block.mlp(block.post_attention_layernorm(x_TD))


def key_statistics(k_TGd: torch.Tensor) -> torch.Tensor:
    """Summarise blocks of keys.

    Args:
        k_TGd: [T, G, d], T a multiple of 64.

    Returns:
        [B, G, 3 d]: largest, least and mean of each element over the block.
    """
    k_BSGd = k_TGd.unflatten(0, (-1, BLOCK_TOKENS))
    return torch.cat((k_BSGd.amax(1), k_BSGd.amin(1), k_BSGd.mean(1)), dim=-1)


def block_mass(q_RHd: torch.Tensor, k_TGd: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
    """Compute the attention mass of some rows on every block of keys.

    Args:
        q_RHd: rotated queries.
        k_TGd: rotated keys, T a multiple of 64.
        rows_R: int64, positions of the queries.

    Returns:
        float32 [R, H, B].
    """
    num_tokens, num_groups, head_dim = k_TGd.shape
    hidden_RT = torch.arange(num_tokens)[None] > rows_R[:, None]
    masses = []
    for group, q_RPd in enumerate(q_RHd.unflatten(1, (num_groups, -1)).unbind(1)):
        scores_PRT = (q_RPd.transpose(0, 1) @ k_TGd[:, group].T).float() / math.sqrt(head_dim)
        weights_PRT = scores_PRT.masked_fill_(hidden_RT, float("-inf")).softmax(dim=-1)
        masses.append(weights_PRT.unflatten(-1, (-1, BLOCK_TOKENS)).sum(-1).transpose(0, 1))
    return torch.cat(masses, dim=1)


def _project(attention: Attention, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make queries [T, H, d], keys [T, G, d] and values [T, G, d], none rotated."""
    heads = (len(x_TD), -1, attention.head_dim)
    q_THd = attention.q_norm(attention.q_proj(x_TD).view(heads))
    k_TGd = attention.k_norm(attention.k_proj(x_TD).view(heads))
    return q_THd, k_TGd, attention.v_proj(x_TD).view(heads)
