"""Attention over listed key blocks, with its log-sum-exp: a part that can be merged with parts over other keys.

Plain PyTorch. Nothing outside the listed blocks is read.

    T query rows, S key rows, H query heads, G key and value heads, d head width
"""

from __future__ import annotations

import itertools
import math

import torch

BLOCK_TOKENS = 64
"""Tokens of a block, one page of the cache."""


def attend_blocks(
    q_THd: torch.Tensor,
    k_SGd: torch.Tensor,
    v_SGd: torch.Tensor,
    query_blocks: torch.Tensor,
    key_blocks: torch.Tensor,
    starts: torch.Tensor,
    blocks: torch.Tensor,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from blocks of queries to lists of key blocks.

    Args:
        q_THd: [T, H, d] queries, block after block; only the last block may be shorter than 64. H is a multiple of G.
        k_SGd: [S, G, d] keys, block after block; only the last block may be shorter than 64.
        v_SGd: [S, G, d] values.
        query_blocks: int64 [Q] places of the query blocks in the sequence, rising.
        key_blocks: int64 [N] places of the key blocks, rising.
        starts: int64 [Q * L + 1] bounds of the lists, L for each query block: 1, or G where each group has its own.
        blocks: int64, the lists one after the other: indices into `key_blocks`. Where the key block is the query block
            itself, attention is causal; every other listed block is seen whole.
        scale: multiplies the scores; None is 1 / sqrt(d).

    Returns:
        Output [T, H, d] and log-sum-exp of the scores [T, H], float32 (float64 where the queries have it); zeros and
        minus infinity where a list is empty.
        Source: Vaswani et al. 2017, Attention Is All You Need, section 3.2.1; Dao et al. 2022, FlashAttention,
        section 3.1.
    """
    num_queries, _, head_dim = q_THd.shape
    num_keys, num_kv_heads, _ = k_SGd.shape
    lists_each = (starts.numel() - 1) // max(1, query_blocks.numel())
    assert lists_each in (1, num_kv_heads) or num_queries == 0, "one list, or one for each group"
    dtype = torch.promote_types(q_THd.dtype, torch.float32)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    q_TGRd = q_THd.to(dtype).unflatten(1, (num_kv_heads, -1))
    out_TGRd = torch.zeros_like(q_TGRd)
    lse_TGR = torch.full(q_TGRd.shape[:3], float("-inf"), dtype=dtype)
    offsets = torch.arange(BLOCK_TOKENS)
    bounds = starts.tolist()

    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start == stop:
            continue
        query, group = divmod(number, lists_each)
        rows = slice(query * BLOCK_TOKENS, (query + 1) * BLOCK_TOKENS)
        groups = slice(None) if lists_each == 1 else slice(group, group + 1)
        listed = blocks[start:stop]
        tokens = (listed[:, None] * BLOCK_TOKENS + offsets).flatten()
        is_own = (key_blocks[listed] == query_blocks[query]).repeat_interleave(BLOCK_TOKENS)
        offset = offsets.repeat(listed.numel())
        exists = tokens < num_keys
        tokens, is_own, offset = tokens[exists], is_own[exists], offset[exists]

        q_tgrd = q_TGRd[rows, groups]
        hidden_ts = is_own & (offset > offsets[: q_tgrd.shape[0], None])
        scores_tgrs = torch.einsum("tgrd,sgd->tgrs", q_tgrd, k_SGd[tokens][:, groups].to(dtype)) * scale
        scores_tgrs = scores_tgrs.masked_fill(hidden_ts[:, None, None], float("-inf"))
        lse_TGR[rows, groups] = scores_tgrs.logsumexp(dim=-1)
        out_TGRd[rows, groups] = torch.einsum(
            "tgrs,sgd->tgrd", scores_tgrs.softmax(dim=-1), v_SGd[tokens][:, groups].to(dtype)
        )
    return out_TGRd.flatten(1, 2), lse_TGR.flatten(1, 2)
