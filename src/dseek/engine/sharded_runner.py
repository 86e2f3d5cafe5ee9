"""`ShardedRunner`: long prompts shared out among ranks, everything else computed by each of them.

Every rank runs the same program with the same requests. Of a long prompt a rank computes its own blocks through all
layers; after each layer's keys and values are stored, and before anything attends to them, the ranks exchange them, so
that each has the whole cache afterwards and decodes on its own. The kernels and the blocks that they work on are those
of a single rank: the logits are the same bit for bit. (Those of decode steps depend on the number of threads, which is
part of the plan, since a long context is cut in so many parts.)

What it does not do: share out weights, or make decoding faster.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from dseek.core.logs import get_logger
from dseek.engine.batch import Batch
from dseek.engine.batch_parts import Part, blocks_of, owned_pages, part_of
from dseek.engine.runner import Runner
from dseek.engine.shard_work import BLOCKS_PER_RANK, layer_works, share_out
from dseek.ops import native
from dseek.parallel.meeting import agree, agree_on_text, expecting, measure_link
from dseek.parallel.ranks import Ranks
from dseek.parallel.sharding import BLOCK_TOKENS, BlockAssignment
from dseek.parallel.strategy import ShardStrategy, check_strategy

if TYPE_CHECKING:
    from dseek.engine.native_runner import NativeRunner
    from dseek.plan.plan import Plan

logger = get_logger("dseek.engine")

STEPS_BETWEEN_CHECKS = 16
"""Batches that every rank computes whole are compared among the ranks so often."""


class ShardedRunner(Runner):
    """A native runner and its peers on the other ranks; made and used by all of them together.

    Args:
        runner: this rank's; closed with this object.
        plan: what all ranks run.
        ranks: this process and its peers.
        strategy: contiguous, zigzag, or auto: the faster of the two by prediction, and none where one rank alone is
            faster.

    Raises:
        ConfigError: an unknown strategy.
        PeerError: the ranks have other plans or kernels than each other, or one does not answer.
    """

    is_shared = True

    def __init__(self, runner: NativeRunner, plan: Plan, ranks: Ranks, strategy: ShardStrategy) -> None:
        check_strategy(strategy)
        agree_on_text(ranks, f"{strategy}\n{native.require().variant()}\n{plan.to_json()}", "plan, kernels or strategy")
        self.num_pages = runner.num_pages
        self.runner = runner
        self.ranks = ranks
        self.num_sharded = 0
        """Batches so far of which ranks computed parts."""
        self._strategy: ShardStrategy = strategy
        self._cache: np.ndarray | None = runner.cache_pages()
        self._selections = runner.selections()
        self._works = layer_works(plan, block_bytes=self._cache.shape[2])
        self._link = measure_link(ranks) if ranks.world_size > 1 else None
        with expecting("the seed"):
            seed = ranks.broadcast_text(str(random.getrandbits(62)) if ranks.rank == 0 else None)
        self._seeds = random.Random(int(seed))
        self._history = hashlib.sha256()
        self._steps_unchecked = 0
        least = BLOCKS_PER_RANK * BLOCK_TOKENS * ranks.world_size
        if ranks.world_size > 1 and plan.prefill_chunk_tokens < least:
            logger.warning(
                "no prompt will be shared out: a step of the plan has at most %d rows, and %d ranks need %d",
                plan.prefill_chunk_tokens,
                ranks.world_size,
                least,
            )

    def forward(self, batch: Batch) -> np.ndarray:
        """Compute every row of a batch, together with the other ranks; see `Runner.forward`.

        Args:
            batch: the rows, the same on every rank.

        Returns:
            float32 [L, V], the same on every rank.

        Raises:
            PeerError: a rank was given another batch, died or does not answer. The ranks have to be started again.
        """
        assert self._cache is not None, "the runner is closed"
        if self.ranks.world_size == 1:
            return self.runner.forward(batch)
        assignments = [self._assign(batch, sequence) for sequence in range(batch.num_sequences)]
        is_sharded = any(assignment is not None for assignment in assignments)
        self._check_agreement(batch, is_sharded)
        if not is_sharded:
            return self.runner.forward(batch)
        self.num_sharded += 1
        parts = [part_of(batch, assignments, rank) for rank in range(self.ranks.world_size)]
        pages = [owned_pages(batch, assignments, rank) for rank in range(self.ranks.world_size)]
        cache = self._cache
        exchange = _PageExchange(self.ranks, pages, cache.shape[2:])

        def exchange_layer(layer: int) -> None:
            exchange(cache[:, layer], f"keys and values of layer {layer}")

        logits = self.runner.forward_part(parts[self.ranks.rank].batch, batch, exchange_layer)
        for selections in self._selections:
            _PageExchange(self.ranks, pages, selections.shape[1:])(selections, "what queries selected")
        return self._gather_logits(batch, parts, logits)

    def selection(
        self, layer: int, kv_head: int, pages: np.ndarray, query_block: int
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Tell what a block of queries attended to; see `NativeRunner.selection`.

        Args:
            layer: index of the layer.
            kv_head: index of the key-value head.
            pages: int32 [P], page table of the sequence.
            query_block: index of the queries' block.
        """
        return self.runner.selection(layer, kv_head, pages, query_block)

    def row_selection(self, layer: int, kv_head: int, pages: np.ndarray, position: int) -> tuple[list[int], list[int]]:
        """Tell what sixteen queries attended to, up to one of them; see `NativeRunner.row_selection`.

        Args:
            layer: index of the layer.
            kv_head: index of the key-value head.
            pages: int32 [P], page table of the sequence.
            position: of the newest query that is asked for.
        """
        return self.runner.row_selection(layer, kv_head, pages, position)

    def fresh_seed(self) -> int:
        """Give the next seed, the same on every rank."""
        return self._seeds.getrandbits(62)

    def close(self) -> None:
        """Free this rank's weights and cache; the process group stays."""
        self._cache = None
        self._selections = []
        self.runner.close()

    def _assign(self, batch: Batch, sequence: int) -> BlockAssignment | None:
        """Share out the blocks of a sequence, or leave it to every rank."""
        blocks = blocks_of(batch, sequence)
        return share_out(self._works, blocks, self.ranks.world_size, self._strategy, self._link)

    def _check_agreement(self, batch: Batch, is_sharded: bool) -> None:
        """Compare what the ranks were given. A digest is always the next message, whichever way they differ."""
        for array in (batch.token_ids, batch.positions, batch.row_starts, batch.page_tables, batch.logit_rows):
            self._history.update(repr((array.shape, is_sharded)).encode())
            self._history.update(array.tobytes())
        self._steps_unchecked += 1
        if is_sharded or self._steps_unchecked == STEPS_BETWEEN_CHECKS:
            self._steps_unchecked = 0
            agree(self.ranks, self._history.digest(), "batch")

    def _gather_logits(self, batch: Batch, parts: Sequence[Part], own: np.ndarray) -> np.ndarray:
        """Bring the wanted logits together; what every rank computes is each rank's own."""
        logits = np.empty((len(batch.logit_rows), own.shape[1]), dtype=np.float32)
        computed_by = np.zeros(len(logits), dtype=np.int64)
        for part in parts:
            computed_by[part.logit_rows] += 1
        mine = parts[self.ranks.rank]
        logits[mine.logit_rows] = own[mine.wanted]
        for rank, part in enumerate(parts):
            rows = part.logit_rows[computed_by[part.logit_rows] == 1]
            given = np.ascontiguousarray(logits[rows])
            with expecting("logits"):
                self.ranks.broadcast(torch.from_numpy(given), rank)
            logits[rows] = given
        return logits


class _PageExchange:
    """Gives every rank the pages of all others, of an array that has them first."""

    def __init__(self, ranks: Ranks, pages: Sequence[np.ndarray], page_shape: tuple[int, ...]) -> None:
        self._ranks = ranks
        self._pages = pages
        most = max(map(len, pages))
        self._sent = torch.zeros((most, *page_shape), dtype=torch.uint8)
        self._received = torch.empty((ranks.world_size, most, *page_shape), dtype=torch.uint8)

    def __call__(self, memory: np.ndarray, what: str) -> None:
        sent = self._sent.numpy()
        for place, page in enumerate(self._pages[self._ranks.rank]):
            sent[place] = memory[page]
        with expecting(what):
            received = self._ranks.all_gather(self._sent, self._received)
        for rank, pages in enumerate(self._pages):
            if rank != self._ranks.rank:
                memory[pages] = received[rank].numpy()[: len(pages)]
