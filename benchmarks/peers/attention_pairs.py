"""Count what dseek's decoder attended to: pairs of a query and what it sees, from the selections it kept.

Every layer and key-value head has a selection of its own for each block of queries, which lies beside the pages of the
sequence in the cache. So the runner is watched for the page table of the last batch. The last layer selects only for
rows whose logits are wanted: a sequence can be counted if those of all its rows were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dseek.core.attention_pattern import BLOCK_TOKENS
from dseek.engine.runner import Runner
from dseek.ops.attention.row_selection import STRIP_ROWS

if TYPE_CHECKING:
    import numpy as np

    from dseek.engine.batch import Batch
    from dseek.engine.native_runner import NativeRunner
    from dseek.plan.plan import Plan


class WatchedRunner(Runner):
    """A runner that remembers where the first sequence of its last batch lies.

    Args:
        runner: computes the batches.
    """

    def __init__(self, runner: NativeRunner) -> None:
        self.runner = runner
        self.num_pages = runner.num_pages
        self.num_tokens = 0
        """Positions of the sequence so far; 0 before the first batch."""
        self.is_whole = False
        """Whether the logits of all of them were computed."""
        self.pages: np.ndarray | None = None
        """int32 [P], its page table."""

    def forward(self, batch: Batch) -> np.ndarray:
        """Compute a batch; see `Runner.forward`.

        Args:
            batch: the rows.

        Returns:
            float32 [L, V].
        """
        self.pages = batch.page_tables[0].copy()
        num_rows = int(batch.row_starts[1])
        whole_before = batch.positions[0] == 0 or (self.is_whole and batch.positions[0] == self.num_tokens)
        self.is_whole = bool(whole_before) and int((batch.logit_rows < num_rows).sum()) == num_rows
        self.num_tokens = int(batch.positions[num_rows - 1]) + 1
        return self.runner.forward(batch)

    def close(self) -> None:
        """Close the watched runner."""
        self.runner.close()


def causal_pairs(first: int, past: int) -> int:
    """Count the pairs of a query and an earlier position or its own, for one head.

    Args:
        first: first query position.
        past: the position behind the last query.
    """
    return (past * (past + 1) - first * (first + 1)) // 2


def seen_pairs(query_block: int, exact_blocks: list[int], num_far: int, first: int, past: int) -> int:
    """Count the pairs of one block of queries under one selection, for one head.

    Args:
        query_block: index of the queries' block.
        exact_blocks: the blocks it attends to token by token, its own the last.
        num_far: cells that count by their mean, each a pair with every query.
        first: first query position that is counted.
        past: the position behind the last query that is counted.
    """
    assert exact_blocks[-1] == query_block and len(set(exact_blocks)) == len(exact_blocks)
    start = query_block * BLOCK_TOKENS
    first, past = max(first, start), min(past, start + BLOCK_TOKENS)
    if first >= past:
        return 0
    before = (past - first) * (BLOCK_TOKENS * (len(exact_blocks) - 1) + num_far)
    return before + causal_pairs(first - start, past - start)


def seen_pairs_by_rows(first_row: int, exact_blocks: list[int], first_rows: list[int], first: int, past: int) -> int:
    """Count the pairs of sixteen queries that select for themselves, for one head.

    Args:
        first_row: position of the first of them, a multiple of 16.
        exact_blocks: blocks that any of them attends to, their own the last.
        first_rows: for each block the first of them that does, from 0 on.
        first: first query position that is counted.
        past: the position behind the last query that is counted.
    """
    own, end = first_row // BLOCK_TOKENS, min(first_row + STRIP_ROWS, past)
    assert exact_blocks[-1] == own and len(set(exact_blocks)) == len(exact_blocks)
    before = sum(
        BLOCK_TOKENS * max(0, end - max(first, first_row + row))
        for block, row in zip(exact_blocks, first_rows, strict=True)
        if block != own
    )
    start = own * BLOCK_TOKENS
    return before + (causal_pairs(max(first, first_row) - start, end - start) if end > first else 0)


def count_skipped(watched: WatchedRunner, plan: Plan, first: int) -> tuple[int, int]:
    """Count the pairs of the last sequence over all layers and key-value heads.

    Args:
        watched: the runner, after the sequence was computed whole.
        plan: its patterns.
        first: first query position that is counted.

    Returns:
        Causal pairs, and how many of them were not looked at; all heads of a group count as one.
    """
    assert watched.pages is not None and watched.is_whole, "a selection is missing"
    past = watched.num_tokens
    causal = causal_pairs(first, past) * plan.shape.num_kv_heads
    total = skipped = 0
    for layer, pattern in enumerate(plan.attention_patterns):
        total += causal
        if pattern.kind == "dense":
            continue
        skipped += causal
        for head in range(plan.shape.num_kv_heads):
            if pattern.min_share:
                for row in range(first // STRIP_ROWS * STRIP_ROWS, past, STRIP_ROWS):
                    newest = min(row + STRIP_ROWS, past) - 1
                    blocks, rows = watched.runner.row_selection(layer, head, watched.pages, newest)
                    skipped -= seen_pairs_by_rows(row, blocks, rows, first, past)
                continue
            for block in range(first // BLOCK_TOKENS, -(-past // BLOCK_TOKENS)):
                exact, far = watched.runner.selection(layer, head, watched.pages, block)
                skipped -= seen_pairs(block, exact, len(far), first, past)
    return total, skipped
