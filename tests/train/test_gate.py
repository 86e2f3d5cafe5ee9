"""The gate: its training target, its loss, and that the native kernels follow it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dseek.core.attention_pattern import BLOCK_TOKENS, RADIX
from dseek.engine.batch import Batch
from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from dseek.ops.attention.row_selection import select_rows
from dseek.train.gate import Gate, free_cells, partition_loss, pool_means, pool_statistics
from dseek.train.gate_samples import LayerSample, block_mass, layer_samples
from dseek.train.gate_training import GateTraining, gate_loss


def test_block_mass_is_that_of_the_whole_map() -> None:
    torch.manual_seed(0)
    num_blocks, heads, groups, width = 3, 4, 2, 16
    tokens = num_blocks * BLOCK_TOKENS
    q, k = torch.randn(tokens, heads, width), torch.randn(tokens, groups, width)
    rows = torch.arange(0, tokens, 9)
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(2, 1)) / width**0.5
    weights = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf")).softmax(-1)
    expected = weights.unflatten(-1, (num_blocks, BLOCK_TOKENS)).sum(-1).transpose(0, 1)[rows]
    torch.testing.assert_close(block_mass(q[rows], k, rows), expected)


def test_free_cells_leave_out_what_is_exact_anyway() -> None:
    blocks = free_cells(torch.tensor([5, 6, 19]), 20, 0, near_blocks=4)
    assert not blocks[0].any()  # blocks 1 to 4 are near, 0 is the first
    assert blocks[1].nonzero().flatten().tolist() == [1]
    assert blocks[2].nonzero().flatten().tolist() == list(range(1, 15))
    cells = free_cells(torch.tensor([27, 28]), 5, 1, near_blocks=4)
    assert cells[0].nonzero().flatten().tolist() == [1]  # cell 2 ends with block 23, at the window's edge
    assert cells[1].nonzero().flatten().tolist() == [1, 2]


def test_loss_is_zero_for_the_true_mass_and_grows_away_from_it() -> None:
    torch.manual_seed(0)
    mass, own_mass = torch.rand(12, 2, 12), torch.rand(12, 2)
    counted = torch.ones(12, 12).tril(-1).bool()
    exact = partition_loss([mass.log()], [mass], [counted], own_mass.log(), own_mass)
    assert float(exact) == pytest.approx(0.0, abs=1e-5)
    worse = partition_loss([torch.zeros_like(mass)], [mass], [counted], own_mass.log(), own_mass)
    assert float(worse) > 0.01


def test_cells_are_pooled_from_their_blocks() -> None:
    torch.manual_seed(0)
    keys = torch.randn(2 * RADIX * BLOCK_TOKENS + 7 * BLOCK_TOKENS, 1, 16)
    blocks = keys.unflatten(0, (-1, BLOCK_TOKENS))
    statistics = torch.cat((blocks.amax(1), blocks.amin(1), blocks.mean(1)), -1)
    cells = keys[: 2 * RADIX * BLOCK_TOKENS].unflatten(0, (2, -1))
    expected = torch.cat((cells.amax(1), cells.amin(1), cells.mean(1)), -1)
    torch.testing.assert_close(pool_statistics(statistics, 1), expected)
    torch.testing.assert_close(pool_means(blocks.mean(1), 1), cells.mean(1))


def test_an_untrained_gate_scores_by_mean_keys() -> None:
    gate, sample = new_gate(), new_sample()
    scores = gate(sample.queries, sample.rotated, sample.rows // 64, sample.statistics, sample.means, 0)
    expected = torch.einsum("rgpd,cgd->rgpc", sample.rotated.unflatten(1, (2, 2)), sample.means).flatten(1, 2) / 4
    torch.testing.assert_close(scores, expected)
    cells = pool_statistics(sample.statistics, 1), pool_means(sample.means, 1)
    upper = gate(sample.queries, sample.rotated, sample.rows // 64, *cells, 1)
    torch.testing.assert_close(upper[..., 0], expected[..., :8].mean(-1) + math.log(8))


def test_training_lowers_the_loss() -> None:
    config = GateTraining(num_levels=2, near_blocks=1)
    gate, sample = new_gate(), new_sample()
    before = gate_loss(gate, sample, config).item()
    optimizer = torch.optim.Adam(gate.parameters(), lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        gate_loss(gate, sample, config).backward()
        optimizer.step()
    assert gate_loss(gate, sample, config).item() < 0.6 * before


def new_gate() -> Gate:
    torch.manual_seed(1)
    return Gate(4, 2, 16, gate_dim=16, num_levels=2, theta=1e4)


def new_sample() -> LayerSample:
    torch.manual_seed(2)
    rows, blocks = torch.arange(700, 1280, 7), 20
    queries = torch.randn(len(rows), 4, 16)
    keys = torch.randn(blocks * 64, 2, 16) + 2 * torch.randn(blocks, 2, 16).repeat_interleave(64, 0)
    split = keys.unflatten(0, (blocks, 64))
    statistics = torch.cat((split.amax(1), split.amin(1), split.mean(1)), -1)
    return LayerSample(rows, queries, queries, statistics, split.mean(1), block_mass(queries, keys, rows))


class GateScorer:
    """A gate as a scorer of the reference, from the sample of all rows of a text."""

    def __init__(self, gate: Gate, sample: LayerSample) -> None:
        self.heads = sample.queries.shape[1] // sample.means.shape[1]
        with torch.no_grad():
            self.own = gate.own_block(sample.queries)
            self.scores = [
                gate(
                    sample.queries,
                    sample.rotated,
                    sample.rows // BLOCK_TOKENS,
                    pool_statistics(sample.statistics, level),
                    pool_means(sample.means, level),
                    level,
                )
                for level in range(2)
            ]

    def cells(self, position: int, group: int, level: int, indices: list[int]) -> torch.Tensor:
        return self.scores[level][position, group * self.heads : (group + 1) * self.heads][:, list(indices)]

    def own_block(self, position: int, group: int) -> torch.Tensor:
        return self.own[position, group * self.heads : (group + 1) * self.heads]


@pytest.mark.native
@pytest.mark.model
def test_native_rows_open_what_the_gate_says(embedded_model: Path) -> None:
    from dseek.engine import native_runner
    from dseek.ops import native
    from dseek.plan.formats import LayerFormats

    near, most, share, levels, tokens = 1, 6, 0.06, 2, 14 * BLOCK_TOKENS
    ids = np.random.default_rng(0).integers(0, 40_000, tokens).astype(np.int32)
    with open_model(str(embedded_model)) as files:
        shape = files.shape
        factors = [1.0 + 2.0 * group for group in range(shape.num_kv_heads)]
        torch.manual_seed(1)
        gate = Gate(
            shape.num_heads, shape.num_kv_heads, shape.head_dim, gate_dim=32, num_levels=levels, theta=shape.rope.theta
        )
        with torch.no_grad():
            for part, spread in ((gate.key_gain, 1.0), (gate.own, 0.1), (gate.own_bias, 0.5), (gate.scale, 0.2)):
                part += spread * torch.randn_like(part)
        decoder = Decoder.from_files(files, torch.float32).requires_grad_(False)
        texts = torch.from_numpy(ids).long()
        sample = next(layer_samples(decoder, texts, num_rows=tokens, generator=torch.Generator()))
        compiled = native.require()
        block = native_runner._block(files, "model.layers.0.", LayerFormats.uniform("f32"))
        table = native_runner.pack("f32", [files.tensor("model.embed_tokens.weight")], native_runner.to_float32)
        runner = compiled.Decoder(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_layers=1,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab_size,
            epsilon=shape.rms_norm_eps,
            cache_type="fp32",
        )
        runner.add_block(**block, window=0)
        runner.set_tables(embedding=table, head=table, final_norm=native_runner._vector(files, "model.norm.weight"))
    parts = (gate.query, gate.key, gate.query_gain, gate.key_gain, gate.scale, gate.own, gate.own_bias)
    num_blocks = tokens // BLOCK_TOKENS
    angles = np.arange(num_blocks, dtype=np.float32)[:, None] * BLOCK_TOKENS * gate.frequencies.numpy()
    runner.set_gate_rotation(np.cos(angles), np.sin(angles))
    runner.set_pattern(
        0,
        near_blocks=[near] * shape.num_kv_heads,
        top_blocks=most,
        min_share=share,
        share_factors=factors,
        gate=tuple(np.ascontiguousarray(value.detach().numpy()) for value in parts),
    )
    cos, sin = native_runner.rope_table(shape, tokens)
    runner.set_rotary(cos, sin)
    runner.allocate_cache(num_blocks)
    pages = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
    batch = Batch(
        ids,
        np.arange(tokens, dtype=np.int32),
        np.array([0, tokens], dtype=np.int32),
        pages[None].copy(),
        np.array([tokens - 1], dtype=np.int32),
    )
    runner.run_blocks(
        np.ascontiguousarray(decoder.model.embed_tokens.weight[texts].numpy()),
        batch.positions,
        batch.row_starts,
        batch.page_tables,
        0,
        1,
    )
    keys = torch.zeros(tokens, shape.num_kv_heads, shape.head_dim)  # the scorer knows them
    both = [
        select_rows(
            sample.rotated,
            keys,
            near_blocks=(near,) * shape.num_kv_heads,
            min_share=share * factor,
            top_blocks=most,
            scorer=GateScorer(gate, sample),
        )
        for factor in factors
    ]
    expected = torch.stack([chosen[group] for group, chosen in enumerate(both)])
    found = torch.zeros_like(expected)
    for group in range(shape.num_kv_heads):
        for last in range(15, tokens, 16):
            blocks, first_rows = runner.row_selection(0, group, pages, last)
            for index, row in zip(blocks, first_rows, strict=True):
                found[group, last - 15 + row : last + 1, index] = True
    assert both[0][1].sum() > 1.1 * expected[1].sum(), "the larger share opens less"
    assert expected.sum() > 1.1 * tokens * shape.num_kv_heads * 3
    # The two compute scores in different orders: what lies on the bound may fall to either side.
    assert (found != expected).sum() <= 0.001 * expected.sum()
