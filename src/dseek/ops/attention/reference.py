"""Dense causal attention in plain PyTorch, written for being right rather than fast: the oracle of the native kernels.

T query rows, S key rows, H query heads, G key and value heads, d head width.
"""

from __future__ import annotations

import math

import torch


def causal_attention(
    q_THd: torch.Tensor,
    k_SGd: torch.Tensor,
    v_SGd: torch.Tensor,
    start: int | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attend from each query to the keys up to its own position.

    Args:
        q_THd: [T, H, d] queries of positions start to start + T - 1.
        k_SGd: [S, G, d] keys of positions 0 to S - 1; H is a multiple of G.
        v_SGd: [S, G, d] values.
        start: position of the first query; None means the queries are the newest rows, S - T.
        window: newest positions seen, the query's own included; None is all of them.
        scale: multiplies the scores; None is 1 / sqrt(d).

    Returns:
        [T, H, d] in the dtype of the queries; scores and softmax are taken in float32 (float64 where the queries have
        it).
        Source: Vaswani et al. 2017, Attention Is All You Need, section 3.2.1; Ainslie et al. 2023, GQA, section 2.2.
    """
    num_queries, num_heads, head_dim = q_THd.shape
    num_keys, num_kv_heads, _ = k_SGd.shape
    assert num_heads % num_kv_heads == 0, "query heads must come in groups"
    start = num_keys - num_queries if start is None else start
    assert 0 <= start <= num_keys - num_queries or num_queries == 0, "every query needs its own key"
    dtype = torch.promote_types(q_THd.dtype, torch.float32)

    group = num_heads // num_kv_heads
    k_SHd = k_SGd.to(dtype).repeat_interleave(group, dim=1)
    v_SHd = v_SGd.to(dtype).repeat_interleave(group, dim=1)
    scores_HTS = torch.einsum("thd,shd->hts", q_THd.to(dtype), k_SHd)
    scores_HTS = scores_HTS * (1.0 / math.sqrt(head_dim) if scale is None else scale)

    queries = torch.arange(start, start + num_queries, device=q_THd.device)
    visible_TS = visible(queries, torch.arange(num_keys, device=q_THd.device), window)
    weights_HTS = scores_HTS.masked_fill(~visible_TS, float("-inf")).softmax(dim=-1)
    return torch.einsum("hts,shd->thd", weights_HTS, v_SHd).to(q_THd.dtype)


def visible(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """Say which keys each query may see.

    Args:
        queries: [T] positions.
        keys: [S] positions.
        window: newest positions seen, the query's own included; None is all of them.

    Returns:
        bool [T, S].
    """
    mask = keys[None, :] <= queries[:, None]
    return mask if window is None else mask & (keys[None, :] > queries[:, None] - window)
