"""Attention over listed key blocks with its log-sum-exp, as `partial.attend_blocks`, in PyTorch's flash attention.

The keys of a query block and group are gathered side by side and many such tables attended in one call, those of equal
length together; the calls share nothing, and a thread makes one at a time. The query block itself, where it is listed,
is the last of its list: its columns get a causal mask, which all tables of a call share.

T query rows, S key rows, H query heads in G groups, Q query blocks, N key blocks, U tables in one call, R rows of one
(64 for each head of the group, head after head), X keys of one, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from dseek.core.attention_pattern import BLOCK_TOKENS
from dseek.ops.side_by_side import side_by_side

MAX_GATHERED_KEYS = 1 << 13
"""Keys gathered for one call: enough to make its overhead small, few enough to stay in a core's cache."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend_gathered_blocks(
    q_THd: torch.Tensor,
    k_SGd: torch.Tensor,
    v_SGd: torch.Tensor,
    query_blocks: torch.Tensor,
    key_blocks: torch.Tensor,
    starts: torch.Tensor,
    blocks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from blocks of queries to lists of key blocks, on the CPU, without gradients.

    Args:
        q_THd: [T, H, d] queries, block after block; only the last block may be shorter than 64. H is a multiple of G.
        k_SGd: [S, G, d] keys, block after block; only the last block may be shorter than 64.
        v_SGd: [S, G, d] values.
        query_blocks: int64 [Q] places of the query blocks in the sequence, rising.
        key_blocks: int64 [N] places of the key blocks, rising.
        starts: int64 [Q * L + 1] bounds of the lists, L for each query block: 1, or G where each group has its own.
        blocks: int64, the lists one after the other: indices into `key_blocks`, rising, none younger than the query. A
            block shorter than 64 is listed by itself alone.

    Returns:
        Output [T, H, d], rounded to the dtype of the queries, and log-sum-exp of the scores [T, H], both as float32
        (float64 where the queries have it); zeros and minus infinity where a list is empty.
        Source: Dao et al. 2022, FlashAttention, section 3.1.
    """
    num_groups, num_queries = k_SGd.shape[1], query_blocks.numel()
    wide = torch.promote_types(q_THd.dtype, torch.float32)
    q_QGRd, k_NGRd, v_NGRd = (_in_blocks(x, num_groups) for x in (q_THd, k_SGd, v_SGd))
    out_QGRd = torch.zeros(q_QGRd.shape, dtype=wide)
    lse_QGR = torch.full(q_QGRd.shape[:3], float("-inf"), dtype=wide)
    if num_queries == 0 or blocks.numel() == 0:
        return _in_tokens(out_QGRd, q_THd.shape[0]), _in_tokens(lse_QGR[..., None], q_THd.shape[0])[..., 0]

    lists_each = (starts.numel() - 1) // num_queries
    assert lists_each in (1, num_groups), "one list, or one for each group"
    flat_q, flat_k, flat_v, flat_out = (x.flatten(0, 1) for x in (q_QGRd, k_NGRd, v_NGRd, out_QGRd))
    flat_lse = lse_QGR.flatten(0, 1)
    rows, head_dim = flat_q.shape[1:]
    calls = list(_alike(query_blocks, key_blocks, starts, blocks, num_groups // lists_each))

    def attend(index: int) -> None:
        tables, with_own, entries = calls[index]
        places = (blocks[entries] * num_groups + (tables % num_groups)[:, None]).flatten()
        k, v = (x.index_select(0, places).view(len(tables), 1, -1, head_dim) for x in (flat_k, flat_v))
        mask = _causal_columns(rows, k.shape[2], q_THd.dtype) if with_own else None
        out, lse = _flash(flat_q.index_select(0, tables)[:, None], k, v, attn_mask=mask)
        flat_out[tables] = out[:, 0].to(wide)
        flat_lse[tables] = lse[:, 0].to(wide)

    side_by_side(len(calls), attend)
    return _in_tokens(out_QGRd, q_THd.shape[0]), _in_tokens(lse_QGR[..., None], q_THd.shape[0])[..., 0]


def _alike(
    query_blocks: torch.Tensor, key_blocks: torch.Tensor, starts: torch.Tensor, blocks: torch.Tensor, repeats: int
) -> Iterator[tuple[torch.Tensor, bool, torch.Tensor]]:
    """Put tables of equal length together.

    Args:
        query_blocks: see `attend_gathered_blocks`.
        key_blocks: likewise.
        starts: likewise.
        blocks: likewise.
        repeats: groups that share a list.

    Yields:
        Tables, int64 [U] (query times groups plus group); whether their lists end with the query block itself; and
        where the lists are, int64 [U, B] into `blocks`.
    """
    counts = starts.diff()
    owner = torch.arange(counts.numel()) * query_blocks.numel() // counts.numel()
    last = blocks[(starts[1:] - 1).clamp(min=0)]
    with_own = (counts > 0) & (key_blocks[last] == query_blocks[owner])
    kinds = (2 * counts + with_own).repeat_interleave(repeats)
    first = starts[:-1].repeat_interleave(repeats)
    for kind in kinds.unique().tolist():
        num_blocks, has_own = divmod(kind, 2)
        if num_blocks == 0:
            continue
        together = max(1, MAX_GATHERED_KEYS // (num_blocks * BLOCK_TOKENS))
        for tables in torch.nonzero(kinds == kind).flatten().split(together):
            yield tables, bool(has_own), first[tables][:, None] + torch.arange(num_blocks)


def _causal_columns(rows: int, num_keys: int, dtype: torch.dtype) -> torch.Tensor:
    """Make the mask [1, 1, R, X] of tables whose last 64 keys are the query block itself."""
    later = torch.full((BLOCK_TOKENS, BLOCK_TOKENS), float("-inf"), dtype=dtype).triu_(1)
    return F.pad(later.repeat(rows // BLOCK_TOKENS, 1), (num_keys - BLOCK_TOKENS, 0))[None, None]


def _in_blocks(x_THd: torch.Tensor, num_groups: int) -> torch.Tensor:
    """[T, H, d] as [blocks, G, R, d], the last block filled up with zeros."""
    missing = -len(x_THd) % BLOCK_TOKENS
    x_THd = F.pad(x_THd, (0, 0, 0, 0, 0, missing)) if missing else x_THd
    x_QRGhd = x_THd.unflatten(0, (-1, BLOCK_TOKENS)).unflatten(2, (num_groups, -1))
    return x_QRGhd.permute(0, 2, 3, 1, 4).flatten(2, 3).contiguous()


def _in_tokens(x_QGRd: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[blocks, G, R, d] as [T, H, d]."""
    x_QGhRd = x_QGRd.unflatten(2, (-1, BLOCK_TOKENS))
    return x_QGhRd.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)[:num_tokens]
