"""Dynamic attention for training on the CPU: key sets attended one by one, then merged by their log-sum-exp.

A query's keys fall into three disjoint sets: its own block up to itself, the exact blocks before it, and the far
cells. The first two go through PyTorch's flash attention, which returns the logarithm of each row's sum of
exponentials beside the output; outputs merge in proportion to these sums. Backward, each set's gradient is what flash
attention computes for it when it is given the *merged* output and log-sum-exp: a probability is exp(z - merged lse),
and the row's sum of gradient times output belongs to the merged row. So nothing of the size of the scores is kept.
Far cells are few, and are computed openly, since flash attention has no gradient for what is added to a score.

What it relies on: flash attention reports 0, not minus infinity, for a row without keys, so no set without keys is
ever passed; its causal mask is aligned to the first key, so it is used on the own block only, which has as many
queries as keys. It does not know sequences that begin in a cache (serving needs no gradient), nor second derivatives.

T tokens, N complete blocks, C cells of all levels, U query blocks (of one group each) computed together, R rows of a
block, X keys or cells, H query heads in G groups of h, L levels, d head width.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dseek.core.attention_pattern import BLOCK_TOKENS, AttentionPattern
from dseek.ops.attention.pyramid import build_pyramid, tabulate
from dseek.ops.attention.selection import Selection, query_blocks, select

MAX_GATHERED_TOKENS = 1 << 16
"""Exact keys gathered at once, which bounds the memory beside the tensors themselves."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def merged_dynamic_attention(
    q_THd: torch.Tensor,
    k_TGd: torch.Tensor,
    v_TGd: torch.Tensor,
    choices: AttentionPattern | Selection,
    *,
    level_bias_HL: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend as `dynamic_attention` does, over a whole sequence, with a backward that keeps no scores.

    Args:
        q_THd: [T, H, d] rotated queries, on the CPU.
        k_TGd: [T, G, d] rotated keys of the same positions, in the dtype of the queries; H is a multiple of G.
        v_TGd: [T, G, d] values, likewise.
        choices: what each query block attends to, or a pattern to choose it by (see `select`).
        level_bias_HL: [H, L] added to the scores of far cells by level; minus infinity leaves a level out; None is 0.

    Returns:
        [T, H, d] in the dtype of the queries, differentiable in everything but the choices.
        Source: Dao et al. 2022, FlashAttention, section 3.1 (merging) and appendix B.2 (gradient).
    """
    assert len(q_THd) == len(k_TGd) == len(v_TGd) > 0, "a whole sequence: queries and keys of the same positions"
    if isinstance(choices, AttentionPattern):
        choices = select(q_THd, k_TGd, choices, start=0)
    table = tabulate(build_pyramid(k_TGd, v_TGd))
    bias_HC = table.bias(level_bias_HL).expand(q_THd.shape[1], -1)
    far = [
        _FarSet(rows=slice(first, past), group=group, places=table.places(choice.far_cells))
        for block, first, past in query_blocks(0, len(q_THd))
        for group, choice in enumerate(choices[block])
        if choice.far_cells
    ]
    sets = _KeySets(exact=_exact_sets(choices, len(q_THd)), far=far)
    out: torch.Tensor = _MergedAttention.apply(q_THd, k_TGd, v_TGd, table.key_mean, table.value_mean, bias_HC, sets)
    return out


def merge(
    out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the outputs of the same queries over two disjoint sets of keys.

    Args:
        out: [..., d] output over the first set.
        lse: [...] logarithm of the sum of the exponentials of its scores; minus infinity where a row has no keys.
        other_out: [..., d] output over the second set.
        other_lse: [...] its log-sum-exp.

    Returns:
        Output and log-sum-exp over both; a row without keys in either has output 0.
        Source: Dao et al. 2022, FlashAttention, section 3.1.
    """
    both = torch.logaddexp(lse, other_lse)
    base = torch.where(both == -math.inf, 0.0, both)
    return (lse - base).exp()[..., None] * out + (other_lse - base).exp()[..., None] * other_out, both


