"""What the ranks compute in the tests, and the oracle: one process and one materialised softmax."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from dseek.parallel.block_lists import BlockLists, dense_lists, listed, window_lists
from dseek.parallel.context_parallel import ContextParallel

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 8
WINDOW_BLOCKS = 2
TOP_BLOCKS = 2
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One sequence to compute."""

    length: int
    pattern: str
    """dense, window or dynamic."""
    layout: str = "zigzag"
    dtype: str = "fp64"

    def __str__(self) -> str:
        """Name the test's case."""
        return f"{self.length}-{self.pattern}-{self.layout}-{self.dtype}"


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make the same queries [n, H, d], keys and values [n, G, d] in every process.

    Args:
        case: its length and dtype.
    """
    generator = torch.Generator().manual_seed(case.length)
    heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    q, k, v = (
        torch.randn((case.length, number, HEAD_DIM), generator=generator, dtype=torch.float64).to(DTYPES[case.dtype])
        for number in heads
    )
    return q, k, v


def scores_of(q_QHd: torch.Tensor, mean_CGd: torch.Tensor) -> torch.Tensor:
    """Score cells for a group: the best of its heads.

    Args:
        q_QHd: [Q, H, d] the first query of each block.
        mean_CGd: [C, G, d] mean keys.

    Returns:
        [Q, G, C].
    """
    q_QGRd = q_QHd.unflatten(1, (NUM_KV_HEADS, -1))
    return torch.einsum("qgrd,cgd->qgrc", q_QGRd, mean_CGd).amax(dim=2)


def select(context: ContextParallel, q_THd: torch.Tensor, mean_CGd: torch.Tensor) -> tuple[BlockLists, torch.Tensor]:
    """Choose blocks on a rank: own, one before, the first, and the best others; the rest are far.

    Args:
        context: the rank.
        q_THd: [T, H, d] its queries.
        mean_CGd: [blocks, G, d] mean keys of all blocks.

    Returns:
        The lists and, bool [Q, G, blocks], which blocks are far.
    """
    scores = scores_of(q_THd[::64], mean_CGd)
    far = torch.zeros(scores.shape, dtype=torch.bool)
    lists = []
    for query, block in enumerate(context.query_blocks):
        for group in range(NUM_KV_HEADS):
            exact = {0, block, max(0, block - 1)}
            others = [other for other in range(block) if other not in exact]
            others.sort(key=lambda other: -float(scores[query, group, other]))
            exact |= set(others[:TOP_BLOCKS])
            far[query, group, others[TOP_BLOCKS:]] = True
            lists.append(sorted(exact))
    return listed(lists), far


def attend_far(
    q_THd: torch.Tensor, k_CGd: torch.Tensor, v_CGd: torch.Tensor, far_QGC: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the far cells, each as 64 tokens at their mean.

    Args:
        q_THd: [T, H, d] queries of a rank.
        k_CGd: [C, G, d] mean keys.
        v_CGd: [C, G, d] mean values.
        far_QGC: bool [Q, G, C] which cells a query block's group has.

    Returns:
        Output [T, H, d] and log-sum-exp [T, H].
    """
    q_TGRd = q_THd.unflatten(1, (NUM_KV_HEADS, -1)).to(k_CGd.dtype)
    scores = torch.einsum("tgrd,cgd->tgrc", q_TGRd, k_CGd) / math.sqrt(HEAD_DIM) + math.log(64)
    seen = far_QGC.repeat_interleave(64, dim=0)[: q_THd.shape[0], :, None]
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return torch.einsum("tgrc,cgd->tgrd", weights, v_CGd).flatten(1, 2), lse.flatten(1, 2)


def block_means(x_SGd: torch.Tensor) -> torch.Tensor:
    """Average each block of 64 rows, the last one over what it has.

    Args:
        x_SGd: [S, G, d].

    Returns:
        [ceil(S / 64), G, d], float32 at least.
    """
    wide = x_SGd.to(torch.promote_types(x_SGd.dtype, torch.float32))
    means = [rows.mean(dim=0) for rows in wide.split(64)] if wide.shape[0] else []
    return torch.stack(means) if means else wide


def lists_of(pattern: str, context: ContextParallel) -> BlockLists:
    """Make the lists of a pattern that selects nothing.

    Args:
        pattern: dense or window.
        context: the rank.
    """
    if pattern == "dense":
        return dense_lists(context.query_blocks)
    return window_lists(context.query_blocks, WINDOW_BLOCKS)


@functools.cache
def oracle(case: Case) -> torch.Tensor:
    """Compute a case whole.

    Args:
        case: which.

    Returns:
        [n, H, d] float64.
    """
    q, k, v = inputs(case)
    position = torch.arange(case.length)
    block = position // 64
    causal = position[None, :] <= position[:, None]
    key_block, query_block = block[None, :], block[:, None]
    means_k, means_v = block_means(k), block_means(v)
    num_blocks = means_k.shape[0]
    outputs = []
    for head in range(NUM_HEADS):
        group = head // (NUM_HEADS // NUM_KV_HEADS)
        mask, far = causal, torch.zeros((case.length, num_blocks), dtype=torch.bool)
        if case.pattern == "window":
            mask = causal & ((query_block - key_block <= WINDOW_BLOCKS) | (key_block == 0))
        elif case.pattern == "dynamic":
            exact_QB = torch.zeros((num_blocks, num_blocks), dtype=torch.bool)
            scores = scores_of(q[::64].to(means_k.dtype), means_k)[:, group]
            for row in range(num_blocks):
                exact_QB[row, [0, max(0, row - 1), row]] = True
                others = scores[row].masked_fill(exact_QB[row] | (torch.arange(num_blocks) > row), float("-inf"))
                best = others.topk(min(TOP_BLOCKS, num_blocks)).indices
                exact_QB[row, best[others[best] > float("-inf")]] = True
            mask = causal & exact_QB[block][:, block]
            far = ~exact_QB[block] & (torch.arange(num_blocks)[None, :] < query_block)
        keys = torch.cat([k[:, group].double(), means_k[:, group].double()])
        values = torch.cat([v[:, group].double(), means_v[:, group].double()])
        bias = torch.zeros(case.length + num_blocks, dtype=torch.float64)
        bias[case.length :] = math.log(64.0)
        scores = q[:, head].double() @ keys.T / math.sqrt(HEAD_DIM) + bias
        weights = scores.masked_fill(~torch.cat([mask, far], dim=1), float("-inf")).softmax(dim=-1)
        outputs.append(weights @ values)
    return torch.stack(outputs, dim=1)
