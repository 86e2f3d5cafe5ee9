"""Dynamic attention for training on the CPU: all keys of a query block merged into one table, forwards and backwards.

A query's keys fall into three disjoint sets: its own block up to itself, the exact blocks before it, and the far
cells. The blocks of one group are gathered side by side, the far cells behind them, so that a row's softmax is whole
at once and the products are plain matrix products of many query blocks at a time. Nothing of the size of the scores is
kept: backward gathers and computes them anew, some query blocks at a time. Where the choices follow from a pattern,
the kernel selects and computes the forward, and backward follows its selection.

Everything is computed in float32 (float64 where the tensors have it): a score rounded to bfloat16 would put a
probability off by percents, and rounding the rest costs as much time as it saves. Groups know nothing of each other
and are computed side by side, a thread each where there are enough of them, so that threads need not meet after every
operator; the widened copies are those of the groups under way. It does not know sequences that begin in a cache
(serving needs no gradient), nor second derivatives.

T tokens in N blocks (the last one filled up with zeros), C cells of all levels, U query blocks (of one group) computed
together, R rows of them (64 for each of the h query heads in a group, head after head), B key blocks, F far cells,
X keys and cells together, H query heads in G groups, L levels, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dseek.core.attention_pattern import BLOCK_TOKENS, AttentionPattern
from dseek.ops.attention.native_dynamic import native_dynamic_attention
from dseek.ops.attention.pyramid import CellTable, build_pyramid, tabulate
from dseek.ops.attention.selection import BlockChoice, Selection, select
from dseek.ops.side_by_side import side_by_side

SCORES_PER_THREAD = 1 << 18
"""Scores computed at once for each thread: enough to share out, few enough to stay in a core's cache."""


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
        Source: Dao et al. 2022, FlashAttention, section 3.1 (recomputation in backward) and appendix B.2 (gradient).
    """
    assert len(q_THd) == len(k_TGd) == len(v_TGd) > 0, "a whole sequence: queries and keys of the same positions"
    done_THd = None
    if isinstance(choices, AttentionPattern):
        inputs = [tensor for tensor in (q_THd, k_TGd, v_TGd, level_bias_HL) if tensor is not None]
        is_recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        done = native_dynamic_attention(
            q_THd, k_TGd, v_TGd, choices, level_bias_HL=level_bias_HL, with_selection=is_recorded
        )
        if done is None:
            choices = select(q_THd, k_TGd, choices, start=0)
        elif not is_recorded:
            return done[0]
        else:
            done_THd, choices = done
    table = _far_table(k_TGd, v_TGd, choices)
    bias_HC = table.bias(level_bias_HL).expand(q_THd.shape[1], -1)
    work = _Work(choices=choices, table=table, done=done_THd)
    out: torch.Tensor = _MergedAttention.apply(q_THd, k_TGd, v_TGd, table.key_mean, table.value_mean, bias_HC, work)
    return out


@dataclass(kw_only=True, slots=True)
class _Work:
    """What is no tensor to differentiate."""

    choices: Selection
    table: CellTable
    done: torch.Tensor | None
    """[T, H, d] the output where it is computed already."""


def _far_table(k_TGd: torch.Tensor, v_TGd: torch.Tensor, choices: Selection) -> CellTable:
    """Summarise the cells, or none of them where nobody looks at one."""
    is_seen = any(choice.far_cells for groups in choices.values() for choice in groups)
    num_tokens = len(k_TGd) if is_seen else 0
    return tabulate(build_pyramid(k_TGd[:num_tokens], v_TGd[:num_tokens]))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chunk:
    """Query blocks of one group that are computed together; where one has fewer keys, the rest is hidden."""

    queries: torch.Tensor
    """int64 [U] the query blocks."""
    keys: torch.Tensor
    """int64 [U, B] key blocks: the query block itself, then the exact ones."""
    cells: torch.Tensor
    """int64 [U, F] places of the far cells."""
    hidden: torch.Tensor | None
    """bool [U, B + F] which entries are not there; None where all are."""


def _chunks(choices: Sequence[BlockChoice], table: CellTable, rows: int) -> Iterator[_Chunk]:
    """Put the query blocks of a group together, those with about as many keys, within the bound on scores.

    Args:
        choices: of each query block.
        table: where the far cells are.
        rows: rows of a query block, R.

    Yields:
        Chunks that have every query block once.
    """
    most = SCORES_PER_THREAD * torch.get_num_threads()
    sizes = [(1 + len(choice.exact_blocks), len(choice.far_cells)) for choice in choices]
    members: list[int] = []
    num_blocks = num_cells = 0
    for block in sorted(range(len(choices)), key=sizes.__getitem__):
        wider = max(num_blocks, sizes[block][0]), max(num_cells, sizes[block][1])
        if members and (len(members) + 1) * rows * (BLOCK_TOKENS * wider[0] + wider[1]) > most:
            yield _chunk(choices, table, members, num_blocks, num_cells)
            members, wider = [], sizes[block]
        members.append(block)
        num_blocks, num_cells = wider
    yield _chunk(choices, table, members, num_blocks, num_cells)


def _chunk(
    choices: Sequence[BlockChoice], table: CellTable, members: list[int], num_blocks: int, num_cells: int
) -> _Chunk:
    """Write down a chunk; what fills a row up is block 0 and cell 0, hidden."""
    keys = [[block, *choices[block].exact_blocks] for block in members]
    cells = [table.places(choices[block].far_cells) for block in members]
    hidden = None
    if any(len(row) < num_blocks for row in keys) or any(len(row) < num_cells for row in cells):
        there = torch.arange(num_blocks + num_cells)
        there = torch.where(there < num_blocks, there, there - num_blocks)
        counts = torch.tensor(
            [[len(row)] * num_blocks + [len(far)] * num_cells for row, far in zip(keys, cells, strict=True)]
        )
        hidden = there >= counts
    return _Chunk(
        queries=torch.tensor(members),
        keys=torch.tensor([row + [0] * (num_blocks - len(row)) for row in keys]),
        cells=torch.tensor([row + [0] * (num_cells - len(row)) for row in cells], dtype=torch.int64),
        hidden=hidden,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """One group's tensors, widened, in blocks."""

    queries: torch.Tensor
    """[N, R, d], already divided by the square root of d."""
    keys: torch.Tensor
    """[N, 64, d]."""
    values: torch.Tensor
    """[N, 64, d]."""
    far_keys: torch.Tensor
    """[C, d]."""
    far_values: torch.Tensor
    """[C, d]."""
    bias: torch.Tensor
    """[h, C] added to the scores of the far cells."""
    later: torch.Tensor
    """[64, 64] minus infinity where a key of the own block is later than the query, else 0."""

    def gather(self, blocks_NBd: torch.Tensor, cells_Cd: torch.Tensor, chunk: _Chunk) -> torch.Tensor:
        """Bring the keys or values of a chunk together, [U, X, d]."""
        num_units = len(chunk.queries)
        x_UXd = blocks_NBd.index_select(0, chunk.keys.flatten()).view(num_units, -1, blocks_NBd.shape[2])
        if not chunk.cells.numel():
            return x_UXd
        return torch.cat([x_UXd, cells_Cd[chunk.cells]], dim=1)

    def weights(self, q_URd: torch.Tensor, k_UXd: torch.Tensor, chunk: _Chunk) -> torch.Tensor:
        """Compute the probabilities of a chunk, [U, R, X]."""
        z_URX = torch.bmm(q_URd, k_UXd.mT)
        z_UhrX = z_URX.unflatten(1, (-1, BLOCK_TOKENS))
        z_UhrX[..., :BLOCK_TOKENS] += self.later
        if chunk.cells.numel():
            z_UhrX[..., -chunk.cells.shape[1] :] += self.bias[:, chunk.cells].transpose(0, 1)[:, :, None]
        if chunk.hidden is not None:
            num_blocks = chunk.keys.shape[1]
            blocks, cells = chunk.hidden[:, :num_blocks], chunk.hidden[:, num_blocks:]
            hidden_UX = torch.cat([blocks.repeat_interleave(BLOCK_TOKENS, dim=1), cells], dim=1)
            z_URX.masked_fill_(hidden_UX[:, None], -math.inf)
        return torch.softmax(z_URX, dim=-1)