@dataclass(frozen=True, kw_only=True, slots=True)
class _ExactSet:
    """Exact keys of query blocks that have equally many of them."""

    rows: torch.Tensor
    """int64 [U, R] positions of the queries."""
    groups: torch.Tensor
    """int64 [U, 1] group of each."""
    blocks: torch.Tensor
    """int64 [U, B] their exact blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _FarSet:
    """Far cells of one query block and group."""

    rows: slice
    group: int
    places: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class _KeySets:
    exact: list[_ExactSet]
    far: list[_FarSet]


def _exact_sets(selection: Selection, num_tokens: int) -> list[_ExactSet]:
    """Put query blocks with as many rows and exact blocks together, within the bound on gathered keys."""
    alike: dict[tuple[int, int], list[tuple[int, int, tuple[int, ...]]]] = defaultdict(list)
    for block, first, past in query_blocks(0, num_tokens):
        for group, choice in enumerate(selection[block]):
            if choice.exact_blocks:
                alike[past - first, len(choice.exact_blocks)].append((first, group, choice.exact_blocks))
    sets: list[_ExactSet] = []
    for (num_rows, num_blocks), members in alike.items():
        together = max(1, MAX_GATHERED_TOKENS // (num_blocks * BLOCK_TOKENS))
        for at in range(0, len(members), together):
            firsts, groups, blocks = zip(*members[at : at + together], strict=True)
            sets.append(
                _ExactSet(
                    rows=torch.tensor(firsts)[:, None] + torch.arange(num_rows),
                    groups=torch.tensor(groups)[:, None],
                    blocks=torch.tensor(blocks),
                )
            )
    return sets


class _MergedAttention(torch.autograd.Function):
    """The merged forward, and the backward through each key set."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        q_THd, k_TGd, v_TGd, far_k_CGd, far_v_CGd, bias_HC, sets = inputs
        heads = q_THd.shape[1] // k_TGd.shape[1]
        out_THd, lse_TH = _own_forward(q_THd, k_TGd, v_TGd)
        out_TGhd, lse_TGh = _by_group(out_THd, heads), _by_group(lse_TH, heads)
        q_TGhd = _by_group(q_THd, heads)
        k_NGRd, v_NGRd = _complete_blocks(k_TGd), _complete_blocks(v_TGd)

        for exact in sets.exact:
            at = (exact.rows, exact.groups)
            part, lse = _flash(*_exact_operands(exact, q_TGhd, k_NGRd, v_NGRd))
            part, lse = part.reshape_as(out_TGhd[at]), lse.reshape_as(lse_TGh[at])
            out_TGhd[at], lse_TGh[at] = merge(out_TGhd[at], lse_TGh[at], part.to(out_TGhd.dtype), lse)

        for far in sets.far:
            at = (far.rows, far.group)
            z_RhX = _far_scores(far, q_TGhd, far_k_CGd, bias_HC)
            lse = z_RhX.logsumexp(-1)
            # Where the bias leaves out all cells, the weights are 0.
            base = torch.where(lse == -math.inf, 0.0, lse)
            part = (z_RhX - base[..., None]).exp() @ far_v_CGd[far.places, far.group]
            out_TGhd[at], lse_TGh[at] = merge(out_TGhd[at], lse_TGh[at], part, lse)

        out_THd = out_TGhd.flatten(1, 2).to(q_THd.dtype)
        ctx.sets = sets
        ctx.save_for_backward(*inputs[:-1], out_THd, lse_TGh.flatten(1, 2))
        return out_THd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_THd, k_TGd, v_TGd, far_k_CGd, far_v_CGd, bias_HC, out_THd, lse_TH = ctx.saved_tensors
        heads = q_THd.shape[1] // k_TGd.shape[1]
        wide = lse_TH.dtype
        do_THd = gradients[0].contiguous()
        dq_THd, dk_TGd, dv_TGd = _own_backward(do_THd, q_THd, k_TGd, v_TGd, out_THd, lse_TH)
        q_TGhd, do_TGhd, out_TGhd, lse_TGh, dq_TGhd = (
            _by_group(tensor, heads) for tensor in (q_THd, do_THd, out_THd, lse_TH, dq_THd)
        )

        k_NGRd, v_NGRd = _complete_blocks(k_TGd), _complete_blocks(v_TGd)
        block_dk_NGRd, block_dv_NGRd = (torch.zeros_like(k_NGRd, dtype=wide) for _ in range(2))
        for exact in ctx.sets.exact:
            at = (exact.rows, exact.groups)
            operands = _exact_operands(exact, q_TGhd, k_NGRd, v_NGRd)
            do, out, lse = (_fold(tensor[at]) for tensor in (do_TGhd, out_TGhd, lse_TGh))
            dq, dk, dv = _flash_backward(do, *operands, out, lse, 0.0, False)
            dq_TGhd[at] += dq.reshape_as(q_TGhd[at])
            _add_blocks(block_dk_NGRd, exact, dk)
            _add_blocks(block_dv_NGRd, exact, dv)
        complete = len(k_NGRd) * BLOCK_TOKENS
        dk_TGd[:complete] += _unblock(block_dk_NGRd)
        dv_TGd[:complete] += _unblock(block_dv_NGRd)

        far_dk_CGd, far_dv_CGd, dbias_HC = (torch.zeros_like(tensor) for tensor in (far_k_CGd, far_v_CGd, bias_HC))
        for far in ctx.sets.far:
            at = (far.rows, far.group)
            members = slice(far.group * heads, (far.group + 1) * heads)
            do_Rhd = do_TGhd[at].to(wide)
            weights_RhX = (_far_scores(far, q_TGhd, far_k_CGd, bias_HC) - lse_TGh[at][..., None]).exp()
            row_Rh = (do_Rhd * out_TGhd[at]).sum(-1, keepdim=True)
            dz_RhX = weights_RhX * (do_Rhd @ far_v_CGd[far.places, far.group].mT - row_Rh)
            scaled_RhX = dz_RhX / math.sqrt(q_THd.shape[2])
            dq_TGhd[at] += scaled_RhX @ far_k_CGd[far.places, far.group]
            far_dk_CGd[far.places, far.group] += torch.einsum("rhx,rhd->xd", scaled_RhX, q_TGhd[at].to(wide))
            far_dv_CGd[far.places, far.group] += torch.einsum("rhx,rhd->xd", weights_RhX, do_Rhd)
            dbias_HC[members, far.places] += dz_RhX.sum(0)

        narrow = [dq_TGhd.flatten(1, 2).to(q_THd.dtype), dk_TGd.to(k_TGd.dtype), dv_TGd.to(v_TGd.dtype)]
        return (*narrow, far_dk_CGd, far_dv_CGd, dbias_HC, None)


