"""Selection by rows: the definition's properties, and every kernel variant against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dseek.core.attention_pattern import AttentionPattern, row_top_level
from dseek.core.errors import ConfigError
from dseek.ops import native
from dseek.ops.attention.pyramid import build_pyramid
from dseek.ops.attention.reference import causal_attention
from dseek.ops.attention.row_selection import MeanKeyRowScorer, attend_to_blocks, select_rows

VARIANTS = native.module().variants() if native.module() is not None else []


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def drawn(num_tokens: int, heads: int = 4, groups: int = 2, size: int = 16) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values; blocks have a direction of their own, so that some are worth opening."""
    topics = 1.5 * draw(num_tokens // 64 + 1, groups, size, seed=3).repeat_interleave(64, dim=0)[:num_tokens]
    return (
        2 * draw(num_tokens, heads, size),
        topics + draw(num_tokens, groups, size, seed=1),
        draw(num_tokens, groups, size, seed=2),
    )


def test_a_row_opens_what_its_heads_put_the_share_on() -> None:
    q, k, _ = drawn(1000)
    chosen = select_rows(q, k, near_blocks=(1, 2), min_share=0.06, top_blocks=64)
    means = k[: 15 * 64].unflatten(0, (15, 64)).mean(1)
    for row in (640, 655, 700, 703, 999):
        for group, near in ((0, 1), (1, 2)):
            block, strip = row // 64, row // 16 * 16
            opened = set()
            for earlier in range(strip, row + 1):
                scores = q[earlier, 2 * group : 2 * group + 2] @ means[:block, group].T / math.sqrt(16)
                opened |= set((scores.softmax(-1).amax(0) >= 0.06).nonzero()[:, 0].tolist())
            expected = opened | {0} | set(range(block - near, block + 1))
            assert set(chosen[group, row].nonzero()[:, 0].tolist()) == expected


def test_shares_bound_what_a_row_opens_and_the_budget_what_a_strip_does() -> None:
    q, k, _ = drawn(1500)
    free = select_rows(q, k, near_blocks=(1, 1), min_share=0.1, top_blocks=64)
    opened = free.sum(-1) - 3  # the own block, the one before it and the first
    assert opened[:, ::16].max() <= 2 * 10  # first rows of strips: ten shares of a tenth for each of two heads
    assert opened.max() > opened[:, ::16].max()
    bounded = select_rows(q, k, near_blocks=(1, 1), min_share=0.1, top_blocks=2)
    assert (bounded.sum(-1) - 3).max() == 2


def test_a_tiny_share_is_dense_attention() -> None:
    q, k, v = drawn(700)
    chosen = select_rows(q, k, near_blocks=(1, 1), min_share=1e-9, top_blocks=64)
    torch.testing.assert_close(attend_to_blocks(q, k, v, chosen), causal_attention(q, k, v), rtol=0, atol=2e-6)


@pytest.mark.parametrize("cut", [500, 511, 512, 527, 650])
def test_selections_do_not_depend_on_later_tokens(cut: int) -> None:
    q, k, _ = drawn(900)
    changed_q, changed_k = q.clone(), k.clone()
    changed_q[cut + 1 :], changed_k[cut + 1 :] = 5 * draw(899 - cut, 4, 16, seed=8), 5 * draw(899 - cut, 2, 16, seed=9)
    ours, theirs = (
        select_rows(*both, near_blocks=(1, 1), min_share=0.06, top_blocks=5)
        for both in ((q, k), (changed_q, changed_k))
    )
    assert torch.equal(ours[:, : cut + 1], theirs[:, : cut + 1])
    assert not torch.equal(ours, theirs)


def test_a_descent_finds_a_needle() -> None:
    num_tokens = 64 * 300
    q, k, _ = drawn(num_tokens, 1, 1, 16)
    needle = 5 * draw(16, seed=6)
    k[64 * 77 : 64 * 78, 0] += needle
    q[-20:, 0] = needle
    assert row_top_level(num_tokens // 64 - 1) == 1
    chosen = select_rows(q, k, near_blocks=(1,), min_share=0.2, top_blocks=8, start=num_tokens - 32)
    assert chosen[0, -20:, 77].all()
    assert chosen[0, -20:].sum(-1).max() <= 11


def test_scores_of_the_scorer_are_log_masses() -> None:
    q, k, _ = drawn(8 * 64)
    k[:64] = k[0]  # a cell of equal keys: its mean says all
    scorer = MeanKeyRowScorer(q, build_pyramid(k))
    exact = (q[500, :2] @ k[:64, 0].T / 4).logsumexp(-1) - math.log(64)
    torch.testing.assert_close(scorer.cells(500, 0, 0, [0])[:, 0], exact)
    assert torch.isneginf(scorer.own_block(500, 0)).all()


@pytest.mark.native
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [64, 96, 128])
@pytest.mark.parametrize(
    ("num_tokens", "near", "share", "most"),
    [
        (1500, (1, 4), 0.02, 32),
        (700, (1, 2), 0.1, 3),
        (333, (4, 4), 0.01, 64),
        (64, (1, 1), 0.1, 4),
        (5, (1, 1), 0.1, 4),
    ],
)
def test_kernels_select_and_attend_as_the_reference(
    variant: str, size: int, num_tokens: int, near: tuple[int, int], share: float, most: int
) -> None:
    q, k, v = drawn(num_tokens, 6, 2, size)
    chosen = select_rows(q, k, near_blocks=near, min_share=share, top_blocks=most)
    expected = attend_to_blocks(q, k, v, chosen)
    found, selections = run(variant, q, k, v, near, share, most)
    assert torch.equal(selections, chosen)
    np.testing.assert_allclose(found.transpose(1, 0, 2), expected.numpy(), atol=2e-5)


@pytest.mark.native
@pytest.mark.parametrize("variant", VARIANTS[-1:])
def test_kernels_descend_as_the_reference(variant: str) -> None:
    num_tokens = 64 * 290 + 20
    q, k, v = drawn(num_tokens, 2, 1, 32)
    start = num_tokens - 20 - 64
    chosen = select_rows(q, k, near_blocks=(1,), min_share=0.02, top_blocks=12, start=start)
    _, selections = run(variant, q, k, v, (1,), 0.02, 12)
    assert chosen[0, start:].sum(-1).max() > 8
    assert torch.equal(selections[:, start:], chosen[:, start:])


@pytest.mark.native
@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_selects_nearly_the_same(variant: str) -> None:
    q, k, v = (x.bfloat16() for x in drawn(1500, 6, 2, 64))
    wide = [x.float() for x in (q, k, v)]
    chosen = select_rows(wide[0], wide[1], near_blocks=(1, 2), min_share=0.03, top_blocks=32)
    found, selections = run(variant, q, k, v, (1, 2), 0.03, 32)
    assert (selections != chosen).sum() <= 0.01 * chosen.sum()
    expected = attend_to_blocks(*wide, selections)
    np.testing.assert_allclose(found.transpose(1, 0, 2), expected.numpy(), atol=2e-2)


def run(
    variant: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, near: tuple[int, ...], share: float, most: int
) -> tuple[np.ndarray, torch.Tensor]:
    """Output [H, T, d] in float32 and selections [G, T, B] of one kernel variant."""
    compiled = native.require()
    before = compiled.variant()
    compiled.set_variant(variant)
    arrays = [x.transpose(0, 1).contiguous() for x in (q, k, v)]
    try:
        out, strips, _ = compiled.dynamic_attention(
            *(x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy() for x in arrays),
            near_blocks=list(near),
            top_blocks=most,
            min_share=share,
            trace=True,
        )
    finally:
        compiled.set_variant(before)
    selections = torch.zeros(len(near), -(-len(q) // 16) * 16, -(-len(q) // 64), dtype=torch.bool)
    for group, choices in enumerate(strips):
        for strip, (blocks, first_rows) in enumerate(choices[: -(-len(q) // 16)]):
            for block, row in zip(blocks, first_rows, strict=True):
                selections[group, 16 * strip + row : 16 * strip + 16, block] = True
    if q.dtype == torch.bfloat16:
        out = torch.from_numpy(out.view(np.uint16)).view(torch.bfloat16).float().numpy()
    return out, selections[:, : len(q)]


@pytest.mark.parametrize(
    "fields",
    [
        {"min_share": 1.0},
        {"min_share": -0.1},
        {"min_share": 0.1, "far": True},
        {"min_share": 0.1, "top_blocks": 0},
        {"min_share": 0.1, "kind": "window", "top_blocks": 0},
    ],
    ids=["one", "below", "far", "no-blocks", "window"],
)
def test_patterns_refuse_other_shares(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="least share"):
        AttentionPattern(**{"kind": "dynamic", "window_tokens": (64,), "top_blocks": 4} | fields)  # type: ignore[arg-type]
