"""How much each key and value head has to see: least shares by head, chosen by what closed blocks cost the model.

A head that looks something up needs its blocks, another hardly notices that they are missing, and the mass that they
hold does not tell the two apart. What counts is the divergence of the model's predictions. To second order it is

    KL = 1/2 E[(g . delta)^2],

where delta is what a head's output loses and g the gradient of the loss of a *drawn* next token by that output
(Fisher's information; as a measure of what may be left out: Theis et al. 2018, Faster gaze prediction with dense
networks and Fisher pruning). Heads and rows are taken as independent. One pass forward and one backward give the cost
of every head at every least share, and what it looks at for that; the least shares that cost least together for the
pairs that the heads may look at are then found with one price for a pair (Everett 1963, Generalized Lagrange multiplier
method).

T tokens, R rows of a chunk, B blocks, H query heads in G groups, S least shares, d head width, D model width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as to_safetensors

from dseek.core.attention_pattern import BLOCK_TOKENS, MAX_SHARE_FACTOR
from dseek.core.errors import ConfigError
from dseek.core.files import atomic_write_bytes
from dseek.models.decoder import Block, Decoder
from dseek.models.projections import CHUNK_ROWS, attend, project
from dseek.ops.attention.rotary import rotate
from dseek.ops.attention.row_selection import STRIP_ROWS
from dseek.train.gate import Gate
from dseek.train.gate_samples import key_statistics
from dseek.train.gate_training import Progress

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 32.0, MAX_SHARE_FACTOR)
"""Factors on the least share to choose among; with the last one nothing is opened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadShares:
    """How least shares by head are chosen."""

    min_share: float = 0.024
    """Least share that a factor of 1 stands for."""
    density: float = 0.2
    """Share of the causal pairs that all heads together may look at, with that least share."""
    num_texts: int = 6
    """Texts that are looked at, the first ones."""
    max_tokens: int = 8192
    """Tokens of a text, from its beginning; the rest is dropped."""
    near_blocks: int = 1
    """Window in blocks."""
    seed: int = 0
    """Of the drawn tokens."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value out of its range.
        """
        if not 0.0 < self.min_share < 1.0 or not 0.0 < self.density <= 1.0:
            raise ConfigError(
                f"a least share of {self.min_share} and a density of {self.density}",
                needed="both above 0, the share below 1, the density up to 1",
            )
        if self.num_texts < 1 or self.near_blocks < 1 or self.max_tokens < 4 * BLOCK_TOKENS:
            raise ConfigError(
                f"{self.num_texts} texts of {self.max_tokens} tokens, a window of {self.near_blocks} blocks",
                needed=f"at least one text, {4 * BLOCK_TOKENS} tokens, one block",
            )


@dataclass(frozen=True, slots=True)
class HeadCosts:
    """What least shares cost; factor 0, with which a head sees everything, comes before `FACTORS`."""

    divergence: torch.Tensor
    """float32 [layers, G, 1 + S], nats a token."""
    density: torch.Tensor
    """float32 [layers, G, 1 + S], share of the causal pairs that the head looks at."""


def choose_shares(costs: HeadCosts, density: float) -> torch.Tensor:
    """Choose a factor for every head.

    Args:
        costs: what each costs.
        density: share of the pairs that all may look at together.

    Returns:
        float32 [layers, G], of `FACTORS`, or 0 for heads that see everything. Within the density, but where even the
        largest factors in all heads exceed it.
    """
    low, high = 0.0, 1.0
    while _at_price(costs, high)[1] > density and high < 1e12:
        high *= 4
    for _ in range(60):
        price = (low + high) / 2
        if _at_price(costs, price)[1] > density:
            low = price
        else:
            high = price
    factors = torch.tensor((0.0, *FACTORS))
    return factors[_at_price(costs, high)[0]]


def _at_price(costs: HeadCosts, price: float) -> tuple[torch.Tensor, float]:
    """The choice of each head where looking at all pairs costs so much, and the density of all."""
    choice_LG = (costs.divergence.double() + price * costs.density.double()).argmin(-1)
    return choice_LG, float(costs.density.gather(-1, choice_LG[..., None]).double().mean())


