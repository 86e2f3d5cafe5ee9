"""Attention over listed blocks: right against the dense reference, blind to what is not listed, and mergeable."""

from __future__ import annotations

import functools

import pytest
import torch

from dseek.ops.attention import partial_gathered
from dseek.ops.attention.partial import attend_blocks
from dseek.ops.attention.partial_gathered import attend_gathered_blocks
from dseek.ops.attention.reference import causal_attention
from dseek.parallel.block_lists import BlockLists, dense_lists, listed, window_lists
from dseek.parallel.context_parallel import Attend
from dseek.parallel.merge import merge_partials

OPERATORS = pytest.mark.parametrize("attend", [attend_blocks, attend_gathered_blocks], ids=["plain", "gathered"])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def _inputs(length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = ((length, 4, 16), (length, 2, 16), (length, 2, 16))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


@OPERATORS
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 256])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_all_blocks_are_dense_attention(attend: Attend, length: int, dtype: torch.dtype) -> None:
    q, k, v = _inputs(length, dtype)
    every = torch.arange(-(-length // 64))
    lists = dense_lists(every.tolist())
    out, lse = attend(q, k, v, every, every, lists.starts, lists.blocks)
    expected = causal_attention(q.double(), k.double(), v.double())
    assert (out - expected).abs().max() <= TOLERANCE[dtype]
    assert lse[0] == pytest.approx((q[0].view(2, 2, 16) * k[0][:, None]).sum(-1).flatten().double() / 4, abs=2e-2)


@OPERATORS
def test_what_is_not_listed_is_not_read(attend: Attend) -> None:
    q, k, v = _inputs(300, torch.float64)
    every = torch.arange(5)
    lists = window_lists([4], 1, sink=True)
    k[64:192], v[64:192] = float("nan"), float("nan")
    out, lse = attend(q[256:], k, v, torch.tensor([4]), every, lists.starts, lists.blocks)
    kept = torch.cat([torch.arange(64), torch.arange(192, 300)])
    expected = causal_attention(q[256:], k[kept], v[kept])
    assert (out - expected).abs().max() <= 1e-12
    assert lse.isfinite().all()


@OPERATORS
def test_groups_have_lists_of_their_own(attend: Attend) -> None:
    q, k, v = _inputs(192, torch.float64)
    lists = BlockLists(starts=torch.tensor([0, 2, 3]), blocks=torch.tensor([0, 2, 2]))
    out, _ = attend(q[128:], k, v, torch.tensor([2]), torch.arange(3), lists.starts, lists.blocks)
    kept = torch.cat([torch.arange(64), torch.arange(128, 192)])
    first = causal_attention(q[128:, :2], k[kept, :1], v[kept, :1])
    second = causal_attention(q[128:, 2:], k[128:, 1:], v[128:, 1:])
    assert (out - torch.cat([first, second], dim=1)).abs().max() <= 1e-12


@OPERATORS
def test_parts_merge_to_the_whole_and_an_empty_part_changes_nothing(attend: Attend) -> None:
    q, k, v = _inputs(256, torch.float64)
    every = torch.arange(4)
    lists = dense_lists(range(4))
    even, odd = (lists.only(every[start::2].contiguous()) for start in (0, 1))
    parts = []
    for start, part in ((0, even), (1, odd)):
        rows = torch.cat([torch.arange(block * 64, block * 64 + 64) for block in every[start::2].tolist()])
        parts.append(attend(q, k[rows], v[rows], every, every[start::2], part.starts, part.blocks))
    (out_even, lse_even), (out_odd, lse_odd) = parts
    assert (lse_odd[:64] == float("-inf")).all()
    assert (out_odd[:64] == 0).all()
    out, lse = merge_partials(out_even, lse_even, out_odd, lse_odd)
    expected, expected_lse = attend(q, k, v, every, every, lists.starts, lists.blocks)
    assert (out - expected).abs().max() <= 1e-12
    assert (lse - expected_lse).abs().max() <= 1e-12
    empty = torch.full_like(lse, float("-inf"))
    nothing, nothing_lse = merge_partials(torch.zeros_like(out), empty, torch.zeros_like(out), empty)
    assert (nothing == 0).all()
    assert torch.equal(nothing_lse, empty)
    again, again_lse = merge_partials(out, lse, torch.ones_like(out), empty)
    assert torch.equal(again, out)
    assert torch.equal(again_lse, lse)


def test_scores_of_any_size_merge_without_overflow() -> None:
    out, more = torch.tensor([[[1.0]]]), torch.tensor([[[3.0]]])
    merged, lse = merge_partials(out, torch.tensor([[2000.0]]), more, torch.tensor([[2000.0]]))
    assert merged.item() == 2.0
    assert lse.item() == pytest.approx(2000.0 + 0.6931472)
    merged, _ = merge_partials(out, torch.tensor([[-2000.0]]), more, torch.tensor([[0.0]]))
    assert merged.item() == 3.0


@OPERATORS
def test_no_queries_is_no_output(attend: Attend) -> None:
    q, k, v = _inputs(64, torch.float32)
    none = torch.zeros(0, dtype=torch.int64)
    out, lse = attend(q[:0], k, v, none, torch.arange(1), torch.zeros(1, dtype=torch.int64), none)
    assert out.shape == (0, 4, 16)
    assert lse.shape == (0, 4)


@pytest.mark.parametrize("heads", [2, 6])
def test_both_operators_agree_on_lists_of_any_length(monkeypatch: pytest.MonkeyPatch, heads: int) -> None:
    generator = torch.Generator().manual_seed(heads)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    q, k, v = draw(330, heads, 16), draw(330, 2, 16), draw(330, 2, 16)
    every = torch.arange(6)
    lists = listed([(0,), (), (0, 1), (1,), (2,), (0, 2), (0, 1, 3), (1, 2), (), (0, 4), (5,), (0, 1, 2, 3, 4, 5)])
    expected = attend_blocks(q, k, v, every, every, lists.starts, lists.blocks)
    for most in (1, partial_gathered.MAX_GATHERED_KEYS):
        monkeypatch.setattr(partial_gathered, "MAX_GATHERED_KEYS", most)
        found = attend_gathered_blocks(q, k, v, every, every, lists.starts, lists.blocks)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
