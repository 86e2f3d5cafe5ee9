"""The merged backward against autograd through the reference, in every dtype, and its edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from dseek.core.attention_pattern import AttentionPattern, PatternKind
from dseek.ops.attention import merged
from dseek.ops.attention.dynamic_reference import dynamic_attention
from dseek.ops.attention.merged import merged_dynamic_attention
from dseek.ops.attention.native_dynamic import native_dynamic_attention
from dseek.ops.attention.selection import BlockChoice, Selection, select

NARROW = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=2, far=True)
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(num_tokens: int, heads: int = 4, groups: int = 2, size: int = 16) -> list[torch.Tensor]:
    shapes = [(num_tokens, heads, size), (num_tokens, groups, size), (num_tokens, groups, size), (heads, 3)]
    return [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def run(
    operator: Callable[..., torch.Tensor], inputs: list[torch.Tensor], selection: Selection, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Output, and gradients of q, k, v and the bias."""
    q, k, v, bias = leaves = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in inputs]
    out = operator(q, k, v, selection, level_bias_HL=bias)
    (out * draw(*out.shape, seed=9).to(dtype)).sum().backward()
    return [out.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> None:
    for name, ours, theirs in zip(("out", "dq", "dk", "dv", "dbias"), found, expected, strict=True):
        assert ours.dtype == dtype and ours.isfinite().all(), name
        error = (ours.double() - theirs.double()).abs().max() / theirs.abs().max().clamp(min=1)
        assert error <= TOLERANCES[dtype], (name, error.item())


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 200, 700, 1100])
def test_output_and_gradients_are_autograds(num_tokens: int, dtype: torch.dtype, poisoned_memory: None) -> None:
    inputs = [tensor.to(dtype) for tensor in drawn(num_tokens)]
    selection = select(inputs[0], inputs[1], NARROW, windows=(64, 128))
    expected = run(dynamic_attention, [tensor.double() for tensor in inputs], selection, torch.float64)
    assert_near(run(merged_dynamic_attention, inputs, selection, dtype), expected, dtype)


@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (3, 1), (6, 2)])
@pytest.mark.parametrize("kind", ["dense", "window", "dynamic"])
def test_every_kind_and_grouping(kind: PatternKind, heads: int, groups: int) -> None:
    inputs = drawn(500, heads, groups)
    patterns = {
        "dense": AttentionPattern(),
        "window": AttentionPattern(kind="window", window_tokens=(64,)),
        "dynamic": AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=1, far=True),
    }
    selection = select(inputs[0], inputs[1], patterns[kind])
    expected = run(dynamic_attention, inputs, selection, torch.float64)
    assert_near(run(merged_dynamic_attention, inputs, selection, torch.float64), expected, torch.float64)


def test_gathering_in_several_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = drawn(900)
    selection = select(inputs[0], inputs[1], NARROW)
    expected = run(merged_dynamic_attention, inputs, selection, torch.float64)
    monkeypatch.setattr(merged, "SCORES_PER_THREAD", 10_000)
    assert_near(run(merged_dynamic_attention, inputs, selection, torch.float64), expected, torch.float64)


def test_gradcheck() -> None:
    inputs = [tensor.requires_grad_() for tensor in drawn(200, 2, 1, 2)]
    selection = {
        0: (BlockChoice(exact_blocks=()),),
        1: (BlockChoice(exact_blocks=(), far_cells=((0, 0),)),),
        2: (BlockChoice(exact_blocks=(1,), far_cells=((0, 0),)),),
        3: (BlockChoice(exact_blocks=(0, 2), far_cells=((0, 1),)),),
    }

    def operator(*tensors: torch.Tensor) -> torch.Tensor:
        return merged_dynamic_attention(*tensors[:3], selection, level_bias_HL=tensors[3])

    assert torch.autograd.gradcheck(operator, inputs, atol=1e-8, fast_mode=True)


