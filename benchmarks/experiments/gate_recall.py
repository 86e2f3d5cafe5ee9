"""What a gate misses: the attention mass that rows keep, layer by layer, beside the same rule with the true masses.

Run: `python -m benchmarks.experiments.gate_recall FILES [--tokens N]`. A text runs through the model in float32 three
times. Densely, where every row's blocks are chosen as `dseek.ops.attention.row_selection` says, from what the gate
expects and from the true masses, but not applied: that gives the mass either keeps. Then with each of the two applied:
that gives what choosing costs, and how much of it is the gate's fault. Blocks are judged one by one, without the
descent and without the bound on what a strip may open.

T tokens, R rows of a chunk, B blocks, H query heads in G groups of P, d head width.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track

from benchmarks.rows.attention_quality import FIRST, Budget
from dseek.core.attention_pattern import BLOCK_TOKENS
from dseek.models.decoder import Block, Decoder
from dseek.models.files import open_model
from dseek.models.gate_file import Gates, find_gates
from dseek.models.projections import CHUNK_ROWS, project
from dseek.ops.attention.rotary import rotate
from dseek.ops.attention.row_selection import STRIP_ROWS
from dseek.train.gate import Gate
from dseek.train.gate_samples import key_statistics
from dseek.train.gate_training import gates_of

WAYS = ("gate", "true masses")
ROWS = 256
"""Rows of a chunk, whole strips and whole blocks."""


@dataclass(kw_only=True, slots=True)
class LayerRecall:
    """One layer over the rows that count; means over rows and heads."""

    near: float = 0.0
    """Share of the mass in the window, the own block and the first one."""
    kept: dict[str, float] = field(default_factory=dict)
    """Share of the mass on all that a row attends to, by way."""
    density: dict[str, float] = field(default_factory=dict)
    """Share of the causal pairs that a row looks at, by way."""
    worst: tuple[int, float] = (0, 0.0)
    """The key and value head whose gate keeps least beside the true masses, and by how much."""


class Selection:
    """Chooses blocks for rows of one layer by either way.

    Args:
        gates: of the model.
        layer: index.
        gate: the layer's gate as a module.
        budget: least share and window.
    """

    def __init__(self, gates: Gates, layer: int, gate: Gate, budget: Budget) -> None:
        stored = gates.layers[layer]
        factors = (
            torch.ones(len(stored.dense)) if stored.share_factor is None else torch.from_numpy(stored.share_factor)
        )
        # A dense head opens whatever there is.
        self._least_G = torch.where(torch.from_numpy(stored.dense) > 0.5, -1.0, budget.min_share * factors)
        self._near_blocks = budget.window_tokens // BLOCK_TOKENS
        self._gate = gate

    def of(
        self,
        way: str,
        rows_R: torch.Tensor,
        mass_RHB: torch.Tensor,
        queries: tuple[torch.Tensor, torch.Tensor],
        keys: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Choose.

        Args:
            way: of `WAYS`.
            rows_R: positions of whole strips.
            mass_RHB: true masses of all blocks up to the rows' own.
            queries: of the rows [R, H, d], before and after rotation.
            keys: statistics [B, G, 3 d] before and means [B, G, d] after rotation of the same blocks.

        Returns:
            bool [G, R, B].
        """
        num_blocks, num_groups = mass_RHB.shape[-1], len(self._least_G)
        own_R1 = (rows_R // BLOCK_TOKENS)[:, None]
        before_RB = torch.arange(num_blocks) < own_R1
        share_RHB = mass_RHB
        if way == "gate":
            scores_RHB = self._gate(queries[0], queries[1], own_R1[:, 0], keys[0], keys[1], 0)
            own_RH1 = self._gate.own_block(queries[0])[..., None]
            expected = torch.cat((scores_RHB.masked_fill(~before_RB[:, None], float("-inf")), own_RH1), dim=-1)
            share_RHB = expected.softmax(-1)[..., :-1]
        share_GRB = share_RHB.unflatten(1, (num_groups, -1)).amax(2).transpose(0, 1)
        opened_GRB = (share_GRB >= self._least_G[:, None, None]) & before_RB
        opened_GRB = opened_GRB.unflatten(1, (-1, STRIP_ROWS)).cummax(2).values.flatten(1, 2)
        return opened_GRB | self.near(rows_R, num_blocks)

    def near(self, rows_R: torch.Tensor, num_blocks: int) -> torch.Tensor:
        """Say which blocks rows attend to whatever is chosen: their own, the window's and the first.

        Args:
            rows_R: positions.
            num_blocks: B.

        Returns:
            bool [R, B].
        """
        own_R1, block_B = (rows_R // BLOCK_TOKENS)[:, None], torch.arange(num_blocks)
        return ((block_B >= own_R1 - self._near_blocks) | (block_B == 0)) & (block_B <= own_R1)


@torch.inference_mode()
def run(
    decoder: Decoder, gates: Gates, token_ids: torch.Tensor, applied: str | None, budget: Budget, first: int
) -> tuple[torch.Tensor, list[LayerRecall]]:
    """Run a text through the model.

    Args:
        decoder: in float32.
        gates: of the model.
        token_ids: int64 [T], whole chunks of `ROWS`.
        applied: the way whose choice rows attend to; None is everything.
        budget: least share and window.
        first: first row that counts.

    Returns:
        The log-losses [T - 1] in nats, and each layer's recall (empty where a choice is applied).
    """
    model = decoder.model
    x_TD = model.embed_tokens(token_ids)
    rotation = model.rotary_emb(torch.arange(len(token_ids)), x_TD.dtype, None)
    found = []
    layers = list(zip(model.layers, gates_of(gates), strict=True))
    for layer, (block, gate) in enumerate(track(layers, description=applied or "dense", transient=True)):
        assert isinstance(block, Block) and isinstance(gate, Gate)
        selection = Selection(gates, layer, gate, budget)
        out_THd, recall = _attend(block, block.input_layernorm(x_TD), rotation, selection, applied, first)
        found.append(recall)
        x_TD = x_TD + block.self_attn.o_proj(out_THd.flatten(1))
        mixed = [block.mlp(block.post_attention_layernorm(x_RD)) for x_RD in x_TD.split(CHUNK_ROWS)]
        x_TD = x_TD + torch.cat(mixed)
    losses = [
        F.cross_entropy(decoder.lm_head(model.norm(x_RD)), target_R, reduction="none")
        for x_RD, target_R in zip(x_TD[:-1].split(1024), token_ids[1:].split(1024), strict=True)
    ]
    return torch.cat(losses), [] if applied else found


def _attend(
    block: Block,
    x_TD: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    selection: Selection,
    applied: str | None,
    first: int,
) -> tuple[torch.Tensor, LayerRecall]:
    """Attend chunk by chunk, to what is applied; count what would be kept where nothing is."""
    q_THd, k_TGd, v_TGd = project(block.self_attn, x_TD)
    q_rotated_THd, k_rotated_TGd = rotate(q_THd, *rotation), rotate(k_TGd, *rotation)
    num_groups = k_TGd.shape[1]
    statistics_BGS = key_statistics(k_TGd)
    means_BGd = k_rotated_TGd.unflatten(0, (-1, BLOCK_TOKENS)).mean(1)
    sums = {name: torch.zeros(num_groups, dtype=torch.float64) for name in ("near", *WAYS)}
    pairs = dict.fromkeys(("all", *WAYS), 0)
    outs, num_counted = [], 0
    for rows_R in torch.arange(len(x_TD)).split(ROWS):
        past = int(rows_R[-1]) + 1
        q_GPRd = q_rotated_THd[rows_R].unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3)
        k_GSd = k_rotated_TGd[:past].transpose(0, 1)
        scores_GPRS = (q_GPRd @ k_GSd[:, None].transpose(-1, -2)) * q_GPRd.shape[-1] ** -0.5
        hidden_RS = torch.arange(past)[None] > rows_R[:, None]
        weights_GPRS = scores_GPRS.masked_fill_(hidden_RS, float("-inf")).softmax(-1)
        mass_GPRB = weights_GPRS.unflatten(-1, (-1, BLOCK_TOKENS)).sum(-1)
        num_blocks = mass_GPRB.shape[-1]
        counted_R = rows_R >= first
        tokens_RB = (rows_R[:, None] + 1 - torch.arange(num_blocks) * BLOCK_TOKENS).clamp(0, BLOCK_TOKENS)
        for way in WAYS if applied is None and counted_R.any() else filter(None, [applied]):
            keep_GRB = selection.of(
                way,
                rows_R,
                mass_GPRB.permute(2, 0, 1, 3).flatten(1, 2),
                (q_THd[rows_R], q_rotated_THd[rows_R]),
                (statistics_BGS[:num_blocks], means_BGd[:num_blocks]),
            )
            if applied is None:
                sums[way] += (mass_GPRB * keep_GRB[:, None]).sum(-1)[..., counted_R].sum(-1).mean(1).double()
                pairs[way] += int((keep_GRB * tokens_RB)[:, counted_R].sum())
            else:
                weights_GPRS *= keep_GRB.repeat_interleave(BLOCK_TOKENS, -1)[:, None]
                weights_GPRS /= weights_GPRS.sum(-1, keepdim=True)
        if applied is None and counted_R.any():
            near_RB = selection.near(rows_R, num_blocks)
            sums["near"] += (mass_GPRB * near_RB).sum(-1)[..., counted_R].sum(-1).mean(1).double()
            pairs["all"] += num_groups * int(tokens_RB[counted_R].sum())
            num_counted += int(counted_R.sum())
        outs.append((weights_GPRS @ v_TGd[:past].transpose(0, 1)[:, None]).permute(2, 0, 1, 3).flatten(1, 2))
    recall = LayerRecall()
    if applied is None:
        recall.near = float(sums["near"].mean()) / num_counted
        recall.kept = {way: float(sums[way].mean()) / num_counted for way in WAYS}
        recall.density = {way: pairs[way] / pairs["all"] for way in WAYS}
        lost_G = (sums["true masses"] - sums["gate"]) / num_counted
        recall.worst = (int(lost_G.argmax()), float(lost_G.max()))
    return torch.cat(outs), recall


def main() -> int:
    """Print a table of layers and what either choice costs.

    Returns:
        Exit status: 2 where a text is too short or the model has no gate.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="UTF-8 texts, one after the other")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of each text (default: %(default)s)")
    parser.add_argument("--share", type=float, default=Budget().min_share, help="least share (default: %(default)s)")
    arguments = parser.parse_args()
    budget = Budget(min_share=arguments.share)
    num_tokens = arguments.tokens // ROWS * ROWS
    first = min(FIRST, num_tokens // 4) // STRIP_ROWS * STRIP_ROWS
    with open_model(arguments.model) as files:
        gates = find_gates(files)
        if gates is None:
            print(f"gate_recall: error: {files.name} has no gate, train one with `dseek train-gate`", file=sys.stderr)
            return 2
        decoder = Decoder.from_files(files, torch.float32).requires_grad_(False)
        for path in arguments.files:
            ids = files.tokenizer().encode(path.read_text(encoding="utf-8"), add_special_tokens=False)[:num_tokens]
            if len(ids) < num_tokens or num_tokens < 4 * ROWS:
                print(f"gate_recall: error: {path} has {len(ids)} tokens, {num_tokens} are needed", file=sys.stderr)
                return 2
            print(f"{path.name}, {num_tokens} tokens, rows from {first} on, least share {budget.min_share}")
            _report(decoder, gates, torch.tensor(ids), budget, first)
    return 0


def _report(decoder: Decoder, gates: Gates, token_ids: torch.Tensor, budget: Budget, first: int) -> None:
    """Measure one text and print."""
    dense_T, layers = run(decoder, gates, token_ids, None, budget, first)
    print("layer   near   gate: kept  pairs   true masses: kept  pairs   head that misses most")
    for index, layer in enumerate(layers):
        gate, true = (f"{layer.kept[way]:6.1%} {layer.density[way]:6.1%}" for way in WAYS)
        head, lost = layer.worst
        print(f"{index:5} {layer.near:6.1%}       {gate}              {true}   {head}, by {lost:.1%}", flush=True)
    means = [statistics.fmean(layer.kept[way] for layer in layers) for way in WAYS]
    densities = [statistics.fmean(layer.density[way] for layer in layers) for way in WAYS]
    print(f" mean              {means[0]:6.1%} {densities[0]:6.1%}              {means[1]:6.1%} {densities[1]:6.1%}")
    for way in WAYS:
        own_T, _ = run(decoder, gates, token_ids, way, budget, first)
        rise_T = (own_T - dense_T)[first:]
        rise = float(torch.expm1(rise_T.mean()))
        error = float(rise_T.std() / len(rise_T) ** 0.5)
        print(f"perplexity with blocks chosen by {way}: {rise:+.2%} +- {error:.2%}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