class _MergedAttention(torch.autograd.Function):
    """Both directions, each group chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        *tensors, work = inputs
        ctx.work = work
        ctx.save_for_backward(*tensors)
        if work.done is not None:
            done_THd: torch.Tensor = work.done
            work.done = None
            return done_THd
        out_THd = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)

        def attend(index: int) -> None:
            group, chunks = _group(index, tensors, work)
            out_NRd = torch.empty_like(group.queries)
            for chunk in chunks:
                k_UXd = group.gather(group.keys, group.far_keys, chunk)
                weights_URX = group.weights(group.queries[chunk.queries], k_UXd, chunk)
                v_UXd = group.gather(group.values, group.far_values, chunk)
                out_NRd.index_copy_(0, chunk.queries, torch.bmm(weights_URX, v_UXd))
            _put(out_THd, index, out_NRd)

        side_by_side(tensors[1].shape[1], attend)
        return out_THd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_THd, k_TGd, *_ = tensors = ctx.saved_tensors
        dq_THd, dk_TGd, dv_TGd = (
            torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors[:3]
        )
        far_dk_CGd, far_dv_CGd, dbias_HC = (torch.zeros_like(tensor) for tensor in tensors[3:])
        scale = 1.0 / math.sqrt(q_THd.shape[2])

        def turn_back(index: int) -> None:
            group, chunks = _group(index, tensors, ctx.work)
            do_NRd = _blocks(gradients[0], index, k_TGd.shape[1])
            dq_NRd, dk_NBd, dv_NBd = torch.empty_like(group.queries), *(torch.zeros_like(group.keys) for _ in range(2))
            for chunk in chunks:
                # 1. The probabilities again.
                q_URd, do_URd = (x_NRd.index_select(0, chunk.queries) for x_NRd in (group.queries, do_NRd))
                k_UXd = group.gather(group.keys, group.far_keys, chunk)
                weights_URX = group.weights(q_URd, k_UXd, chunk)

                # 2. Through the sum of values and the softmax.
                dweights_URX = torch.bmm(do_URd, group.gather(group.values, group.far_values, chunk).mT)
                dv_UXd = torch.bmm(weights_URX.mT, do_URd)
                dz_URX = torch.ops.aten._softmax_backward_data(dweights_URX, weights_URX, -1, weights_URX.dtype)

                # 3. Through the scores.
                dq_NRd.index_copy_(0, chunk.queries, torch.bmm(dz_URX, k_UXd))
                dk_UXd = torch.bmm(dz_URX.mT, q_URd)

                # 4. A key block belongs to many query blocks; `index_add_` adds them in a fixed order.
                num_cells = chunk.cells.shape[1]
                for total_NBd, part_UXd in ((dk_NBd, dk_UXd), (dv_NBd, dv_UXd)):
                    blocks_UXd = part_UXd[:, : part_UXd.shape[1] - num_cells]
                    total_NBd.index_add_(0, chunk.keys.flatten(), blocks_UXd.reshape(-1, *total_NBd.shape[1:]))
                if num_cells:
                    places = chunk.cells.flatten()
                    for far_CGd, part_UXd in ((far_dk_CGd, dk_UXd), (far_dv_CGd, dv_UXd)):
                        far_CGd[:, index].index_add_(0, places, part_UXd[:, -num_cells:].flatten(0, 1))
                    dbias_hUF = dz_URX[..., -num_cells:].unflatten(1, (-1, BLOCK_TOKENS)).sum(2).transpose(0, 1)
                    heads = len(group.bias)
                    members = slice(index * heads, (index + 1) * heads)
                    dbias_HC[members].index_add_(1, places, dbias_hUF.flatten(1))
            _put(dq_THd, index, dq_NRd.mul_(scale))
            _put(dk_TGd, index, dk_NBd)
            _put(dv_TGd, index, dv_NBd)

        side_by_side(k_TGd.shape[1], turn_back)
        return dq_THd, dk_TGd, dv_TGd, far_dk_CGd, far_dv_CGd, dbias_HC, None


def _group(index: int, tensors: Sequence[torch.Tensor], work: _Work) -> tuple[_Group, Iterator[_Chunk]]:
    """Widen a group's tensors; put its query blocks together."""
    q_THd, k_TGd, v_TGd, far_k_CGd, far_v_CGd, bias_HC = tensors
    num_groups, heads = k_TGd.shape[1], q_THd.shape[1] // k_TGd.shape[1]
    q_NRd, k_NBd, v_NBd = (_blocks(tensor, index, num_groups) for tensor in (q_THd, k_TGd, v_TGd))
    group = _Group(
        queries=q_NRd.mul_(1.0 / math.sqrt(q_THd.shape[2])),
        keys=k_NBd,
        values=v_NBd,
        far_keys=far_k_CGd[:, index],
        far_values=far_v_CGd[:, index],
        bias=bias_HC[index * heads : (index + 1) * heads],
        later=torch.full((BLOCK_TOKENS, BLOCK_TOKENS), -math.inf, dtype=q_NRd.dtype).triu_(1),
    )
    choices = [work.choices[block][index] for block in range(len(q_NRd))]
    return group, _chunks(choices, work.table, q_NRd.shape[1])


