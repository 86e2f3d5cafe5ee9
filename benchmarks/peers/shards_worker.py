"""One long sequence as subtasks with dynamic attention, and as one task with dense attention, in one process.

A subtask is a rank of `dseek.parallel.ContextParallel` (see `turns` for how eight of them share a process). Beside the
ranks' attention it sums its blocks' keys, gathers the sums of all, selects, and fetches the blocks that it selected.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.peers.turns import TurnRanks, run_in_turn
from benchmarks.peers.worker import Answer, Worker, serve
from dseek.core.attention_pattern import BLOCK_TOKENS, AttentionPattern
from dseek.ops import native
from dseek.ops.attention.cell_scores import tabulated_scorer
from dseek.ops.attention.native_dynamic import native_dynamic_attention
from dseek.ops.attention.partial_gathered import attend_gathered_blocks
from dseek.ops.attention.pyramid import block_key_sums, key_pyramid
from dseek.ops.attention.selection import choose
from dseek.parallel import BlockAssignment, dynamic_sharding
from dseek.parallel.block_lists import BlockLists, listed
from dseek.parallel.context_parallel import ContextParallel

SETTLE_S = 0.1

CHECKED_BLOCKS = 24
"""Query blocks, spread over the sequence, whose rows are computed again in float32."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one rank computed."""

    positions: torch.Tensor
    query_blocks: tuple[int, ...]
    lists: BlockLists
    out: torch.Tensor