def measure_heads(
    decoder: Decoder,
    texts: Sequence[torch.Tensor],
    gates: torch.nn.ModuleList,
    folder: Path,
    config: HeadShares,
    progress: Progress,
) -> HeadCosts:
    """Measure what least shares cost each head, in the mean over texts; a text that was measured is not measured again.

    Args:
        decoder: the frozen model.
        texts: token ids, int64 [T] each; those of fewer than four blocks are left out.
        gates: trained, one a layer.
        folder: where a file a text is kept.
        config: how.
        progress: told after every text.

    Returns:
        The costs.

    Raises:
        ConfigError: there is no text to measure with, or a file is of other texts, gates or settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = [text[: min(len(text), config.max_tokens) // BLOCK_TOKENS * BLOCK_TOKENS] for text in texts]
    chosen = [text for text in whole if len(text) >= 4 * BLOCK_TOKENS][: config.num_texts]
    if not chosen:
        raise ConfigError("no text to measure heads with", needed=f"one of at least {4 * BLOCK_TOKENS} tokens")
    found = []
    for index, token_ids in enumerate(chosen):
        file = folder / f"{index:04d}.safetensors"
        origin = _origin(token_ids, gates, config)
        if not file.exists():
            costs = text_costs(decoder, token_ids, gates, config)
            tensors = {"divergence": costs.divergence, "density": costs.density}
            atomic_write_bytes(file, to_safetensors(tensors, {"origin": origin}))
        with safe_open(str(file), framework="pt") as stored:
            if (stored.metadata() or {}).get("origin") != origin:
                raise ConfigError(
                    f"{file} was measured with other texts, gates or settings",
                    remedy="train into another folder, or take the folder's heads away",
                )
            found.append(HeadCosts(stored.get_tensor("divergence"), stored.get_tensor("density")))
        progress("heads", index + 1, len(chosen), {})
    return HeadCosts(
        torch.stack([costs.divergence for costs in found]).mean(0),
        torch.stack([costs.density for costs in found]).mean(0),
    )


def _origin(token_ids: torch.Tensor, gates: torch.nn.ModuleList, config: HeadShares) -> str:
    digest = hashlib.sha256(token_ids.numpy().tobytes())
    for value in gates.state_dict().values():
        digest.update(value.float().numpy().tobytes())
    settings = {key: value for key, value in asdict(config).items() if key not in ("density", "num_texts")}
    digest.update(repr((sorted(settings.items()), FACTORS)).encode())
    return digest.hexdigest()


def text_costs(decoder: Decoder, token_ids: torch.Tensor, gates: torch.nn.ModuleList, config: HeadShares) -> HeadCosts:
    """Measure heads on one text, over the last three quarters of its rows.

    Memory: the model's states of one layer for the backward pass, every layer's input, and R x T scores.

    Args:
        decoder: the frozen model, in which no parameter needs a gradient.
        token_ids: int64 [T], whole blocks.
        gates: one a layer.
        config: how.

    Returns:
        The costs.
    """
    model = decoder.model
    first = len(token_ids) // BLOCK_TOKENS // 4 * BLOCK_TOKENS
    with torch.no_grad():
        states = [model.embed_tokens(token_ids)]
        rotation = model.rotary_emb(torch.arange(len(token_ids)), states[0].dtype, None)
        for block in model.layers:
            assert isinstance(block, Block)
            states.append(_run_block(block, states[-1], rotation)[1])
    gradient_TD = _loss_gradient(decoder, states.pop(), first, config.seed)
    divergences, densities = [], []
    for block, gate in zip(reversed(list(model.layers)), reversed(list(gates)), strict=True):
        assert isinstance(block, Block) and isinstance(gate, Gate)
        x_TD = states.pop().requires_grad_()
        out_THd, y_TD = _run_block(block, x_TD, rotation)
        out_THd.retain_grad()
        y_TD.backward(gradient_TD)
        assert x_TD.grad is not None and out_THd.grad is not None
        gradient_TD = x_TD.grad
        with torch.no_grad():
            divergence, density = _layer_costs(
                block, x_TD.detach(), rotation, out_THd.grad.float(), gate, first=first, config=config
            )
        divergences.append(divergence)
        densities.append(density)
    return HeadCosts(torch.stack(divergences[::-1]), torch.stack(densities[::-1]))


def _run_block(
    block: Block, x_TD: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the output [T, H, d] of a block's attention, and the block's own."""
    q_THd, k_TGd, v_TGd = project(block.self_attn, block.input_layernorm(x_TD))
    out_THd = attend(rotate(q_THd, *rotation), rotate(k_TGd, *rotation), v_TGd, None)
    x_TD = x_TD + block.self_attn.o_proj(out_THd.flatten(1))
    mixed = [block.mlp(block.post_attention_layernorm(x_RD)) for x_RD in x_TD.split(CHUNK_ROWS)]
    return out_THd, x_TD + torch.cat(mixed)


