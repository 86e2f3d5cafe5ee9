"""`AttentionMap`: what one head attends to over a text, block by block, beside what its layer's pattern keeps of it.

The attention is that of a `Decoder` in which every layer sees everything; what a pattern keeps is chosen by
`dseek.ops.attention.selection` and, where the model has one, its gate. Weights of tokens on tokens exist for a chunk of
rows only. B blocks of 64 tokens (the last one may be partial), T tokens, H query heads, G key and value heads, d head
width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dseek.core.attention_pattern import BLOCK_TOKENS, AttentionPattern, cell_blocks, num_levels
from dseek.engine.planned_gates import planned_gates
from dseek.models.decoder import Decoder
from dseek.models.gate_file import Gates
from dseek.models.gate_scorer import GateRowScorer
from dseek.models.projections import LayerProjections, layer_projections
from dseek.ops.attention.reference import visible
from dseek.ops.attention.row_selection import select_rows
from dseek.ops.attention.selection import Selection, count_pairs, select

if TYPE_CHECKING:
    from dseek.models.files import ModelFiles

HIDDEN, LEFT_OUT, NEAR, SELECTED, FAR = range(5)
"""Places of a block of keys in the view of a query block: it sees nothing there by the model's own account; the pattern
skips it; it is the query's own, in the window or the first one (all of them, where the pattern is dense); the descent
opened it; it lies in a closed cell that counts by its means. The last number grows with the level of the cell."""

CHUNK_ELEMENTS = 2**24
"""Weights of tokens on tokens that exist at a time, at least those of one block of rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMap:
    """One head of one layer over one text."""

    layer: int
    """Index of the layer."""
    head: int
    """Index of the query head."""
    pattern: AttentionPattern
    """What the layer attends to by the plan."""
    chosen_by: str | None
    """gate or mean keys: what a descent followed; None where there is none."""
    level_bias: tuple[float, ...] | None
    """What is added to the scores of far cells, by level, from the gate; None where nothing is, or there are none."""
    num_tokens: int
    """Length of the text, T."""
    mass: np.ndarray
    """float32 [B, B]: dense attention that the queries of a block (rows) give a block of keys (columns), mean over the
    queries; every row has the sum 1."""
    place: np.ndarray
    """int8 [B, B]: `HIDDEN`, `LEFT_OUT`, `NEAR`, `SELECTED`, or `FAR` plus the level of the cell."""
    attended: np.ndarray | None
    """float32 [B, B]: share of a block's queries that attend to a block of keys, where each selects for itself."""
    pairs: int
    """Pairs of a query and a key or far cell that the pattern computes."""
    dense_pairs: int
    """Pairs of a query and a key that dense attention would compute."""

    def shares(self) -> np.ndarray:
        """Sum the mass by place.

        Returns:
            float64 [B, P], a column for each place up to the last one in use (at least those up to `SELECTED`); that of
            what is hidden is zero, and every row has the sum 1.
        """
        num_places = max(int(self.place.max()), SELECTED) + 1
        columns = [np.where(self.place == place, self.mass, 0.0).sum(axis=1) for place in range(num_places)]
        if self.attended is not None:
            # A query opens a block for its mass, so that counting it by the number of queries understates what is kept.
            missed_B = np.where(self.place == SELECTED, self.mass * (1.0 - self.attended), 0.0).sum(axis=1)
            columns[SELECTED] -= missed_B
            columns[LEFT_OUT] += missed_B
        return np.stack(columns, axis=1).astype(np.float64)

    def kept_by_block(self) -> np.ndarray:
        """Return the share of the mass that falls on keys attended to token by token, float64 [B]."""
        kept_B: np.ndarray = self.shares()[:, NEAR:FAR].sum(axis=1)
        return kept_B

    @property
    def kept(self) -> float:
        """Share of the mass on keys attended to token by token, mean over all queries."""
        return self._mean(self.kept_by_block())

    @property
    def in_means(self) -> float:
        """Share of the mass on keys that count by the means of their cells, mean over all queries."""
        return self._mean(self.shares()[:, FAR:].sum(axis=1))

    def _mean(self, share_B: np.ndarray) -> float:
        """Mean over queries of what is given by block."""
        rows_B = np.minimum(BLOCK_TOKENS, self.num_tokens - np.arange(len(share_B)) * BLOCK_TOKENS)
        return float(share_B @ rows_B / self.num_tokens)

    @property
    def skipped(self) -> float:
        """Share of the dense pairs that are not computed."""
        return 1.0 - self.pairs / self.dense_pairs


