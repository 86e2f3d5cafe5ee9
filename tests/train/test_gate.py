"""The gate: its training target, its loss, and that the native descent follows it as the definition says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dseek.core.attention_pattern import BLOCK_TOKENS, RADIX
from dseek.engine.batch import Batch
from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from dseek.train.gate import Gate, free_cells, level_loss, pool_statistics
from dseek.train.gate_samples import layer_samples, pooled_mass


def test_pooled_mass_is_that_of_the_whole_map() -> None:
    torch.manual_seed(0)
    num_blocks, heads, groups, width = 3, 4, 2, 16
    tokens = num_blocks * BLOCK_TOKENS
    q, k = torch.randn(tokens, heads, width), torch.randn(tokens, groups, width)
    rows = torch.arange(tokens).view(num_blocks, BLOCK_TOKENS)[:, ::9]
    found = pooled_mass(q, k, rows)
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(2, 1)) / width**0.5
    weights = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf")).softmax(-1)
    pooled = weights.unflatten(-1, (num_blocks, BLOCK_TOKENS)).sum(-1)
    largest = pooled.view(groups, 2, tokens, num_blocks).amax(1)
    expected = torch.stack([largest[:, rows[block]].mean(1) for block in range(num_blocks)])
    torch.testing.assert_close(found, expected)


def test_free_cells_leave_out_what_is_exact_anyway() -> None:
    blocks = free_cells(20, 0, near_blocks=4)
    assert not blocks[5].any()  # blocks 1 to 4 are near, 0 is the first
    assert blocks[6].nonzero().flatten().tolist() == [1]
    assert blocks[19].nonzero().flatten().tolist() == list(range(1, 15))
    cells = free_cells(40, 1, near_blocks=4)
    assert cells[27].nonzero().flatten().tolist() == [1]  # cell 2 ends with block 23, at the window's edge
    assert cells[28].nonzero().flatten().tolist() == [1, 2]


def test_loss_is_zero_for_the_true_mass_and_grows_away_from_it() -> None:
    torch.manual_seed(0)
    mass = torch.rand(12, 2, 12)
    free = free_cells(12, 0, near_blocks=2)
    exact, weight = level_loss(mass.log(), mass, free)
    assert float(exact) == pytest.approx(0.0, abs=1e-5) and float(weight) > 0
    worse, _ = level_loss(torch.zeros_like(mass), mass, free)
    assert float(worse) > 0.01


def test_cells_are_pooled_from_their_blocks() -> None:
    torch.manual_seed(0)
    keys = torch.randn(2 * RADIX * BLOCK_TOKENS + 7 * BLOCK_TOKENS, 1, 16)
    blocks = keys.unflatten(0, (-1, BLOCK_TOKENS))
    statistics = torch.cat((blocks.amax(1), blocks.amin(1), blocks.mean(1)), -1)
    cells = keys[: 2 * RADIX * BLOCK_TOKENS].unflatten(0, (2, -1))
    expected = torch.cat((cells.amax(1), cells.amin(1), cells.mean(1)), -1)
    torch.testing.assert_close(pool_statistics(statistics, 1), expected)


@pytest.mark.native
@pytest.mark.model
def test_native_descent_opens_what_the_gate_scores_best(embedded_model: Path) -> None:
    from dseek.engine import native_runner
    from dseek.ops import native
    from dseek.plan.formats import LayerFormats

    near, top, dim, levels, tokens = 1, 1, 32, 2, 30 * BLOCK_TOKENS
    ids = np.random.default_rng(0).integers(0, 40_000, tokens).astype(np.int32)
    with open_model(str(embedded_model)) as files:
        shape = files.shape
        torch.manual_seed(1)
        heads = shape.num_heads // shape.num_kv_heads * shape.head_dim
        gate = Gate(shape.num_kv_heads, heads, 3 * shape.head_dim, gate_dim=dim, num_levels=levels, theta=1e4)
        decoder = Decoder.from_files(files, torch.float32).requires_grad_(False)
        texts = torch.from_numpy(ids).long()
        sample = next(layer_samples(decoder, texts, rows_per_block=1, generator=torch.Generator()))
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
    arrays = tuple(
        np.ascontiguousarray(value.detach().numpy()) for value in (gate.query, gate.key, gate.query_gain, gate.key_gain)
    )
    num_blocks = tokens // BLOCK_TOKENS
    angles = np.arange(num_blocks, dtype=np.float32)[:, None] * BLOCK_TOKENS * gate.frequencies.numpy()
    runner.set_gate_rotation(np.cos(angles), np.sin(angles))
    runner.set_pattern(0, near_blocks=[near] * shape.num_kv_heads, top_blocks=top, far=True, gate=arrays)
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
        np.ascontiguousarray(decoder.model.embed_tokens.weight[torch.from_numpy(ids).long()].numpy()),
        batch.positions,
        batch.row_starts,
        batch.page_tables,
        0,
        1,
    )

    with torch.no_grad():
        scores = [gate(sample.queries, pool_statistics(sample.keys, level), level) for level in range(levels)]
    for group in range(shape.num_kv_heads):
        for query_block in range(num_blocks):
            near_from = max(0, query_block - near)
            # 1. Cells of eight blocks: the first is opened by force, of the others the best one that is not near.
            cells = [cell for cell in range(1, query_block // RADIX) if (cell + 1) * RADIX <= near_from]
            forced = [cell for cell in range(query_block // RADIX) if cell not in cells]
            best_cells = sorted(cells, key=lambda cell: -float(scores[1][query_block, group, cell]))[:top]
            far = [(1, cell) for cell in cells if cell not in best_cells]
            # 2. Their blocks, and those behind the last whole cell.
            blocks = [cell * RADIX + child for cell in sorted(forced + best_cells) for child in range(RADIX)]
            blocks += range(query_block // RADIX * RADIX, query_block)
            blocks = [block for block in blocks if 0 < block < near_from]
            best = sorted(blocks, key=lambda block: -float(scores[0][query_block, group, block]))[:top]
            far += [(0, block) for block in blocks if block not in best]
            found = runner.selection(0, group, pages, query_block)
            assert found[0] == sorted({0, *best, *range(near_from, query_block + 1)}), (group, query_block)
            assert [tuple(cell) for cell in found[1]] == far, (group, query_block)
