"""What goes into attention: queries, keys and values of a text, layer by layer, as a `Decoder` runs over it.

The layers attend to everything (or to the model's own sliding window), whatever a plan would let them see. Nothing of
the size tokens x tokens is built: attention runs in PyTorch's fused kernel or over chunks of rows. T tokens, D model
width, H query heads, G key and value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dseek.models.decoder import Attention, Block, Decoder
from dseek.ops.attention.reference import visible
from dseek.ops.attention.rotary import rotate

CHUNK_ROWS = 4096
"""Rows of the MLP at a time: its inner width is several times the model's."""

WINDOW_CHUNK_ROWS = 1024
"""Rows of sliding-window attention at a time, each chunk with a mask of its own."""


@dataclass(frozen=True, slots=True)
class LayerProjections:
    """Queries, keys and values of one layer, in the dtype of the decoder."""

    queries: torch.Tensor
    """[T, H, d], before rotation."""
    keys: torch.Tensor
    """[T, G, d], before rotation."""
    rotated_queries: torch.Tensor
    """[T, H, d]."""
    rotated_keys: torch.Tensor
    """[T, G, d]."""
    values: torch.Tensor
    """[T, G, d]."""
    window: int | None
    """The model's own sliding window in this layer, in tokens with the query's own; None where it has none."""


@torch.inference_mode()
def layer_projections(
    decoder: Decoder, token_ids: torch.Tensor, context_tokens: int | None = None
) -> Iterator[LayerProjections]:
    """Run a text through a model and give each layer's queries, keys and values as it passes.

    A layer is computed beyond its projections only when the next one is asked for.

    Args:
        decoder: the model, not changed.
        token_ids: int64 [T].
        context_tokens: length of context that a rotation which depends on it is that of; None is the text's.

    Yields:
        Projections, from the first layer on.
    """
    model, shape = decoder.model, decoder.shape
    x_TD = model.embed_tokens(token_ids)
    rotation = model.rotary_emb(torch.arange(len(token_ids), device=x_TD.device), x_TD.dtype, context_tokens)
    for layer, block in enumerate(model.layers):
        assert isinstance(block, Block)
        attention = block.self_attn
        q_THd, k_TGd, v_TGd = project(attention, block.input_layernorm(x_TD))
        q_rotated_THd, k_rotated_TGd = rotate(q_THd, *rotation), rotate(k_TGd, *rotation)
        windowed = shape.window_layers is None or shape.window_layers[layer]
        window = shape.sliding_window if windowed else None
        yield LayerProjections(q_THd, k_TGd, q_rotated_THd, k_rotated_TGd, v_TGd, window)
        out_THd = attend(q_rotated_THd, k_rotated_TGd, v_TGd, window)
        x_TD = x_TD + attention.o_proj(out_THd.flatten(1))
        mixed = [block.mlp(block.post_attention_layernorm(x_RD)) for x_RD in x_TD.split(CHUNK_ROWS)]
        x_TD = x_TD + torch.cat(mixed)


def project(attention: Attention, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make queries, keys and values of a layer.

    Args:
        attention: the layer's.
        x_TD: normed states.

    Returns:
        Queries [T, H, d], keys [T, G, d] and values [T, G, d], none rotated.
    """
    heads = (len(x_TD), -1, attention.head_dim)
    q_THd = attention.q_norm(attention.q_proj(x_TD).view(heads))
    k_TGd = attention.k_norm(attention.k_proj(x_TD).view(heads))
    return q_THd, k_TGd, attention.v_proj(x_TD).view(heads)


def attend(q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGd: torch.Tensor, window: int | None) -> torch.Tensor:
    """Attend causally, in all rows; with a window, chunk by chunk over the keys that a chunk may see.

    Args:
        q_THd: [T, H, d] rotated queries.
        k_TGd: [T, G, d] rotated keys.
        v_TGd: [T, G, d] values.
        window: newest tokens that a row sees; None is all.

    Returns:
        [T, H, d].
    """
    if window is None:
        return _fused(q_THd, k_TGd, v_TGd, None)
    chunks = []
    for first in range(0, len(q_THd), WINDOW_CHUNK_ROWS):
        past = min(first + WINDOW_CHUNK_ROWS, len(q_THd))
        keys_from = max(0, first - window + 1)
        mask_RS = visible(
            torch.arange(first, past, device=q_THd.device), torch.arange(keys_from, past, device=q_THd.device), window
        )
        chunks.append(_fused(q_THd[first:past], k_TGd[keys_from:past], v_TGd[keys_from:past], mask_RS))
    return torch.cat(chunks)


def _fused(q_RHd: torch.Tensor, k_SGd: torch.Tensor, v_SGd: torch.Tensor, mask_RS: torch.Tensor | None) -> torch.Tensor:
    """PyTorch's attention with the heads in the middle; no mask means the causal one."""
    out_1HRd = F.scaled_dot_product_attention(
        q_RHd.transpose(0, 1)[None],
        k_SGd.transpose(0, 1)[None],
        v_SGd.transpose(0, 1)[None],
        attn_mask=mask_RS,
        is_causal=mask_RS is None,
        enable_gqa=q_RHd.shape[1] != k_SGd.shape[1],
    )
    return out_1HRd[0].transpose(0, 1)