def attention_maps(
    files: ModelFiles,
    token_ids: Sequence[int],
    patterns: Sequence[AttentionPattern],
    *,
    layers: Collection[int],
    head: int,
    context_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[AttentionMap]:
    """Run a text through a model and map one head of some layers.

    Weights and keys are in bfloat16, so a descent may decide a close choice otherwise than a run with other formats.

    Args:
        files: the opened model, and its gate if there is one.
        token_ids: the text; at least one token.
        patterns: what each layer of the model attends to.
        layers: indices of the layers to map.
        head: index of the query head.
        context_tokens: context that the plan is for, which a rotation may depend on; None is the text's length.
        progress: called with the layer that comes next and the last one.

    Returns:
        The maps, by layer.

    Raises:
        ConfigError: a pattern follows a gate, and the model has none.
        FileFormatError: the gate beside the model is damaged or for another one.
    """
    assert len(token_ids) > 0 and all(0 <= layer < files.shape.num_layers for layer in layers)
    gates = planned_gates(files, [patterns[layer] for layer in layers])
    decoder = Decoder.from_files(files, torch.bfloat16).requires_grad_(False)
    maps = []
    for layer, projections in enumerate(layer_projections(decoder, torch.tensor(token_ids), context_tokens)):
        if progress is not None:
            progress(layer, max(layers))
        if layer in layers:
            maps.append(map_head(projections, patterns[layer], layer=layer, head=head, gates=gates))
        if layer == max(layers):
            break
    return maps


@torch.inference_mode()
def map_head(
    projections: LayerProjections, pattern: AttentionPattern, *, layer: int, head: int, gates: Gates | None = None
) -> AttentionMap:
    """Map one head.

    Args:
        projections: the layer's queries and keys of the text.
        pattern: what the layer attends to.
        layer: its index.
        head: index of the query head.
        gates: the model's gates, for a pattern that follows them.

    Returns:
        The map.
    """
    assert gates is not None or not pattern.gate, "a pattern that follows a gate needs it"
    q_THd, k_TGd, window = projections.rotated_queries, projections.rotated_keys, projections.window
    num_tokens = len(q_THd)
    group = head * k_TGd.shape[1] // q_THd.shape[1]
    place_BB = _visible_places(num_tokens, window)
    dense_pairs = _dense_pairs(num_tokens, window)
    pairs = dense_pairs
    attended_BB = None
    near_blocks = 0 if pattern.kind == "dense" else pattern.near_blocks(k_TGd.shape[1])[group]
    if pattern.min_share:
        attended_BB, pairs = _mark_rows(place_BB, projections, pattern, layer, group, near_blocks, gates)
    elif pattern.kind != "dense":
        selection = _selection(projections, pattern, group)
        _mark(place_BB, selection, near_blocks)
        pairs = sum(counts.pairs for counts in count_pairs(selection, num_tokens).values())
    return AttentionMap(
        layer=layer,
        head=head,
        pattern=pattern,
        level_bias=_level_bias(pattern, layer, head, num_tokens, gates),
        chosen_by=None if pattern.kind != "dynamic" else "gate" if pattern.gate else "mean keys",
        num_tokens=num_tokens,
        mass=block_mass(q_THd[:, head], k_TGd[:, group], window).numpy(),
        place=place_BB,
        attended=attended_BB,
        pairs=pairs,
        dense_pairs=dense_pairs,
    )


def block_mass(q_Td: torch.Tensor, k_Td: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Sum a head's causal attention over blocks of keys, and take its mean over blocks of queries.

    Args:
        q_Td: [T, d] rotated queries.
        k_Td: [T, d] rotated keys.
        window: newest positions seen, the query's own included; None is all of them.

    Returns:
        float32 [B, B]; scores and softmax are taken in float32.
    """
    num_tokens = len(q_Td)
    num_blocks = -(-num_tokens // BLOCK_TOKENS)
    mass_BB = torch.zeros(num_blocks, num_blocks)
    chunk_rows = BLOCK_TOKENS * max(1, CHUNK_ELEMENTS // (num_tokens * BLOCK_TOKENS))
    for first in range(0, num_tokens, chunk_rows):
        past = min(first + chunk_rows, num_tokens)
        # Keys are padded to whole blocks: those past the chunk's last row are hidden like any later key.
        width = -(-past // BLOCK_TOKENS) * BLOCK_TOKENS
        z_RS = torch.full((past - first, width), float("-inf"))
        z_RS[:, :past] = q_Td[first:past].float() @ k_Td[:past].float().T / math.sqrt(q_Td.shape[1])
        z_RS.masked_fill_(~visible(torch.arange(first, past), torch.arange(width), window), float("-inf"))
        mass_RB = z_RS.softmax(-1).unflatten(-1, (-1, BLOCK_TOKENS)).sum(-1)
        for block, rows_RB in enumerate(mass_RB.split(BLOCK_TOKENS), start=first // BLOCK_TOKENS):
            mass_BB[block, : width // BLOCK_TOKENS] = rows_RB.mean(0)
    return mass_BB


def _selection(projections: LayerProjections, pattern: AttentionPattern, group: int) -> Selection:
    """What a run would choose for one group of heads, block by block."""
    chosen = select(projections.rotated_queries, projections.rotated_keys, pattern)
    return {query_block: (choices[group],) for query_block, choices in chosen.items()}


def _level_bias(
    pattern: AttentionPattern, layer: int, head: int, num_tokens: int, gates: Gates | None
) -> tuple[float, ...] | None:
    """A head's biases of far cells, of the levels that the text has."""
    if gates is None or not pattern.far:
        return None
    bias_HL = gates.layers[layer].bias_of_levels(num_levels(num_tokens))
    return None if bias_HL is None else tuple(bias_HL[head].tolist())


def _mark_rows(
    place_BB: np.ndarray,
    projections: LayerProjections,
    pattern: AttentionPattern,
    layer: int,
    group: int,
    near_blocks: int,
    gates: Gates | None,
) -> tuple[np.ndarray, int]:
    """Write down where the queries' own choices lie; return the share of queries that attend, and the pairs."""
    q_THd, k_TGd = projections.rotated_queries, projections.rotated_keys
    heads = q_THd.shape[1] // k_TGd.shape[1]
    scorer = None
    if pattern.gate and gates is not None:
        scorer = _OneGroup(GateRowScorer(gates, layer, projections.queries, q_THd, projections.keys, k_TGd), group)
    chosen_TB = select_rows(
        q_THd[:, group * heads : (group + 1) * heads],
        k_TGd[:, group : group + 1],
        near_blocks=(near_blocks,),
        min_share=pattern.min_shares(k_TGd.shape[1])[group],
        top_blocks=pattern.top_blocks,
        scorer=scorer,
    )[0]
    own_T = torch.arange(len(q_THd)) // BLOCK_TOKENS
    attended_BB = torch.stack([rows_TB.float().mean(0) for rows_TB in chosen_TB.split(BLOCK_TOKENS)]).numpy()
    for query_block, shares_B in enumerate(attended_BB):
        row_B = place_BB[query_block]
        row_B[:query_block] = np.where(shares_B[:query_block] > 0, SELECTED, LEFT_OUT)
        row_B[:1] = NEAR
        row_B[max(0, query_block - near_blocks) : query_block + 1] = NEAR
    before = int((chosen_TB.sum(1) - 1).sum()) * BLOCK_TOKENS
    return attended_BB, before + int((torch.arange(len(q_THd)) - own_T * BLOCK_TOKENS + 1).sum())


class _OneGroup:
    """A scorer that knows one group of another by the index 0.

    Args:
        scorer: the other.
        group: its group.
    """

    def __init__(self, scorer: GateRowScorer, group: int) -> None:
        self._scorer, self._group = scorer, group

    def cells(self, position: int, group: int, level: int, indices: Sequence[int]) -> torch.Tensor:
        return self._scorer.cells(position, self._group, level, indices)

    def own_block(self, position: int, group: int) -> torch.Tensor:
        return self._scorer.own_block(position, self._group)


def _visible_places(num_tokens: int, window: int | None) -> np.ndarray:
    """`NEAR` wherever a query of the block sees a key, `HIDDEN` elsewhere: int8 [B, B]."""
    blocks_B = np.arange(-(-num_tokens // BLOCK_TOKENS))
    seen_BB = blocks_B[None, :] <= blocks_B[:, None]
    if window is not None:
        oldest_B = blocks_B * BLOCK_TOKENS - window + 1
        seen_BB &= (blocks_B[None, :] + 1) * BLOCK_TOKENS > oldest_B[:, None]
    return np.where(seen_BB, NEAR, HIDDEN).astype(np.int8)


def _mark(place_BB: np.ndarray, selection: Selection, near_blocks: int) -> None:
    """Write down where the choices lie; what no choice names is left out."""
    for query_block, (choice,) in selection.items():
        row_B = place_BB[query_block]
        row_B[:query_block] = LEFT_OUT
        for level, index in choice.far_cells:
            row_B[index * cell_blocks(level) : (index + 1) * cell_blocks(level)] = FAR + level
        row_B[list(choice.exact_blocks)] = SELECTED
        row_B[:1] = NEAR
        row_B[max(0, query_block - near_blocks) : query_block + 1] = NEAR


def _dense_pairs(num_tokens: int, window: int | None) -> int:
    """Pairs of causal attention, within the model's own window."""
    span = num_tokens if window is None else min(window, num_tokens)
    return span * (span + 1) // 2 + (num_tokens - span) * span