class ShardsWorker(Worker):
    """Every tensor is bfloat16, drawn from a normal distribution."""

    def setup(self, threads: int, num_tokens: int, num_heads: int, num_groups: int, head_dim: int) -> Answer:
        """Draw the sequence; limit the threads of every task.

        Args:
            threads: of the dense task, and of each subtask while it runs.
            num_tokens: T.
            num_heads: H.
            num_groups: heads of keys and values.
            head_dim: width of a head.

        Returns:
            `variant` of the kernels.
        """
        self.threads = threads
        torch.set_num_threads(threads)
        self.kernels = native.require()
        self.kernels.set_num_threads(threads)
        generator = torch.Generator().manual_seed(num_tokens)
        self.q, self.k, self.v = (
            torch.randn((num_tokens, heads, head_dim), generator=generator).bfloat16()
            for heads in (num_heads, num_groups, num_groups)
        )
        return {"variant": self.kernels.variant()}

    def dense(self) -> Answer:
        """Dense causal attention of the whole by one task.

        Returns:
            `busy_s`.
        """
        views = [x.transpose(0, 1).contiguous().view(torch.uint16).numpy() for x in (self.q, self.k, self.v)]
        time.sleep(SETTLE_S)
        started = time.perf_counter()
        self.kernels.dense_attention(*views)
        return {"busy_s": time.perf_counter() - started}

    def shards(self, max_chunk_tokens: int, pattern: dict[str, Any], check: bool = False) -> Answer:
        """Dynamic attention by one subtask a chunk.

        Args:
            max_chunk_tokens: longest chunk.
            pattern: `window_tokens` and `top_blocks`.
            check: whether the result is judged.

        Returns:
            `busy_s` of each subtask, and `tokens` of each; with `check`: `difference` and `cosine` of spread rows and
            float32 attention over the blocks that were selected, and `same_choices`, the share of choices that the
            kernel makes too when it is given the whole sequence.
        """
        wanted = AttentionPattern(**{**pattern, "kind": "dynamic", "window_tokens": (pattern["window_tokens"],)})
        chunks = dynamic_sharding(len(self.q), max_chunk_tokens)
        blocks = tuple(tuple(range(c.start // BLOCK_TOKENS, -(-c.stop // BLOCK_TOKENS))) for c in chunks)
        assignment = BlockAssignment(blocks=blocks)
        own = [[x[chunk.start : chunk.stop] for x in (self.q, self.k, self.v)] for chunk in chunks]

        def subtask(ranks: TurnRanks) -> Piece:
            q, k, v = own[ranks.rank]
            return _subtask(ContextParallel(assignment, len(self.q), ranks), q, k, v, wanted)

        time.sleep(SETTLE_S)
        pieces, busy_s = run_in_turn(len(chunks), subtask, threads=self.threads)
        answer: Answer = {"busy_s": busy_s, "tokens": [len(chunk) for chunk in chunks]}
        return {**answer, **self._judge(pieces, wanted)} if check else answer

    def _judge(self, pieces: list[Piece], pattern: AttentionPattern) -> Answer:
        num_groups = self.k.shape[1]
        lists: dict[tuple[int, int], torch.Tensor] = {}
        for piece in pieces:
            bounds = piece.lists.starts.tolist()
            for number in range(piece.lists.num_lists):
                query, group = divmod(number, num_groups)
                lists[piece.query_blocks[query], group] = piece.lists.blocks[bounds[number] : bounds[number + 1]]
        out = torch.cat([piece.out for piece in pieces])
        assert torch.equal(torch.cat([piece.positions for piece in pieces]), torch.arange(len(out)))

        whole = native_dynamic_attention(self.q, self.k, self.v, pattern)
        assert whole is not None, "setup asked for the kernels"
        num_same = sum(
            tuple(lists[block, group].tolist()) == (*choice.exact_blocks, block)
            for block, choices in whole[1].items()
            for group, choice in enumerate(choices)
        )

        found, right = [], []
        num_blocks = -(-len(out) // BLOCK_TOKENS)
        for block in sorted(set(np.linspace(0, num_blocks - 1, CHECKED_BLOCKS, dtype=int).tolist())):
            rows = torch.arange(block * BLOCK_TOKENS, min((block + 1) * BLOCK_TOKENS, len(out)))
            for group in range(num_groups):
                keys = (lists[block, group][:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)).flatten()
                keys = keys[keys < len(out)]
                members = slice(group * len(self.q[0]) // num_groups, (group + 1) * len(self.q[0]) // num_groups)
                q_hRd = self.q[rows, members].float().transpose(0, 1)
                scores = q_hRd @ self.k[keys, group].float().T / q_hRd.shape[2] ** 0.5
                weights = scores.masked_fill(keys[None] > rows[:, None], float("-inf")).softmax(dim=-1)
                right.append((weights @ self.v[keys, group].float()).flatten())
                found.append(out[rows, members].float().transpose(0, 1).flatten())
        ours, theirs = torch.cat(found), torch.cat(right)
        return {
            "difference": float((ours - theirs).abs().max()),
            "cosine": float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)),
            "same_choices": num_same / len(lists),
        }


def _subtask(
    context: ContextParallel, q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGd: torch.Tensor, pattern: AttentionPattern
) -> Piece:
    """Compute dynamic attention of one rank's queries.

    Args:
        context: the rank.
        q_THd: [T, H, d] its queries.
        k_TGd: [T, G, d] its keys.
        v_TGd: [T, G, d] its values.
        pattern: what to attend to.
    """
    # 1. Everybody's sums of keys make the pyramid. An incomplete last block is nobody's cell.
    sums_NGd = k_TGd.new_zeros((len(context.query_blocks), *k_TGd.shape[1:]), dtype=torch.float32)
    own_sums = block_key_sums(k_TGd)
    sums_NGd[: len(own_sums)] = own_sums
    num_complete = context.sequence_length // BLOCK_TOKENS
    pyramid = key_pyramid(context.gather_blocks(sums_NGd)[:num_complete], context.sequence_length)

    # 2. Select.
    scorer = tabulated_scorer(q_THd[::BLOCK_TOKENS], context.query_blocks, pyramid)
    lists = listed(
        [
            (*choose(pattern, block, group, scorer).exact_blocks, block)
            for block in context.query_blocks
            for group in range(k_TGd.shape[1])
        ]
    )

    # 3. Fetch and attend.
    routes = context.routes(lists)
    out = context.attention(q_THd, k_TGd, v_TGd, routes, attend_gathered_blocks, at_once=True)
    return Piece(context.positions, context.query_blocks, lists, out)


if __name__ == "__main__":
    serve(ShardsWorker())
