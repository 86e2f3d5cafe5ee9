"""Dynamic attention in plain PyTorch, written for being right rather than fast: the oracle of the native kernels.

For query t and one group of heads, the past [0, t] is parted into exact tokens (the query's own block up to t and the
blocks of its `BlockChoice`) and far cells; one softmax runs over both:

    token j:  z = q . k_j / sqrt(d)
    cell c:   z = q . mean key of c / sqrt(d) + log(tokens of c) + b[head, level of c]
    output:   sum of exp(z) v over sum of exp(z), v of a cell being its mean value

A cell whose keys are all equal thus counts exactly as its tokens would. `dynamic_attention` builds the whole table of
scores; `dynamic_attention_blocked` gathers for each query block what it needs and serves to 16K tokens and more. Both
are differentiable in q, k, v (through the means too) and b; the selection is a constant.

T query rows, S key rows, C cells of all levels, X keys and cells together, R rows of one query block, H query heads
in G groups, L levels, d head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from dseek.core.attention_pattern import BLOCK_TOKENS, AttentionPattern
from dseek.ops.attention.pyramid import build_pyramid, tabulate
from dseek.ops.attention.selection import Selection, block_tokens, query_blocks, select


def dynamic_attention(
    q_THd: torch.Tensor,
    k_SGd: torch.Tensor,
    v_SGd: torch.Tensor,
    choices: AttentionPattern | Selection,
    *,
    level_bias_HL: torch.Tensor | None = None,
    start: int | None = None,
) -> torch.Tensor:
    """Attend from each query to its exact tokens and far cells, through one table of T x (S + C) scores a head.

    Args:
        q_THd: [T, H, d] rotated queries of positions start to start + T - 1.
        k_SGd: [S, G, d] rotated keys of positions 0 to S - 1; H is a multiple of G.
        v_SGd: [S, G, d] values.
        choices: what each query block attends to, or a pattern to choose it by (see `select`).
        level_bias_HL: [H, L] added to the scores of far cells by level; minus infinity leaves a level out; None is 0.
        start: position of the first query; None means the queries are the newest rows, S - T.

    Returns:
        [T, H, d] in the dtype of the queries; means, scores and softmax are taken in float32 (float64 where the queries
        have it).
        Source: Vaswani et al. 2017, Attention Is All You Need, section 3.2.1, for the softmax over tokens.
    """
    start, selection = _resolve(q_THd, k_SGd, choices, start)
    dtype, heads, num_keys = q_THd.dtype, q_THd.shape[1] // k_SGd.shape[1], k_SGd.shape[0]
    q_THd, k_SGd, v_SGd = _widen(q_THd, k_SGd, v_SGd)
    table = tabulate(build_pyramid(k_SGd, v_SGd))
    keys_XHd = torch.cat([k_SGd, table.key_mean]).repeat_interleave(heads, dim=1)
    values_XHd = torch.cat([v_SGd, table.value_mean]).repeat_interleave(heads, dim=1)

    z_HTX = torch.einsum("thd,xhd->htx", q_THd, keys_XHd) / math.sqrt(q_THd.shape[2])
    z_HTX = z_HTX + F.pad(table.bias(level_bias_HL), (num_keys, 0))[:, None]

    counted_GTX = torch.zeros(k_SGd.shape[1], len(q_THd), len(keys_XHd), dtype=torch.bool, device=q_THd.device)
    for row in range(len(q_THd)):
        own = (start + row) // BLOCK_TOKENS
        counted_GTX[:, row, own * BLOCK_TOKENS : start + row + 1] = True
        for group, choice in enumerate(selection[own]):
            counted_GTX[group, row, block_tokens(choice.exact_blocks)] = True
            counted_GTX[group, row, [num_keys + place for place in table.places(choice.far_cells)]] = True

    z_HTX = z_HTX.masked_fill(~counted_GTX.repeat_interleave(heads, dim=0), float("-inf"))
    return torch.einsum("htx,xhd->thd", z_HTX.softmax(-1), values_XHd).to(dtype)


def dynamic_attention_blocked(
    q_THd: torch.Tensor,
    k_SGd: torch.Tensor,
    v_SGd: torch.Tensor,
    choices: AttentionPattern | Selection,
    *,
    level_bias_HL: torch.Tensor | None = None,
    start: int | None = None,
) -> torch.Tensor:
    """Attend as `dynamic_attention` does, one query block and group after another, over gathered keys and cells only.

    Args:
        q_THd: [T, H, d] rotated queries of positions start to start + T - 1.
        k_SGd: [S, G, d] rotated keys of positions 0 to S - 1; H is a multiple of G.
        v_SGd: [S, G, d] values.
        choices: what each query block attends to, or a pattern to choose it by (see `select`).
        level_bias_HL: [H, L] added to the scores of far cells by level; minus infinity leaves a level out; None is 0.
        start: position of the first query; None means the queries are the newest rows, S - T.

    Returns:
        [T, H, d] as `dynamic_attention` returns it, but for the order of summation.
    """
    start, selection = _resolve(q_THd, k_SGd, choices, start)
    dtype, heads = q_THd.dtype, q_THd.shape[1] // k_SGd.shape[1]
    q_THd, k_SGd, v_SGd = _widen(q_THd, k_SGd, v_SGd)
    table = tabulate(build_pyramid(k_SGd, v_SGd))
    bias_HC = table.bias(level_bias_HL).expand(q_THd.shape[1], -1)

    blocks_RHd: list[torch.Tensor] = []
    for own, first, past in query_blocks(start, len(q_THd)):
        groups_RHd: list[torch.Tensor] = []
        for group, choice in enumerate(selection[own]):
            members = slice(group * heads, (group + 1) * heads)
            tokens = torch.cat([block_tokens(choice.exact_blocks), torch.arange(own * BLOCK_TOKENS, past)])
            places = table.places(choice.far_cells)
            keys_Xd = torch.cat([k_SGd[tokens, group], table.key_mean[places, group]])
            values_Xd = torch.cat([v_SGd[tokens, group], table.value_mean[places, group]])

            q_RHd = q_THd[first - start : past - start, members]
            z_HRX = torch.einsum("rhd,xd->hrx", q_RHd, keys_Xd) / math.sqrt(q_RHd.shape[2])
            z_HRX = z_HRX + F.pad(bias_HC[members, places], (len(tokens), 0))[:, None]
            later_RX = F.pad(tokens > torch.arange(first, past)[:, None], (0, len(places)))
            weights_HRX = z_HRX.masked_fill(later_RX.to(z_HRX.device), float("-inf")).softmax(-1)
            groups_RHd.append(torch.einsum("hrx,xd->rhd", weights_HRX, values_Xd))
        blocks_RHd.append(torch.cat(groups_RHd, dim=1))
    return torch.cat(blocks_RHd).to(dtype)


def _resolve(
    q_THd: torch.Tensor, k_SGd: torch.Tensor, choices: AttentionPattern | Selection, start: int | None
) -> tuple[int, Selection]:
    """Fill in the first position; choose where only a pattern was given."""
    start = k_SGd.shape[0] - q_THd.shape[0] if start is None else start
    if isinstance(choices, AttentionPattern):
        choices = select(q_THd, k_SGd, choices, start=start)
    return start, choices


def _widen(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Compute in float32, or in float64 where the tensors have it."""
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
