"""The dynamic attention reference against its definition, row by row, and against dense attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from dseek.core.attention_pattern import AttentionPattern
from dseek.ops.attention.dynamic_reference import dynamic_attention, dynamic_attention_blocked
from dseek.ops.attention.reference import causal_attention
from dseek.ops.attention.selection import BlockChoice, Selection, choose, select

Attention = Callable[..., torch.Tensor]
NARROW = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=1, far=True)


@pytest.fixture(params=[dynamic_attention, dynamic_attention_blocked], ids=["materialised", "blocked"])
def attention(request: pytest.FixtureRequest) -> Attention:
    return request.param


def draw(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def drawn(
    num_tokens: int, heads: int, groups: int, size: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = draw(num_tokens, heads, size, dtype=dtype)
    return q, draw(num_tokens, groups, size, seed=1, dtype=dtype), draw(num_tokens, groups, size, seed=2, dtype=dtype)


def by_definition(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selection: Selection, bias: torch.Tensor, position: int
) -> torch.Tensor:
    """One row, term by term."""
    out = torch.empty_like(q[position])
    heads = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        group = head // heads
        choice = selection[position // 64][group]
        total, weighted = 0.0, torch.zeros_like(out[head])
        tokens = [token for token in range(position + 1) if token // 64 in (*choice.exact_blocks, position // 64)]
        terms = [(k[token, group], v[token, group], 0.0) for token in tokens]
        for level, index in choice.far_cells:
            count = 64 * 8**level
            cell = slice(index * count, (index + 1) * count)
            shift = math.log(count) + bias[head, level].item()
            terms.append((k[cell, group].mean(0), v[cell, group].mean(0), shift))
        for key, value, shift in terms:
            weight = math.exp((q[position, head] @ key).item() / math.sqrt(q.shape[2]) + shift)
            total += weight
            weighted = weighted + weight * value
        out[head] = weighted / total
    return out


@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (3, 1)])
def test_rows_are_those_of_the_definition(attention: Attention, heads: int, groups: int, poisoned_memory: None) -> None:
    q, k, v = drawn(700, heads, groups, 16)
    bias = draw(heads, 3, seed=3)
    windows = (64, 128)[:groups]
    selection = select(q, k, NARROW, windows=windows)
    out = attention(q, k, v, selection, level_bias_HL=bias)
    assert any(choice.far_cells for choices in selection.values() for choice in choices)
    for position in (0, 1, 63, 64, 200, 447, 448, 640, 699):
        expected = by_definition(q, k, v, selection, bias, position)
        torch.testing.assert_close(out[position], expected, rtol=0, atol=1e-13)


def test_cells_of_every_level_count(attention: Attention) -> None:
    q, k, v = drawn(9000, 1, 1, 8)
    pattern = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=0, far=True)
    selection = {140: (choose(pattern, 140, 0, lambda *_: []),)}
    assert {level for level, _ in selection[140][0].far_cells} == {0, 1, 2}
    out = attention(q[8960:], k, v, selection)
    for position in (8960, 8999):
        expected = by_definition(q, k, v, selection, torch.zeros(1, 3), position)
        torch.testing.assert_close(out[position - 8960], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 130, 1000])
def test_an_unlimited_budget_is_dense_attention(attention: Attention, num_tokens: int) -> None:
    q, k, v = drawn(num_tokens, 4, 2, 16)
    expected = causal_attention(q, k, v)
    unlimited = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=16, far=True)
    for pattern in (unlimited, AttentionPattern(kind="dense")):
        torch.testing.assert_close(attention(q, k, v, pattern), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("top_blocks", [0, 1, 3])
def test_without_preference_every_budget_gives_the_mean_of_the_past(attention: Attention, top_blocks: int) -> None:
    # Scores of zero: a cell weighs as many tokens as it has, so the result is right only if each is counted once.
    _, k, v = drawn(5000, 1, 1, 4)
    pattern = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=top_blocks, far=True)
    start = 4400
    q = torch.zeros(600, 1, 4, dtype=torch.float64)
    selection = {
        block: (choose(pattern, block, 0, lambda *asked: draw(len(asked[3]), seed=asked[2]).tolist()),)
        for block in range(start // 64, 79)
    }
    means = v.cumsum(0) / torch.arange(1, 5001)[:, None, None]
    out = attention(q, k, v, selection, start=start)
    torch.testing.assert_close(out, means[start:], rtol=0, atol=1e-13)


def test_cells_of_equal_keys_and_values_stand_for_their_tokens_exactly(attention: Attention) -> None:
    q = draw(1500, 2, 8)
    k, v = (draw(3, 1, 8, seed=seed).repeat_interleave(512, dim=0)[:1500] for seed in (1, 2))
    out = attention(q, k, v, AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=0, far=True))
    # Two sums of up to 1500 terms of about 1, in different orders: each may be off by 1500 half units.
    bound = 1500 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(out, causal_attention(q, k, v), rtol=0, atol=bound)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_narrow_types_compute_in_float32(attention: Attention, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = drawn(700, 4, 2, 32, dtype)
    selection = select(q, k, NARROW)
    out = attention(q, k, v, selection)
    assert out.dtype == dtype
    exact = dynamic_attention(q.double(), k.double(), v.double(), selection)
    assert (out.double() - exact).abs().max() <= tolerance


def test_gathering_changes_nothing() -> None:
    q, k, v = drawn(1500, 6, 2, 16)
    selection, bias = select(q, k, NARROW, windows=(64, 256)), draw(6, 3, seed=5)
    one = dynamic_attention(q, k, v, selection, level_bias_HL=bias)
    other = dynamic_attention_blocked(q, k, v, selection, level_bias_HL=bias)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_levels_can_be_switched_off_for_a_head(attention: Attention) -> None:
    q, k, v = drawn(700, 2, 1, 8)
    selection = select(q, k, NARROW)
    off = torch.zeros(2, 3)
    off[1] = float("-inf")
    out = attention(q, k, v, selection, level_bias_HL=off)
    near = {
        block: tuple(BlockChoice(exact_blocks=choice.exact_blocks) for choice in choices)
        for block, choices in selection.items()
    }
    torch.testing.assert_close(out[:, 0], attention(q, k, v, selection)[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(out[:, 1], attention(q, k, v, near)[:, 1], rtol=0, atol=1e-15)
    pattern = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=1, far=False)
    torch.testing.assert_close(attention(q, k, v, pattern), attention(q, k, v, near), rtol=0, atol=0)


@pytest.mark.parametrize("cut", [0, 63, 64, 300, 511, 512, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_keep_their_bits_whatever_follows(attention: Attention, cut: int, dtype: torch.dtype) -> None:
    inputs = drawn(900, 4, 2, 8, dtype)
    changed = [tensor.clone() for tensor in inputs]
    for seed, tensor in enumerate(changed, start=7):
        tensor[cut + 1 :] = 5 * draw(*tensor[cut + 1 :].shape, seed=seed, dtype=dtype)
    ours, theirs = attention(*inputs, NARROW), attention(*changed, NARROW)
    assert torch.equal(ours[: cut + 1], theirs[: cut + 1])
    assert not torch.equal(ours[cut + 1], theirs[cut + 1])


@pytest.mark.parametrize(
    "chunks", [[1] * 330, [330], [64] * 5 + [10], [1, 62, 1, 1, 130, 135], [263, 1, 1, 65]], ids=len
)
def test_decode_equals_prefill_under_any_chunking(attention: Attention, chunks: list[int]) -> None:
    q, k, v = drawn(330, 4, 2, 8)
    whole = attention(q, k, v, NARROW)
    kept: dict[int, tuple[BlockChoice, ...]] = {}
    done, outs = 0, []
    for chunk in chunks:
        past = done + chunk
        kept |= select(q[done:past], k[:past], NARROW, kept=kept)
        outs.append(attention(q[done:past], k[:past], v[:past], kept))
        done = past
    assert kept == select(q, k, NARROW)
    torch.testing.assert_close(torch.cat(outs), whole, rtol=0, atol=1e-13)


def test_a_rollback_leaves_no_trace(attention: Attention) -> None:
    q, k, v = drawn(500, 2, 1, 8)
    wrong_q, wrong_k = q.clone(), k.clone()
    wrong_q[300:], wrong_k[300:] = 4 * draw(200, 2, 8, seed=8), 4 * draw(200, 1, 8, seed=9)
    kept = {block: choices for block, choices in select(wrong_q, wrong_k, NARROW).items() if block * 64 < 300}
    again = {**kept, **select(q[300:], k, NARROW, kept=kept)}
    torch.testing.assert_close(attention(q[300:], k, v, again), attention(q, k, v, NARROW)[300:], rtol=0, atol=1e-13)


def test_gradients_with_the_selection_fixed(attention: Attention) -> None:
    q, k, v = drawn(330, 2, 1, 2)
    inputs = [q[310:], k, v, draw(2, 3, seed=3)]
    selection = {
        4: (BlockChoice(exact_blocks=(0, 3), far_cells=((0, 1), (0, 2))),),
        5: (BlockChoice(exact_blocks=(0, 2, 4), far_cells=((0, 1), (0, 3))),),
    }

    def operator(*tensors: torch.Tensor) -> torch.Tensor:
        return attention(*tensors[:3], selection, level_bias_HL=tensors[3])

    assert torch.autograd.gradcheck(operator, [tensor.requires_grad_() for tensor in inputs], atol=1e-8, fast_mode=True)


def exact_mass(q: torch.Tensor, k: torch.Tensor, pattern: AttentionPattern) -> float:
    """Share of the dense attention that lies on tokens attended exactly, mean over queries."""
    later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    weights = (q[:, 0] @ k[:, 0].T / math.sqrt(q.shape[2])).masked_fill(later, float("-inf"))
    weights = weights.softmax(-1).unflatten(1, (-1, 64)).sum(-1)
    return sum(
        weights[block * 64 : (block + 1) * 64, [*choices[0].exact_blocks, block]].sum().item()
        for block, choices in select(q, k, pattern).items()
    ) / len(q)


def test_recall_of_the_true_mass_grows_with_the_budget() -> None:
    topics = 3 * draw(12, 1, 16, seed=4)
    blocks = torch.arange(64)
    k = draw(4096, 1, 16) + topics[blocks * 7 % 12].repeat_interleave(64, dim=0)
    q = draw(4096, 1, 16, seed=1) + topics[blocks * 5 % 12].repeat_interleave(64, dim=0)
    recall = [
        exact_mass(q, k, AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=top_blocks, far=True))
        for top_blocks in (0, 1, 2, 4, 8, 16, 64)
    ]
    assert recall == sorted(recall)
    assert recall[0] < 0.4 and recall[3] > 0.7
    assert recall[-1] == pytest.approx(1, abs=1e-12)


def test_sixteen_thousand_tokens_need_no_square_table() -> None:
    q, k, v = drawn(16384, 2, 1, 16, torch.float32)
    pattern = AttentionPattern(kind="dynamic", window_tokens=(256,), top_blocks=4, far=True)
    selection = select(q, k, pattern)
    out = dynamic_attention_blocked(q, k, v, selection)
    assert out.isfinite().all()
    tail = slice(16384 - 70, 16384)
    expected = dynamic_attention(q[tail].double(), k.double(), v.double(), selection)
    assert (out[tail].double() - expected).abs().max() <= 2e-6
