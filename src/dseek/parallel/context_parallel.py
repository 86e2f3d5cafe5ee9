"""Causal attention over one sequence whose blocks lie on several ranks.

Each rank has the queries, keys and values of its own blocks, rotated at their positions in the whole sequence, and gets
the output of its own queries. A pattern is told as lists of key blocks, so dense, window and dynamic attention are one
procedure; a pattern that selects first gathers what it scores (`gather_blocks`), and only the blocks that some list
names travel. The operator is the caller's: `attend` computes a part, parts are merged by their log-sum-exp.

Peers are visited in a fixed order, so a result is the same in every run. Between world sizes it differs by the rounding
of the merge. Forward only: nothing here records gradients.

    T tokens of this rank, S key rows at hand, H query heads, G key and value heads, d head width
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol

import torch

from dseek.core.errors import ConfigError
from dseek.parallel.block_lists import BlockLists, joined
from dseek.parallel.merge import merge_partials
from dseek.parallel.ranks import Ranks
from dseek.parallel.routes import Routes, agree
from dseek.parallel.sharding import BLOCK_TOKENS, BlockAssignment


class Attend(Protocol):
    """The operator: attention of query blocks over listed key blocks, without merging anything."""

    def __call__(
        self,
        q_THd: torch.Tensor,
        k_SGd: torch.Tensor,
        v_SGd: torch.Tensor,
        query_blocks: torch.Tensor,
        key_blocks: torch.Tensor,
        starts: torch.Tensor,
        blocks: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend.

        Args:
            q_THd: [T, H, d] queries, block after block; only the last block may be shorter than 64.
            k_SGd: [S, G, d] keys, block after block; only the last block may be shorter than 64.
            v_SGd: [S, G, d] values.
            query_blocks: int64 [Q] places of the query blocks in the sequence, rising.
            key_blocks: int64 [N] places of the key blocks, rising.
            starts: int64 [Q * L + 1] bounds of the lists; L is 1, or G where each group has its own (see `BlockLists`).
            blocks: int64, the lists: indices into `key_blocks`, rising. Where the key block is the query block itself,
                attention is causal; every other listed block is older and seen whole.

        Returns:
            Output [T, H, d] and log-sum-exp of the scores [T, H], both in float32 at least. A query that sees no key
            has a finite output and minus infinity.
        """
        ...


