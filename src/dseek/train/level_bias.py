"""`learn_level_biases`: what is added to the scores of far cells, by head and level, learned on a frozen model.

A far cell counts by its mean key and value, which is wrong by what its keys differ, and more so the larger it is. A
bias for each query head and level says how far such cells are to be trusted. It is learned by the relative error of the
attention's output, |o - o_dense|^2 / |o_dense|^2, mean over rows and heads, layer by layer on the inputs that dense
attention gives.

What a row attends to does not depend on the bias, so its exact tokens and the far cells of each level are summed once:
P = 1 + L parts, each with an output u_p and the logarithm of its mass m_p. Then

    w = softmax(m + [0, b]),    o - o_dense = sum of w_p (u_p - o_dense),

so that of a row's vectors only their P x P products matter: a step of the optimiser costs H P^2 multiplications a row
and knows neither keys nor values.

Memory: of each text the projections of one layer (some eight tensors of tokens x model width), three tables of
`CHUNK_ELEMENTS` scores, and R H P^2 numbers. Time: the model's pass over the texts, and of the drawn rows twice the
dense attention in float32.

T tokens, S keys, R rows, H query heads in G groups (h in one of them), B blocks, C cells of all levels, F of one of the
L levels, P parts, d head width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors

from dseek.core.attention_pattern import BLOCK_TOKENS, AttentionPattern
from dseek.core.errors import ConfigError
from dseek.core.files import atomic_write_bytes
from dseek.models.decoder import Decoder
from dseek.models.gate_file import MAX_LEVEL_BIAS
from dseek.models.projections import LayerProjections, layer_projections
from dseek.ops.attention.cell_scores import tabulated_scorer
from dseek.ops.attention.pyramid import CellTable, build_pyramid, tabulate
from dseek.ops.attention.selection import BlockChoice, choose
from dseek.train.gate_training import Progress

CHUNK_ELEMENTS = 2**24
"""Scores of rows and keys that exist at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelBiasTraining:
    """How level biases are learned."""

    window_tokens: int = 256
    """Window of the pattern whose far cells are looked at."""
    top_blocks: int = 8
    """Blocks that it selects. Larger cells are far only where there are more of them than that: at 8, from some 5,400
    tokens on; in shorter texts they get no bias of their own."""
    num_texts: int = 4
    """Texts, the longest ones that there are."""
    max_tokens: int = 8192
    """Tokens of a text, from its beginning; the rest is dropped."""
    num_rows: int = 512
    """Rows of each text, drawn from its second half, where there is much to be far."""
    num_steps: int = 80
    """Steps of Adam on all rows at once."""
    learning_rate: float = 0.25
    """The first one's, lowered along a cosine."""
    seed: int = 0
    """Of the rows."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value out of its range.
        """
        for what, value, most in (
            ("number of texts", self.num_texts, 10_000),
            ("number of tokens", self.max_tokens, 2**20),
            ("number of rows", self.num_rows, 65_536),
            ("number of steps", self.num_steps, 10_000),
        ):
            if not 1 <= value <= most:
                raise ConfigError(f"the level biases' {what} is {value}", needed=f"1 to {most}")
        if not 0.0 < self.learning_rate <= 10.0:
            raise ConfigError(f"the level biases' learning rate is {self.learning_rate}", needed="above 0, up to 10")
        assert self.pattern.far

    @property
    def pattern(self) -> AttentionPattern:
        """The pattern."""
        return AttentionPattern(
            kind="dynamic", window_tokens=(self.window_tokens,), top_blocks=self.top_blocks, far=True
        )


@dataclass(frozen=True, slots=True)
class RowParts:
    """What some rows attend to, summed by parts: the exact tokens, then the far cells of each level."""

    log_mass: torch.Tensor
    """float32 [R, H, P], logarithm of the sum of exp(score), tokens of cells counted; minus infinity for none."""
    products: torch.Tensor
    """float32 [R, H, P, P], (u_p - o_dense) . (u_q - o_dense) over |o_dense|^2."""

    def errors(self, bias_HL: torch.Tensor) -> torch.Tensor:
        """Relative output error of each head.

        Args:
            bias_HL: float32 [H, L].

        Returns:
            float32 [H], mean over the rows, differentiable in the bias.
        """
        added_HP = torch.cat((torch.zeros_like(bias_HL[:, :1]), bias_HL), dim=1)
        weights_RHP = (self.log_mass + added_HP).softmax(-1)
        # Not a product of matrices: so many of 3 x 3 would keep threads meeting.
        products_RHP = (self.products * weights_RHP[..., None, :]).sum(-1)
        return (weights_RHP * products_RHP).sum(-1).mean(0)