def _by_group(x_TH: torch.Tensor, heads: int) -> torch.Tensor:
    """[T, H, ...] as [T, G, h, ...]."""
    return x_TH.unflatten(1, (-1, heads))


def _fold(x_UAB: torch.Tensor) -> torch.Tensor:
    """[U, A, B, ...] as [U, 1, A B, ...]: without a mask, a group's heads are more rows, and blocks are just keys."""
    return x_UAB.flatten(1, 2)[:, None].contiguous()


def _complete_blocks(x_TGd: torch.Tensor) -> torch.Tensor:
    """The complete blocks of [T, G, d], as [blocks, G, 64, d]."""
    num_blocks = len(x_TGd) // BLOCK_TOKENS
    return _blocks(x_TGd, slice(0, num_blocks * BLOCK_TOKENS), BLOCK_TOKENS)


def _exact_operands(
    exact: _ExactSet, q_TGhd: torch.Tensor, k_NGRd: torch.Tensor, v_NGRd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gather queries [U, 1, R h, d], keys and values [U, 1, X, d]."""
    at = (exact.blocks, exact.groups)
    return _fold(q_TGhd[exact.rows, exact.groups]), _fold(k_NGRd[at]), _fold(v_NGRd[at])


def _add_blocks(total_NGRd: torch.Tensor, exact: _ExactSet, part: torch.Tensor) -> None:
    """Add gradients [U, 1, X, d] of gathered keys or values to those of their blocks.

    One block is a key of many query blocks; `index_add_` adds them in a fixed order.
    """
    places = (exact.blocks * total_NGRd.shape[1] + exact.groups).flatten()
    rows = part.to(total_NGRd.dtype).reshape(len(places), *total_NGRd.shape[2:])
    total_NGRd.flatten(0, 1).index_add_(0, places, rows)


def _far_scores(far: _FarSet, q_TGhd: torch.Tensor, far_k_CGd: torch.Tensor, bias_HC: torch.Tensor) -> torch.Tensor:
    """Scores [R, h, X] of a query block's far cells."""
    q_Rhd = q_TGhd[far.rows, far.group].to(far_k_CGd.dtype)
    heads = q_Rhd.shape[1]
    bias_hX = bias_HC[far.group * heads : (far.group + 1) * heads, far.places]
    return q_Rhd @ far_k_CGd[far.places, far.group].mT / math.sqrt(q_Rhd.shape[2]) + bias_hX


def _own_spans(num_tokens: int) -> Iterator[tuple[slice, int]]:
    """Tokens of the complete blocks, then of the partial one, each with the rows of a block."""
    complete = num_tokens // BLOCK_TOKENS * BLOCK_TOKENS
    if complete:
        yield slice(0, complete), BLOCK_TOKENS
    if complete < num_tokens:
        yield slice(complete, num_tokens), num_tokens - complete


def _blocks(x_TH: torch.Tensor, span: slice, rows: int, repeats: int = 1) -> torch.Tensor:
    """[T, H, ...] as [blocks, H, rows, ...], each head as often as wanted."""
    return (
        x_TH[span]
        .unflatten(0, ((span.stop - span.start) // rows, rows))
        .transpose(1, 2)
        .repeat_interleave(repeats, dim=1)
        .contiguous()
    )


def _unblock(x_UHR: torch.Tensor) -> torch.Tensor:
    """[blocks, H, rows, ...] as [T, H, ...]."""
    return x_UHR.transpose(1, 2).flatten(0, 1)


def _own_forward(q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the own block, causally; output [T, H, d] and log-sum-exp [T, H] in the dtype to merge in."""
    heads = q_THd.shape[1] // k_TGd.shape[1]
    outs: list[torch.Tensor] = []
    lses: list[torch.Tensor] = []
    for span, rows in _own_spans(len(q_THd)):
        q, k, v = _blocks(q_THd, span, rows), _blocks(k_TGd, span, rows, heads), _blocks(v_TGd, span, rows, heads)
        out, lse = _flash(q, k, v, 0.0, True)
        outs.append(_unblock(out))
        lses.append(_unblock(lse))
    lse_TH = torch.cat(lses)
    return torch.cat(outs).to(lse_TH.dtype), lse_TH


def _own_backward(
    do_THd: torch.Tensor,
    q_THd: torch.Tensor,
    k_TGd: torch.Tensor,
    v_TGd: torch.Tensor,
    out_THd: torch.Tensor,
    lse_TH: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values through the own block, in the dtype to add in."""
    heads = q_THd.shape[1] // k_TGd.shape[1]
    parts: list[list[torch.Tensor]] = []
    for span, rows in _own_spans(len(q_THd)):
        do, q, out, lse = (_blocks(tensor, span, rows) for tensor in (do_THd, q_THd, out_THd, lse_TH))
        k, v = (_blocks(tensor, span, rows, heads) for tensor in (k_TGd, v_TGd))
        gradients = _flash_backward(do, q, k, v, out, lse, 0.0, True)
        parts.append([_unblock(gradient).to(lse_TH.dtype) for gradient in gradients])
    dq_THd, dk_THd, dv_THd = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return dq_THd, _by_group(dk_THd, heads).sum(2), _by_group(dv_THd, heads).sum(2)