def test_query_blocks_without_any_earlier_key() -> None:
    inputs = drawn(300, 2, 1)
    none = {block: (BlockChoice(exact_blocks=()),) for block in range(5)}
    expected = run(dynamic_attention, inputs, none, torch.float64)
    assert_near(run(merged_dynamic_attention, inputs, none, torch.float64), expected, torch.float64)


def test_far_cells_that_a_bias_leaves_out() -> None:
    inputs = drawn(700)
    inputs[3][1] = -math.inf
    selection = select(inputs[0], inputs[1], NARROW)
    expected = run(dynamic_attention, inputs, selection, torch.float64)
    assert_near(run(merged_dynamic_attention, inputs, selection, torch.float64), expected, torch.float64)
    assert (expected[4][1] == 0).all()


def test_the_same_bits_every_time() -> None:
    inputs = [tensor.float() for tensor in drawn(1500)]
    selection = select(inputs[0], inputs[1], NARROW)
    one, other = (run(merged_dynamic_attention, inputs, selection, torch.float32) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_a_pattern_is_enough() -> None:
    q, k, v, _ = drawn(400)
    torch.testing.assert_close(merged_dynamic_attention(q, k, v, NARROW), dynamic_attention(q, k, v, NARROW))


KERNEL_PATTERNS = [
    AttentionPattern(kind="window", window_tokens=(64,)),
    AttentionPattern(kind="dynamic", window_tokens=(64, 128), top_blocks=2),
    NARROW,
]


@pytest.mark.native
@pytest.mark.parametrize("pattern", KERNEL_PATTERNS, ids=["window", "blocks", "far"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [40, 700, 1111])
def test_backward_follows_the_kernels_selection(num_tokens: int, dtype: torch.dtype, pattern: AttentionPattern) -> None:
    inputs = [tensor.to(dtype) for tensor in drawn(num_tokens)]
    done = native_dynamic_attention(*inputs[:3], pattern, level_bias_HL=inputs[3])
    assert done is not None
    q, k, v, bias = inputs
    assert torch.equal(merged_dynamic_attention(q, k, v, pattern, level_bias_HL=bias), done[0])
    expected = run(dynamic_attention, [tensor.double() for tensor in inputs], done[1], torch.float64)

    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out = merged_dynamic_attention(*leaves[:3], pattern, level_bias_HL=leaves[3])
    assert torch.equal(out, done[0])
    (out * draw(*out.shape, seed=9).to(dtype)).sum().backward()
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    # The kernel rounds weights to bfloat16 on the way to the sum of values, backward does not.
    assert_near([out.detach(), *gradients], expected, dtype)


@pytest.mark.native
@pytest.mark.parametrize("pattern", KERNEL_PATTERNS, ids=["window", "blocks", "far"])
def test_the_kernel_selects_as_the_definition_does(pattern: AttentionPattern) -> None:
    q, k, v, _ = (tensor.float() for tensor in drawn(1111))
    done = native_dynamic_attention(q, k, v, pattern)
    assert done is not None
    wanted = select(q, k, pattern)
    for block, choices in done[1].items():
        for found, right in zip(choices, wanted[block], strict=True):
            assert (found.exact_blocks, found.far_cells) == (right.exact_blocks, right.far_cells), block


@pytest.mark.parametrize(
    ("dtype", "size", "pattern"),
    [
        (torch.float64, 16, NARROW),
        (torch.float16, 16, NARROW),
        (torch.float32, 8, NARROW),
        (torch.float32, 16, AttentionPattern()),
    ],
    ids=["float64", "float16", "width", "dense"],
)
def test_what_the_kernel_does_not_compute(dtype: torch.dtype, size: int, pattern: AttentionPattern) -> None:
    q, k, v, _ = (tensor.to(dtype) for tensor in drawn(200, size=size))
    assert native_dynamic_attention(q, k, v, pattern) is None
    expected = dynamic_attention(q, k, v, pattern)
    torch.testing.assert_close(merged_dynamic_attention(q, k, v, pattern), expected)