@torch.no_grad()
def row_parts(
    q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGd: torch.Tensor, rows_R: torch.Tensor, pattern: AttentionPattern
) -> RowParts:
    """Sum up what rows attend to, beside what dense attention gives them.

    Args:
        q_THd: [T, H, d] rotated queries.
        k_TGd: [T, G, d] rotated keys.
        v_TGd: [T, G, d] values.
        rows_R: int64 [R], rising positions of the rows.
        pattern: with far cells; its selection is the untrained one.

    Returns:
        The parts, of all levels that a sequence of T tokens has.
    """
    q_THd, k_TGd, v_TGd = (tensor.float() for tensor in (q_THd, k_TGd, v_TGd))
    table = tabulate(pyramid := build_pyramid(k_TGd, v_TGd))
    blocks, places_R = (rows_R // BLOCK_TOKENS).unique(return_inverse=True)
    scorer = tabulated_scorer(q_THd[blocks * BLOCK_TOKENS], blocks.tolist(), pyramid)
    heads = q_THd.shape[1] // k_TGd.shape[1]
    chunk_rows = max(1, CHUNK_ELEMENTS // (heads * len(k_TGd)))
    groups = []
    for group in range(k_TGd.shape[1]):
        choices = [choose(pattern, block, group, scorer) for block in blocks.tolist()]
        exact_NB, far_NC = _memberships(choices, blocks.tolist(), table)
        chunks = [
            _group_parts(
                q_THd[some_R, group * heads : (group + 1) * heads] / math.sqrt(q_THd.shape[2]),
                (k_TGd[:, group], v_TGd[:, group]),
                some_R,
                exact_NB[places].repeat_interleave(BLOCK_TOKENS, dim=1)[:, : len(k_TGd)],
                far_NC[places],
                (table, group),
            )
            for some_R, places in zip(rows_R.split(chunk_rows), places_R.split(chunk_rows), strict=True)
        ]
        groups.append([torch.cat(tensors) for tensors in zip(*chunks, strict=True)])
    return RowParts(*(torch.cat(tensors, dim=1) for tensors in zip(*groups, strict=True)))


def _memberships(
    choices: Sequence[BlockChoice], query_blocks: Sequence[int], table: CellTable
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each of N query blocks attends to: exact blocks with its own, bool [N, B], and far cells, bool [N, C]."""
    exact_NB = torch.zeros(len(choices), query_blocks[-1] + 1, dtype=torch.bool)
    far_NC = torch.zeros(len(choices), len(table.level), dtype=torch.bool)
    for index, (choice, block) in enumerate(zip(choices, query_blocks, strict=True)):
        exact_NB[index, [*choice.exact_blocks, block]] = True
        far_NC[index, table.places(choice.far_cells)] = True
    return exact_NB, far_NC


def _group_parts(
    q_Rhd: torch.Tensor,
    keys_values: tuple[torch.Tensor, torch.Tensor],
    rows_R: torch.Tensor,
    exact_RS: torch.Tensor,
    far_RC: torch.Tensor,
    cells: tuple[CellTable, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masses [R, h, P] and products [R, h, P, P] of rows of one group; queries are scaled already."""
    k_Sd, v_Sd = (x_Td[: exact_RS.shape[1]] for x_Td in keys_values)
    table, group = cells
    later_RS = torch.arange(len(k_Sd)) > rows_R[:, None]
    z_RhS = (q_Rhd @ k_Sd.T).masked_fill_(later_RS[:, None], -math.inf)
    dense_Rhd = z_RhS.softmax(-1) @ v_Sd
    parts = [(z_RhS.masked_fill_(~exact_RS[:, None], -math.inf), v_Sd)]
    for level in range(len(table.first_place)):
        places = (table.level == level).nonzero()[:, 0]
        z_RhF = q_Rhd @ table.key_mean[places, group].T + table.log_tokens[places]
        parts.append((z_RhF.masked_fill_(~far_RC[:, None, places], -math.inf), table.value_mean[places, group]))

    mass_RhP = torch.stack([z.logsumexp(-1) for z, _ in parts], dim=-1)
    # A part without cells has no output; the nothing that stands for it is multiplied by the weight zero.
    off_RhPd = torch.stack([z.softmax(-1).nan_to_num(0.0) @ v - dense_Rhd for z, v in parts], dim=-2)
    size_Rh = dense_Rhd.square().sum(-1).clamp(min=1e-12)
    return mass_RhP, off_RhPd @ off_RhPd.mT / size_Rh[..., None, None]


def fit_level_bias(texts: Sequence[RowParts], config: LevelBiasTraining) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the bias of one layer that makes the relative output error small.

    Heads do not know of each other. Each keeps the best bias that was met, and none is worse than the bias 0, nor than
    far cells left out. A level of no use would go to minus infinity; the bound `MAX_LEVEL_BIAS` stands for that. Levels
    above the highest that some row has a far cell of are left out: they take the last one's bias.

    Args:
        texts: parts of one layer's rows; texts may differ in their levels.
        config: steps.

    Returns:
        float32 [H, L] bias; float32 [3] mean error with it, with the bias 0 and with far cells left out.
    """
    seen = [int(parts.log_mass.isfinite().any(1).any(0).nonzero().max()) for parts in texts]
    num_parts = 1 + max(1, *seen)
    texts = [_with_parts(parts, num_parts) for parts in texts]
    counts = [len(parts.log_mass) for parts in texts]

    def errors(bias_HL: torch.Tensor) -> torch.Tensor:
        sums = [parts.errors(bias_HL) * count for parts, count in zip(texts, counts, strict=True)]
        return torch.stack(sums).sum(0) / sum(counts)

    bias_HL = torch.zeros(texts[0].log_mass.shape[1], num_parts - 1, requires_grad=True)
    off_HL = torch.full_like(bias_HL, -MAX_LEVEL_BIAS, requires_grad=False)
    optimizer = torch.optim.Adam([bias_HL], lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.num_steps)
    with torch.no_grad():
        before_H, without_H = errors(torch.zeros_like(off_HL)), errors(off_HL)
    best_HL, least_H = off_HL.clone(), without_H.clone()
    for step in range(config.num_steps + 1):
        error_H = errors(bias_HL)
        better_H = error_H.detach() < least_H
        least_H = torch.where(better_H, error_H.detach(), least_H)
        best_HL = torch.where(better_H[:, None], bias_HL.detach(), best_HL)
        if step == config.num_steps:
            break
        optimizer.zero_grad()
        error_H.sum().backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            bias_HL.clamp_(-MAX_LEVEL_BIAS, MAX_LEVEL_BIAS)
    return best_HL, torch.stack([least_H.mean(), before_H.mean(), without_H.mean()])


def _with_parts(parts: RowParts, num_parts: int) -> RowParts:
    """Cut off levels without cells, or add some."""
    more = max(0, num_parts - parts.log_mass.shape[-1])
    return RowParts(
        torch.nn.functional.pad(parts.log_mass, (0, more), value=-math.inf)[..., :num_parts],
        torch.nn.functional.pad(parts.products, (0, more, 0, more))[..., :num_parts, :num_parts],
    )


def learn_level_biases(
    decoder: Decoder, texts: Sequence[torch.Tensor], state_file: Path, config: LevelBiasTraining, progress: Progress
) -> list[torch.Tensor]:
    """Learn the level biases of all layers; a layer that was finished before is not learned again.

    All texts pass through the model side by side, layer by layer, and are attended to densely.

    Args:
        decoder: the frozen model; its layers must attend to everything.
        texts: token ids, int64 [T] each.
        state_file: safetensors that finished layers are kept in; where it exists, learning goes on after them.
        config: how.
        progress: told after every layer, with the relative output error, that of the bias 0, and that without far
            cells.

    Returns:
        float32 [H, L] of each layer.

    Raises:
        ConfigError: the state is of other texts or settings.
    """
    assert decoder.shape.sliding_window is None, "level biases are learned where layers see everything"
    chosen = [ids[: config.max_tokens] for ids in sorted(texts, key=len, reverse=True)[: config.num_texts]]
    digest = hashlib.sha256(b"".join(ids.numpy().tobytes() for ids in chosen)).hexdigest()[:16]
    settings = {key: str(value) for key, value in asdict(config).items()} | {"texts": digest}
    biases = _restore(state_file, settings)
    num_layers = decoder.shape.num_layers
    if len(biases) == num_layers:
        return biases
    rows = [_draw_rows(len(ids), index, config) for index, ids in enumerate(chosen)]
    passes = zip(*(layer_projections(decoder, ids) for ids in chosen), strict=True)
    for layer, projections in enumerate(passes):
        if layer < len(biases):
            continue
        parts = [_parts_of(text, rows_R, config) for text, rows_R in zip(projections, rows, strict=True)]
        bias_HL, errors = fit_level_bias(parts, config)
        biases.append(bias_HL)
        kept = {f"layers.{index}.level_bias": bias for index, bias in enumerate(biases)}
        atomic_write_bytes(state_file, to_safetensors(kept, settings))
        names = ("output_error", "output_error_unbiased", "output_error_without_far")
        progress("level biases", layer + 1, num_layers, dict(zip(names, errors.tolist(), strict=True)))
        if layer + 1 == num_layers:
            break
    return biases


def _parts_of(text: LayerProjections, rows_R: torch.Tensor, config: LevelBiasTraining) -> RowParts:
    return row_parts(text.rotated_queries, text.rotated_keys, text.values, rows_R, config.pattern)


def _draw_rows(num_tokens: int, index: int, config: LevelBiasTraining) -> torch.Tensor:
    """Rising positions in the second half of a text, the same ones in all layers."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
    first = num_tokens // 2
    drawn = torch.randperm(num_tokens - first, generator=generator)[: config.num_rows]
    return first + drawn.sort().values


def _restore(file: Path, settings: dict[str, str]) -> list[torch.Tensor]:
    """Read the layers that are finished."""
    if not file.exists():
        return []
    with safe_open(str(file), framework="pt") as stored:
        metadata = stored.metadata() or {}
        for key, value in settings.items():
            if metadata.get(key) != value:
                raise ConfigError(
                    f"{file} is of level biases learned with {key} {metadata.get(key)}",
                    needed=f"{key} {value}",
                    remedy="train into another folder, or with the settings and texts it was begun with",
                )
        count = len(list(stored.keys()))
        return [stored.get_tensor(f"layers.{layer}.level_bias") for layer in range(count)]