class ContextParallel:
    """One sequence over the ranks of a process group; made and used by all of them together."""

    def __init__(
        self, assignment: BlockAssignment, sequence_length: int, ranks: Ranks | None = None, *, start: int = 0
    ) -> None:
        """Check that the ranks mean the same sequence.

        Args:
            assignment: the owner of each block, equal on every rank.
            sequence_length: tokens so far; only the last block may be incomplete.
            ranks: this process and its peers; None is the default process group.
            start: first position that is a query now, on a block boundary; what lies before was computed with an
                earlier chunk and takes part with its keys and values.

        Raises:
            ConfigError: another number of ranks or blocks than the assignment's, a start outside the sequence or inside
                a block, or ranks that disagree on any of this.
        """
        self.ranks = Ranks() if ranks is None else ranks
        self.assignment, self.sequence_length = assignment, sequence_length
        own = assignment.blocks[self.ranks.rank] if self.ranks.rank < assignment.world_size else ()
        self.query_blocks = tuple(block for block in own if block * BLOCK_TOKENS >= start)
        self._own = own
        self._agree_on(start)
        if assignment.world_size != self.ranks.world_size:
            raise ConfigError(
                f"blocks are assigned to {assignment.world_size} ranks", needed=f"{self.ranks.world_size}, as there are"
            )
        if sequence_length < 1 or -(-sequence_length // BLOCK_TOKENS) != assignment.num_blocks:
            raise ConfigError(
                f"{assignment.num_blocks} blocks are assigned of a sequence of {sequence_length} tokens",
                needed=f"one owner for each {BLOCK_TOKENS} tokens",
            )
        if not 0 <= start < sequence_length or start % BLOCK_TOKENS:
            raise ConfigError(
                f"the queries start at {start}", needed=f"a multiple of {BLOCK_TOKENS} below {sequence_length}"
            )

    @property
    def positions(self) -> torch.Tensor:
        """Positions in the sequence of this rank's queries, int64 [T]."""
        return self._positions(self.query_blocks)

    def gather_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """Bring together a small tensor that has one row for each block, such as the cells of the pyramid.

        Args:
            x: [number of this rank's blocks, ...]; the same trailing shape and dtype on every rank.

        Returns:
            [number of blocks, ...] in the order of the sequence, bit for bit the same on every rank and for every
            number of ranks.
        """
        assert x.shape[0] == len(self._own), "one row for each own block"
        most = max(map(len, self.assignment.blocks))
        padded = x.new_zeros((most, *x.shape[1:]))
        padded[: x.shape[0]] = x
        whole = x.new_empty((self.assignment.num_blocks, *x.shape[1:]))
        for owned, rows in zip(self.assignment.blocks, self.ranks.all_gather(padded), strict=True):
            whole[torch.tensor(owned, dtype=torch.int64)] = rows[: len(owned)]
        return whole

    def gather_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Bring together a tensor that has one row for each token.

        Args:
            x: [tokens of this rank's blocks, ...].

        Returns:
            [sequence_length, ...] in the order of the sequence.
        """
        padded = x.new_zeros((len(self._own) * BLOCK_TOKENS, *x.shape[1:]))
        padded[: x.shape[0]] = x
        rows = self.gather_blocks(padded.unflatten(0, (len(self._own), BLOCK_TOKENS)))
        return rows.flatten(0, 1)[: self.sequence_length]

    def routes(self, lists: BlockLists) -> Routes:
        """Agree on the messages of a pattern; good for every layer that has the same lists.

        Args:
            lists: of this rank's query blocks, by the key blocks' places in the sequence, none younger than the query.

        Returns:
            What `attention` takes.
        """
        num_queries = len(self.query_blocks)
        assert lists.num_lists % max(1, num_queries) == 0, "as many lists for every query block"
        lists_each = max(1, lists.num_lists // max(1, num_queries))
        newest = torch.tensor(self.query_blocks, dtype=torch.int64).repeat_interleave(lists_each)
        assert bool((lists.blocks <= newest[lists.list_numbers()]).all()), "a block may not attend to a younger one"
        return agree(lists, self.assignment, self.ranks)

    def attention(
        self,
        q_THd: torch.Tensor,
        k_SGd: torch.Tensor,
        v_SGd: torch.Tensor,
        routes: Routes,
        attend: Attend,
        partials: Iterable[tuple[torch.Tensor, torch.Tensor]] = (),
        *,
        at_once: bool = False,
    ) -> torch.Tensor:
        """Attend from this rank's queries over the whole sequence.

        Args:
            q_THd: [T, H, d] queries of `positions`.
            k_SGd: [S, G, d] keys of this rank's blocks, in their order; as many rows as queries, and those of earlier
                chunks before them.
            v_SGd: [S, G, d] values.
            routes: of the pattern.
            attend: the operator.
            partials: output [T, H, d] and log-sum-exp [T, H] over keys that are no blocks (far cells); merged last.
            at_once: gather the keys of all peers first and attend to them in one part. Takes the memory of all that is
                gathered and hides no message, but merges nothing: for patterns that name few blocks of every peer.

        Returns:
            [T, H, d] in the dtype of the queries.
        """
        assert q_THd.shape[0] == self.positions.numel(), "a query for each position"
        assert k_SGd.shape == v_SGd.shape and k_SGd.shape[0] == self._positions(self._own).numel(), (
            "a key for each token"
        )
        rank, world_size = self.ranks.rank, self.ranks.world_size
        query_blocks = torch.tensor(self.query_blocks, dtype=torch.int64)
        parts = _Merged(q_THd)
        if at_once:
            key_blocks, lists, keys, values = self._gather_keys(k_SGd, v_SGd, routes)
            if lists.blocks.numel():
                parts.add(*attend(q_THd, keys, values, query_blocks, key_blocks, lists.starts, lists.blocks))
            for partial in partials:
                parts.add(*partial)
            return parts.result()

        # At each step a block set from one peer arrives while the one before is computed on; step 0 is what is here.
        k_here_SGd, v_here_SGd = k_SGd, v_SGd
        for step in range(world_size):
            source = (rank - step) % world_size
            following = _Exchange(self.ranks, step + 1, k_SGd, v_SGd, routes) if step + 1 < world_size else None
            key_blocks, lists = routes.key_blocks[source], routes.lists[source]
            if lists.blocks.numel():
                parts.add(*attend(q_THd, k_here_SGd, v_here_SGd, query_blocks, key_blocks, lists.starts, lists.blocks))
            if following is not None:
                k_here_SGd, v_here_SGd = following.wait()

        for partial in partials:
            parts.add(*partial)
        return parts.result()

    def _gather_keys(
        self, k_SGd: torch.Tensor, v_SGd: torch.Tensor, routes: Routes
    ) -> tuple[torch.Tensor, BlockLists, torch.Tensor, torch.Tensor]:
        """Bring together all blocks that some list names: their places, the lists among them, keys and values."""
        rank, world_size = self.ranks.rank, self.ranks.world_size
        exchanges = [_Exchange(self.ranks, step, k_SGd, v_SGd, routes) for step in range(1, world_size)]
        by_owner = {rank: (k_SGd, v_SGd)}
        for step, exchange in enumerate(exchanges, start=1):
            by_owner[(rank - step) % world_size] = exchange.wait()
        every = torch.cat(routes.key_blocks)
        key_blocks, order = every.sort()
        places = torch.empty_like(order)
        places[order] = torch.arange(order.numel())
        lists = joined(routes.lists, places.split([blocks.numel() for blocks in routes.key_blocks]))
        keys, values = (torch.cat([by_owner[owner][index] for owner in range(world_size)]) for index in range(2))
        if not torch.equal(key_blocks, every):
            # A block that is not complete is the last of the sequence and has no row after its last token.
            starts = torch.cat([places.new_zeros(1), self._num_tokens(every).cumsum(0)])[order]
            rows = torch.cat(
                [torch.arange(int(n)) + s for s, n in zip(starts, self._num_tokens(key_blocks), strict=True)]
            )
            keys, values = keys[rows], values[rows]
        return key_blocks, lists, keys, values

    def _num_tokens(self, blocks: torch.Tensor) -> torch.Tensor:
        """Say how many tokens each block has."""
        return (self.sequence_length - blocks * BLOCK_TOKENS).clamp(max=BLOCK_TOKENS)

    def _positions(self, blocks: tuple[int, ...]) -> torch.Tensor:
        starts = torch.tensor(blocks, dtype=torch.int64) * BLOCK_TOKENS
        positions = (starts[:, None] + torch.arange(BLOCK_TOKENS)).flatten()
        return positions[positions < self.sequence_length]

    def _agree_on(self, start: int) -> None:
        """Compare a digest of the arguments, since ranks that differ would wait for each other without end."""
        text = repr((self.assignment.blocks, self.sequence_length, start))
        digest = torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
        others = [rank for rank, other in enumerate(self.ranks.all_gather(digest)) if not torch.equal(other, digest)]
        if others:
            raise ConfigError(
                f"rank {self.ranks.rank} was given another sequence length, start or assignment than ranks {others}",
                needed="the same on every rank",
            )


class _Exchange:
    """One step's messages: blocks to the peer `step` ranks ahead, blocks from the one `step` ranks behind."""

    def __init__(self, ranks: Ranks, step: int, k_SGd: torch.Tensor, v_SGd: torch.Tensor, routes: Routes) -> None:
        receiver, sender = (ranks.rank + step) % ranks.world_size, (ranks.rank - step) % ranks.world_size
        num_received = routes.key_blocks[sender].numel()
        self._received = k_SGd.new_empty((2, num_received * BLOCK_TOKENS, *k_SGd.shape[1:]))
        self._messages = []
        sent = routes.sent[receiver]
        if sent.numel():
            # Held until it was waited for: the message is read from this memory.
            self._sent = torch.stack([_blocks_of(k_SGd, sent), _blocks_of(v_SGd, sent)])
            self._messages.append(ranks.send(self._sent, receiver))
        if num_received:
            self._messages.append(ranks.receive(self._received, sender))

    def wait(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the received keys and values, [N * 64, G, d] each."""
        for message in self._messages:
            message.wait()
        return self._received[0], self._received[1]


def _blocks_of(x_SGd: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Copy complete blocks, [N * 64, G, d]. The last of the sequence, maybe incomplete, is nobody else's past."""
    complete = x_SGd[: x_SGd.shape[0] // BLOCK_TOKENS * BLOCK_TOKENS].unflatten(0, (-1, BLOCK_TOKENS))
    return complete[places].flatten(0, 1)


class _Merged:
    """The parts of one attention, merged in the order in which they are added."""

    def __init__(self, q_THd: torch.Tensor) -> None:
        self._q_THd = q_THd
        self._state: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, out_THd: torch.Tensor, lse_TH: torch.Tensor) -> None:
        """Merge the output `out_THd` and log-sum-exp `lse_TH` over keys that no earlier part had."""
        self._state = (out_THd, lse_TH) if self._state is None else merge_partials(*self._state, out_THd, lse_TH)

    def result(self) -> torch.Tensor:
        """Return the output in the dtype of the queries; zeros where nothing was added."""
        return torch.zeros_like(self._q_THd) if self._state is None else self._state[0].to(self._q_THd.dtype)