def _loss_gradient(decoder: Decoder, x_TD: torch.Tensor, first: int, seed: int) -> torch.Tensor:
    """Gradient of the summed loss of drawn next tokens by the last block's output; rows before `first` have none."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = x_TD.detach().requires_grad_()
    for x_RD in x_TD[first:].split(1024):
        logits_RV = decoder.lm_head(decoder.model.norm(x_RD)).float()
        drawn_R = torch.multinomial(logits_RV.detach().softmax(-1), 1, generator=generator)[:, 0]
        F.cross_entropy(logits_RV, drawn_R, reduction="sum").backward()
    assert x_TD.grad is not None
    return x_TD.grad


def _layer_costs(
    block: Block,
    x_TD: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    gradient_THd: torch.Tensor,
    gate: Gate,
    *,
    first: int,
    config: HeadShares,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence and density of one layer, [G, 1 + S] each."""
    q_THd, k_TGd, v_TGd = project(block.self_attn, block.input_layernorm(x_TD))
    q_rotated_THd, k_rotated_TGd = rotate(q_THd, *rotation), rotate(k_TGd, *rotation)
    num_tokens, num_groups = len(x_TD), k_TGd.shape[1]
    statistics_BGS = key_statistics(k_TGd.float())
    means_BGd = k_rotated_TGd.float().unflatten(0, (-1, BLOCK_TOKENS)).mean(1)
    divergence_GS = torch.zeros(num_groups, len(FACTORS), dtype=torch.float64)
    pairs_GS = torch.zeros_like(divergence_GS)
    causal_pairs = num_rows = 0
    for rows_R in _chunks(first, num_tokens, q_THd.shape[1]):
        # What ends before the chunk does holds all that its rows see.
        past = int(rows_R[-1]) + 1
        num_blocks = past // BLOCK_TOKENS
        own_R = rows_R // BLOCK_TOKENS
        scores_RHB = gate(
            q_THd[rows_R].float(),
            q_rotated_THd[rows_R].float(),
            own_R,
            statistics_BGS[:num_blocks],
            means_BGd[:num_blocks],
            0,
        )
        own_RH = gate.own_block(q_THd[rows_R].float())
        seen_RB = torch.arange(num_blocks)[None] <= own_R[:, None]
        before_RB = torch.arange(num_blocks)[None] < own_R[:, None]
        expected = torch.cat((scores_RHB.masked_fill(~before_RB[:, None], -1e9), own_RH[..., None]), dim=-1).softmax(-1)
        share_GRB = expected[..., :-1].unflatten(1, (num_groups, -1)).amax(2).transpose(0, 1)
        tokens_RB = torch.where(before_RB, BLOCK_TOKENS, 0)
        tokens_RB[torch.arange(len(rows_R)), own_R] = rows_R % BLOCK_TOKENS + 1
        causal_pairs += int(tokens_RB.sum())
        num_rows += len(rows_R)
        near_RB = seen_RB & (torch.arange(num_blocks)[None] >= own_R[:, None] - config.near_blocks)
        near_RB[:, 0] = True
        for group in range(num_groups):
            mass_PRB, pull_PRB = _block_sums(
                q_rotated_THd[rows_R].unflatten(1, (num_groups, -1))[:, group],
                gradient_THd[rows_R].unflatten(1, (num_groups, -1))[:, group],
                k_rotated_TGd[:past, group],
                v_TGd[:past, group],
                rows_R,
            )
            dense_PR = pull_PRB.sum(-1) / mass_PRB.sum(-1)
            for index, factor in enumerate(FACTORS):
                opened_RB = share_GRB[group] >= config.min_share * factor
                kept_RB = opened_RB.unflatten(0, (-1, STRIP_ROWS)).cummax(1).values.flatten(0, 1)
                kept_RB = (kept_RB | near_RB) & seen_RB
                left_PR = (pull_PRB * kept_RB).sum(-1) / (mass_PRB * kept_RB).sum(-1)
                # All heads of a group close the same blocks: their losses come together.
                divergence_GS[group, index] += (left_PR - dense_PR).sum(0).square().sum()
                pairs_GS[group, index] += (kept_RB * tokens_RB).sum()
    nothing, everything = torch.zeros(num_groups, 1), torch.ones(num_groups, 1)
    divergence_GS, density_GS = divergence_GS.float() / (2 * num_rows), pairs_GS.float() / causal_pairs
    return torch.cat((nothing, divergence_GS), dim=1), torch.cat((everything, density_GS), dim=1)


def _chunks(first: int, num_tokens: int, num_heads: int) -> Iterator[torch.Tensor]:
    """Every other chunk of whole blocks from a row on, of about so many rows that their scores fit."""
    size = max(1, 2**25 // (num_heads * num_tokens) // BLOCK_TOKENS) * BLOCK_TOKENS
    for begin in range(first, num_tokens, 2 * size):
        yield torch.arange(begin, min(begin + size, num_tokens))


def _block_sums(
    q_RPd: torch.Tensor, gradient_RPd: torch.Tensor, k_Sd: torch.Tensor, v_Sd: torch.Tensor, rows_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every block the sum of its weights w, not normalised, and of w times the gradient along its value.

    Args:
        q_RPd: rotated queries of one group's heads.
        gradient_RPd: by their outputs.
        k_Sd: rotated keys, whole blocks.
        v_Sd: values.
        rows_R: positions of the queries.

    Returns:
        float32 [P, R, B] each.
    """
    scores_PRS = (q_RPd.transpose(0, 1) @ k_Sd.T).float() / math.sqrt(k_Sd.shape[-1])
    scores_PRS.masked_fill_(torch.arange(len(k_Sd))[None] > rows_R[:, None], float("-inf"))
    weights_PRS = (scores_PRS - scores_PRS.amax(-1, keepdim=True)).exp_()
    pull_PRS = (gradient_RPd.transpose(0, 1).to(v_Sd.dtype) @ v_Sd.T).float() * weights_PRS
    blocks = (-1, BLOCK_TOKENS)
    return weights_PRS.unflatten(-1, blocks).sum(-1), pull_PRS.unflatten(-1, blocks).sum(-1)
