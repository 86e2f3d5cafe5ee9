"""What every rank does in the tests of the sharded runner, and a single process beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dseek.engine.batch import Batch
from dseek.engine.llm import load
from dseek.engine.runner import Runner
from dseek.plan.plan import Plan
from tests.models import tiny

Piece = tuple[np.ndarray, int, list[int]]
"""The page table of a sequence, its first new position and its new tokens."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, a plan and a text."""

    folder: str
    """The model."""
    plan: str
    """The plan, as JSON."""
    num_tokens: int = 1300
    """Length of the text."""
    chunk: int = 2048
    """Most rows of a step."""
    strategy: str = "auto"
    """How it is shared out."""
    answers: bool = False
    """Whether the engine's own loop runs too."""


def play(case: Case, *, sharded: bool) -> dict[str, Any]:
    """Prefill a text in chunks, then a second one that shares its first pages beside a decode step of the first.

    Args:
        case: what to run.
        sharded: whether with the other ranks.

    Returns:
        Arrays and texts to compare, and under `sharded_batches` how many batches were shared out.
    """
    plan = Plan.from_json(case.plan)
    strategy: Any = case.strategy if sharded else None
    with load(case.folder, plan=plan, shard_strategy=strategy) as llm:
        runner: Any = llm.engine.runner
        ids = tiny.token_ids(case.num_tokens, seed=3)
        num_pages = -(-(case.num_tokens + 4) // 64)
        first = np.arange(num_pages, dtype=np.int32)
        second = np.arange(num_pages, 2 * num_pages, dtype=np.int32)
        shared = min(2, case.num_tokens // 64)
        second[:shared] = first[:shared]
        logits = []
        # 1. The first text, with the last chunk the logits of twelve of its rows, more than some kernels call few.
        for start in range(0, case.num_tokens, case.chunk):
            end = min(start + case.chunk, case.num_tokens)
            rows = np.unique(np.linspace(0, end - start - 1, 12 if end == case.num_tokens else 1, dtype=np.int64))
            logits.append(run(runner, [(first, start, ids[start:end])], rows))
        # 2. Two steps of decoding.
        for step in range(2):
            logits.append(run(runner, [(first, case.num_tokens + step, [7 + step])], [0]))
        # 3. Another text after the shared pages, in a batch with the next step of the first.
        other = tiny.token_ids(case.num_tokens, seed=4)[shared * 64 :]
        if other:
            pieces = [(first, case.num_tokens + 2, [5]), (second, shared * 64, other)]
            logits.append(run(runner, pieces, [0, len(other)]))
            logits.append(run(runner, [(second, case.num_tokens, [9])], [0]))
        native = runner.runner if sharded else runner
        pages = np.unique(np.concatenate([first, second]))
        return {
            **{f"logits {step}": rows for step, rows in enumerate(logits)},
            "cache": hashlib.sha256(native.cache_pages()[pages].tobytes()).hexdigest(),
            "selections": selections(native, plan, first, case.num_tokens),
            "answer": llm.generate([ids], max_new_tokens=6, seed=1)[0].token_ids if case.answers else (),
            "sharded_batches": runner.num_sharded if sharded else 0,
        }


def run(runner: Runner, pieces: Sequence[Piece], logit_rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Compute a batch of sequences."""
    starts = np.cumsum([0, *(len(ids) for _, _, ids in pieces)], dtype=np.int32)
    batch = Batch(
        np.concatenate([np.array(ids, dtype=np.int32) for _, _, ids in pieces]),
        np.concatenate([np.arange(start, start + len(ids), dtype=np.int32) for _, start, ids in pieces]),
        starts,
        np.stack([pages for pages, _, _ in pieces]),
        np.array(logit_rows, dtype=np.int32),
    )
    return runner.forward(batch).copy()


def selections(runner: Any, plan: Plan, pages: np.ndarray, num_tokens: int) -> list[Any]:
    """Everything that was selected; in the last layer only by the newest block, which alone has to select there."""
    found = []
    last = (num_tokens - 1) // 64
    for layer, pattern in enumerate(plan.attention_patterns):
        if pattern.kind == "dense":
            continue
        for block in range(last if layer + 1 == plan.shape.num_layers else 0, last + 1):
            for head in range(plan.shape.num_kv_heads):
                if not pattern.min_share:
                    found.append(runner.selection(layer, head, pages, block))
                    continue
                for position in range(block * 64 + 15, min(block * 64 + 64, num_tokens), 16):
                    found.append(runner.row_selection(layer, head, pages, position))
    return found


def play_all(rank: int, world_size: int, cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """Play every case on a rank."""
    return {name: play(case, sharded=True) for name, case in cases.items()}