def _blocks(x_THd: torch.Tensor, group: int, num_groups: int) -> torch.Tensor:
    """Copy a group's heads of [T, H, d], widened, as [N, R, d]; rows after the last token are 0."""
    heads = x_THd.shape[1] // num_groups
    complete, rest = divmod(len(x_THd), BLOCK_TOKENS)
    dtype = torch.promote_types(x_THd.dtype, torch.float32)
    x_NhRd = x_THd.new_empty((complete + (rest > 0), heads, BLOCK_TOKENS, x_THd.shape[2]), dtype=dtype)
    if rest:
        x_NhRd[complete].zero_()
    for target, source in zip(_parts_of_blocks(x_NhRd, rest), _parts_of_tokens(x_THd, group, heads), strict=True):
        target.copy_(source)
    return x_NhRd.flatten(1, 2)


def _put(x_THd: torch.Tensor, group: int, x_NRd: torch.Tensor) -> None:
    """Write [N, R, d] to a group's heads of [T, H, d], rounded to its dtype."""
    rest = len(x_THd) % BLOCK_TOKENS
    x_NhRd = x_NRd.unflatten(1, (-1, BLOCK_TOKENS))
    parts = _parts_of_tokens(x_THd, group, x_NhRd.shape[1])
    for target, source in zip(parts, _parts_of_blocks(x_NhRd, rest), strict=True):
        target.copy_(source)


def _parts_of_tokens(x_THd: torch.Tensor, group: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """View the complete blocks [blocks, h, 64, d] and the partial one [h, rows, d] of a group's heads."""
    x_Thd = x_THd[:, group * heads : (group + 1) * heads]
    complete = len(x_Thd) // BLOCK_TOKENS
    tokens = complete * BLOCK_TOKENS
    return x_Thd[:tokens].unflatten(0, (complete, BLOCK_TOKENS)).transpose(1, 2), x_Thd[tokens:].transpose(0, 1)


def _parts_of_blocks(x_NhRd: torch.Tensor, rest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """View the same parts of [N, h, 64, d], whose last block has so many tokens, or is complete where there are 0."""
    complete = len(x_NhRd) - (rest > 0)
    return x_NhRd[:complete], x_NhRd[-1, :, :rest]
