"""Statistics of the pyramid's cells against their definition, and their independence of later tokens."""

from __future__ import annotations

import itertools

import pytest
import torch

from dseek.ops.attention.pyramid import block_key_sums, build_pyramid, key_pyramid, tabulate


def draw(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 511, 512, 1000, 4096, 4200])
def test_every_complete_cell_has_the_statistics_of_its_tokens(num_tokens: int, poisoned_memory: None) -> None:
    k, v, plain = (draw(num_tokens, 2, 3, seed=seed) for seed in range(3))
    pyramid = build_pyramid(k, v, plain)
    assert [cells.num_tokens for cells in pyramid] == [64, 512, 4096]
    for cells in pyramid:
        assert cells.num_cells == num_tokens // cells.num_tokens
        for index in range(cells.num_cells):
            tokens = slice(index * cells.num_tokens, (index + 1) * cells.num_tokens)
            torch.testing.assert_close(cells.key_mean[index], k[tokens].mean(0), rtol=0, atol=1e-14)
            torch.testing.assert_close(cells.value_mean[index], v[tokens].mean(0), rtol=0, atol=1e-14)
            torch.testing.assert_close(cells.plain_mean[index], plain[tokens].mean(0), rtol=0, atol=1e-14)
            assert torch.equal(cells.plain_max[index], plain[tokens].amax(0))
            assert torch.equal(cells.plain_min[index], plain[tokens].amin(0))


def test_sums_have_the_bits_of_adding_token_by_token_in_float32() -> None:
    k = draw(1100, 1, 5, dtype=torch.bfloat16)
    pyramid = build_pyramid(k)
    blocks = []
    for block in range(16):
        running = torch.zeros(1, 5)
        for token in k[block * 64 : (block + 1) * 64].float():
            running = running + token
        blocks.append(running)
    cell = torch.zeros(1, 5)
    for child in blocks[8:16]:
        cell = cell + child
    assert pyramid[0].key_sum.dtype == torch.float32
    assert torch.equal(pyramid[0].key_sum[:16], torch.stack(blocks))
    assert torch.equal(pyramid[1].key_sum[1], cell)


def test_later_tokens_do_not_touch_complete_cells() -> None:
    k, v = draw(1500, 3, 7, dtype=torch.float32), draw(1500, 3, 7, seed=1, dtype=torch.float32)
    short, long = build_pyramid(k[:1100], v[:1100]), build_pyramid(k, v)
    for few, many in zip(short, long, strict=True):
        assert torch.equal(few.key_sum, many.key_sum[: few.num_cells])
        assert torch.equal(few.value_sum, many.value_sum[: few.num_cells])


def test_what_was_not_given_is_not_there() -> None:
    pyramid = build_pyramid(draw(64, 1, 2))
    assert pyramid[0].value_sum is None and pyramid[0].plain_max is None
    with pytest.raises(AssertionError, match="without values"):
        tabulate(pyramid)
    with pytest.raises(AssertionError, match="before rotation"):
        _ = pyramid[0].plain_mean


def test_the_table_finds_cells_of_all_levels() -> None:
    k, v = draw(4200, 1, 2), draw(4200, 1, 2, seed=1)
    pyramid = build_pyramid(k, v)
    table = tabulate(pyramid)
    assert table.places([(0, 3), (1, 7), (2, 0)]) == [3, 65 + 7, 65 + 8]
    torch.testing.assert_close(table.key_mean[72], k[7 * 512 :][:512].mean(0))
    torch.testing.assert_close(table.value_mean[73], v[:4096].mean(0))
    torch.testing.assert_close(table.log_tokens[[3, 72, 73]].exp(), torch.tensor([64.0, 512, 4096]).double())
    bias = torch.tensor([[0.0, 1, 2], [0, -1, float("-inf")]])
    assert (table.bias(bias) - table.log_tokens)[:, [3, 72]].tolist() == [[0, 1], [0, -1]]
    assert table.bias(bias)[1, 73] == float("-inf") and table.bias(None).shape == (1, 74)


@pytest.mark.parametrize("num_tokens", [1, 64, 700, 5000])
def test_a_pyramid_of_blocks_summed_elsewhere_has_the_same_bits(num_tokens: int) -> None:
    k = draw(num_tokens, 2, 4, dtype=torch.bfloat16)
    cuts = [0, 64, 640, num_tokens] if num_tokens > 640 else [0, num_tokens]
    parts = [block_key_sums(k[start:stop]) for start, stop in itertools.pairwise(cuts)]
    found, expected = key_pyramid(torch.cat(parts), num_tokens), build_pyramid(k)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.num_tokens == theirs.num_tokens and torch.equal(ours.key_sum, theirs.key_sum)
