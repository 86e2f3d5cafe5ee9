"""Attention forwards and backwards: dseek's dynamic attention beside PyTorch's dense one, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peers.faster_dtype import faster_dtype
from benchmarks.peers.worker import Answer, Worker, serve
from dseek.core.attention_pattern import AttentionPattern
from dseek.ops import native
from dseek.ops.attention.dynamic_reference import dynamic_attention
from dseek.ops.attention.merged import merged_dynamic_attention
from dseek.ops.attention.native_dynamic import native_dynamic_attention
from dseek.ops.attention.selection import select

SETTLE_S = 0.1
"""Rest before a timed call, in which the other library's threads stop spinning."""

NAMES = ("output", "q", "k", "v")


class TrainingWorker(Worker):
    """Tensors are bfloat16, drawn from a normal distribution; q, k and v want gradients."""

    def setup(self, threads: int) -> Answer:
        """Limit the threads of both; says which native variant there is (None if there is none)."""
        torch.set_num_threads(threads)
        kernels = native.module()
        if kernels is not None:
            kernels.set_num_threads(threads)
        return {"variant": None if kernels is None else kernels.variant()}

    def train(self, num_tokens: int, num_heads: int, head_dim: int, pattern: dict[str, Any]) -> Answer:
        """One step of each: forward with selection, then backward.

        Args:
            num_tokens: T.
            num_heads: H, each with keys of its own.
            head_dim: width of a head.
            pattern: `window_tokens` and `top_blocks`.

        Returns:
            `own_forward_s`, `own_backward_s`, `torch_forward_s`, `torch_backward_s`, and `torch_dtype`, PyTorch's.
        """
        q, k, v, gradient = _draw(num_tokens, num_heads, num_heads, head_dim)
        wanted = _pattern(pattern)
        own = _step([q, k, v], gradient, lambda *leaves: merged_dynamic_attention(*leaves, wanted))
        # PyTorch gets the layout and the dtype that it is fastest with.
        dtype = faster_dtype()
        heads_first = [tensor.transpose(0, 1)[None].contiguous().to(dtype) for tensor in (q, k, v, gradient)]

        def dense(*leaves: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)

        theirs = _step(heads_first[:3], heads_first[3], dense)
        return {
            "own_forward_s": own[0],
            "own_backward_s": own[1],
            "torch_forward_s": theirs[0],
            "torch_backward_s": theirs[1],
            "torch_dtype": str(dtype),
        }

    def check(self, num_tokens: int, num_heads: int, num_groups: int, head_dim: int, pattern: dict[str, Any]) -> Answer:
        """Compare output and gradients with autograd through the materialised definition in float32.

        Args:
            num_tokens: T, small: the definition keeps a table of T x T scores a head.
            num_heads: H.
            num_groups: heads of keys and values.
            head_dim: width of a head.
            pattern: `window_tokens` and `top_blocks`.

        Returns:
            `difference`, the largest by name of output and gradient, as a share of the largest right value; `cosine`;
            `seen`, the share of the blocks before a query's own that it attends to.
        """
        q, k, v, gradient = _draw(num_tokens, num_heads, num_groups, head_dim)
        wanted = _pattern(pattern)
        done = native_dynamic_attention(q, k, v, wanted)
        selection = select(q, k, wanted) if done is None else done[1]
        found = _gradients([q, k, v], gradient, lambda *leaves: merged_dynamic_attention(*leaves, wanted))
        wide = [tensor.float() for tensor in (q, k, v)]
        right = _gradients(wide, gradient.float(), lambda *leaves: dynamic_attention(*leaves, selection))
        pairs = [(ours.float(), theirs) for ours, theirs in zip(found, right, strict=True)]
        num_seen = sum(len(choice.exact_blocks) for choices in selection.values() for choice in choices)
        return {
            "difference": {
                name: float((ours - theirs).abs().max() / theirs.abs().max())
                for name, (ours, theirs) in zip(NAMES, pairs, strict=True)
            },
            "cosine": {
                name: float(torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0))
                for name, (ours, theirs) in zip(NAMES, pairs, strict=True)
            },
            "seen": num_seen / max(1, num_groups * sum(selection)),
        }


def _draw(num_tokens: int, num_heads: int, num_groups: int, head_dim: int) -> list[torch.Tensor]:
    """Draw q [T, H, d], k and v [T, G, d], and the gradient of the output [T, H, d]."""
    generator = torch.Generator().manual_seed(num_tokens)
    heads = (num_heads, num_groups, num_groups, num_heads)
    return [torch.randn((num_tokens, number, head_dim), generator=generator).bfloat16() for number in heads]


def _pattern(fields: dict[str, Any]) -> AttentionPattern:
    return AttentionPattern(**{**fields, "kind": "dynamic", "window_tokens": (fields["window_tokens"],)})


def _step(
    inputs: list[torch.Tensor], gradient: torch.Tensor, operator: Callable[..., torch.Tensor]
) -> tuple[float, float]:
    """Seconds of one forward and of its backward."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    time.sleep(SETTLE_S)
    started = time.perf_counter()
    out = operator(*leaves)
    forward = time.perf_counter()
    out.backward(gradient)
    backward = time.perf_counter()
    for leaf in leaves:
        if leaf.grad is None or not leaf.grad.isfinite().all():
            raise RuntimeError("a gradient is missing or not finite")
    return forward - started, backward - forward


def _gradients(
    inputs: list[torch.Tensor], gradient: torch.Tensor, operator: Callable[..., torch.Tensor]
) -> list[torch.Tensor]:
    """Output, and gradients of the inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = operator(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


if __name__ == "__main__":
    serve(TrainingWorker())
