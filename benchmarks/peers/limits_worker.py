"""The machine's limits, measured beside the engines in the same run, so that a noisy moment hits both.

`gemm` and `read` give the rate of one measurement; `attention` times dseek's dense attention against PyTorch's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.peers.faster_dtype import faster_dtype
from benchmarks.peers.worker import Answer, Worker, serve

SQUARE = 2048
"""Side of the square products."""

BLOCK_TOKENS = 64

SETTLE_S = 0.1
"""Rest before a timed call, in which the other library's threads stop spinning."""


def seconds_a_call(call: Callable[[], object], at_least_s: float) -> float:
    """Mean time of a call over at least so many seconds, after one unmeasured call."""
    call()
    count, started = 0, time.perf_counter()
    while True:
        call()
        count += 1
        spent = time.perf_counter() - started
        if spent >= at_least_s:
            return spent / count


class LimitsWorker(Worker):
    """Measures with PyTorch and with dseek's own kernels; the limit is the faster of the two."""

    def setup(self, threads: int) -> Answer:
        """Limit the threads; says which native variant there is (None if there is none)."""
        from dseek.hardware import native

        torch.set_num_threads(threads)
        self.native: Any = native.load()
        if self.native is not None:
            self.native.set_num_threads(threads)
        return {"variant": None if self.native is None else self.native.variant()}

    def gemm(self, dtype: str, at_least_s: float = 0.3) -> Answer:
        """Operations a second of a square product in int8 or bf16; PyTorch widens bf16 where that is faster."""
        operations = 2.0 * SQUARE**3
        generator = torch.Generator().manual_seed(0)
        if dtype == "int8":
            a, b = (torch.randint(-127, 127, (SQUARE, SQUARE), dtype=torch.int8, generator=generator) for _ in range(2))
            rates = {"torch": operations / seconds_a_call(lambda: torch._int_mm(a, b), at_least_s)}
            own_format = "i8c"
        elif dtype == "bf16":
            x, y = (torch.randn(SQUARE, SQUARE, generator=generator).to(faster_dtype()) for _ in range(2))
            rates = {"torch": operations / seconds_a_call(lambda: x @ y, at_least_s)}
            own_format = "bf16"
        else:
            raise ValueError(f"no rate for {dtype}")
        if self.native is not None:
            seconds = self.native.time_linear(own_format, SQUARE, SQUARE, SQUARE, 5, False)
            rates["native"] = operations / seconds
        return {"operations_s": max(rates.values()), "by": rates}

    def read(self, num_bytes: int = 1 << 30, repeats: int = 3) -> Answer:
        """Bytes a second of reading memory, all threads."""
        if self.native is not None:
            return {"bytes_s": self.native.read_bandwidth(num_bytes, repeats) * 1e9}
        data = torch.ones(num_bytes // 4, dtype=torch.float32)
        return {"bytes_s": num_bytes / seconds_a_call(lambda: data.sum(), 0.3)}

    def attention(self, num_tokens: int, num_heads: int = 8, head_dim: int = 64) -> Answer:
        """One call each of dense causal attention, dseek's and PyTorch's, on the same bf16 arrays.

        Args:
            num_tokens: T.
            num_heads: H.
            head_dim: width of a head.

        Returns:
            `own_s`, `torch_s` in the dtype that is faster there, which is `torch_dtype`, `difference` (largest absolute
            difference) and `cosine` of the two results.
        """
        q, k, v = _random_heads(num_tokens, num_heads, head_dim)
        arrays = _views(q, k, v)
        time.sleep(SETTLE_S)
        started = time.perf_counter()
        own = self._kernels().dense_attention(*arrays)
        own_s = time.perf_counter() - started
        dtype = faster_dtype()
        expected, torch_s = _torch_attention(q, k, v, dtype)
        return {"own_s": own_s, "torch_s": torch_s, "torch_dtype": str(dtype), **_compare(own, expected)}

    def sparse_attention(
        self,
        num_tokens: int,
        near_blocks: int,
        top_blocks: int,
        with_torch: bool = True,
        num_heads: int = 8,
        head_dim: int = 64,
    ) -> Answer:
        """One call of dynamic attention, everything included, and one of PyTorch's dense attention.

        Args:
            num_tokens: T.
            near_blocks: window in blocks of 64.
            top_blocks: blocks selected.
            with_torch: whether PyTorch is timed too (dense attention of long sequences takes long).
            num_heads: H, each with keys of its own.
            head_dim: width of a head.

        Returns:
            `own_s`, `parts` (seconds of pyramid, selection and attention, summed over the threads), `skipped` (share of
            the causal block pairs that no query block looks at), `torch_s` (null without) in the faster dtype, which is
            `torch_dtype`, and the `difference` and `cosine` between the result and float32 attention over the same
            keys, for query blocks spread over the text.
        """
        q, k, v = _random_heads(num_tokens, num_heads, head_dim)
        pattern = {"near_blocks": [near_blocks] * num_heads, "top_blocks": top_blocks}
        arrays = _views(q, k, v)
        time.sleep(SETTLE_S)
        started = time.perf_counter()
        own = self._kernels().dynamic_attention(*arrays, **pattern)
        own_s = time.perf_counter() - started
        traced, selections, parts = self._kernels().dynamic_attention(*arrays, **pattern, trace=True)
        if not np.array_equal(own, traced):
            raise RuntimeError("two calls of dynamic attention differ")
        num_blocks = -(-num_tokens // BLOCK_TOKENS)
        looked_at = sum(len(exact) for head in selections for exact, _ in head)
        dtype = faster_dtype() if with_torch else None
        torch_s = None if dtype is None else _torch_attention(q, k, v, dtype)[1]
        return {
            "own_s": own_s,
            "torch_s": torch_s,
            "torch_dtype": str(dtype),
            "parts": parts,
            "skipped": 1.0 - looked_at / (num_heads * num_blocks * (num_blocks + 1) / 2),
            **_compare(*_spread_blocks(q[0], k[0], v[0], own, selections)),
        }

    def _kernels(self) -> Any:
        if self.native is None:
            raise RuntimeError("the native kernels are not built")
        return self.native


def _random_heads(num_tokens: int, num_heads: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """Draw q, k and v, bfloat16 [1, H, T, d]."""
    generator = torch.Generator().manual_seed(num_tokens)
    shape = (1, num_heads, num_tokens, head_dim)
    return tuple(torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(3))


def _views(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor[0].contiguous().view(torch.uint16).numpy() for tensor in tensors]


def _torch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, float]:
    """PyTorch's dense causal attention [H, T, d] in a dtype, and its seconds."""
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    time.sleep(SETTLE_S)
    started = time.perf_counter()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return expected[0], time.perf_counter() - started


def _compare(own: np.ndarray, expected: torch.Tensor) -> Answer:
    """Largest absolute difference and cosine of a bfloat16 result and what it should be."""
    result = torch.from_numpy(np.ascontiguousarray(own)).view(torch.bfloat16).float()
    wanted = expected.float()
    return {
        "difference": float((result - wanted).abs().max()),
        "cosine": float(torch.nn.functional.cosine_similarity(result.flatten(), wanted.flatten(), dim=0)),
    }


def _spread_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own: np.ndarray, selections: list[Any]
) -> tuple[np.ndarray, torch.Tensor]:
    """Rows of some query blocks, computed and as they should be: float32 softmax over the selected blocks."""
    num_blocks = len(selections[0])
    found, wanted = [], []
    for block in sorted({num_blocks * step // 8 for step in range(1, 9)} - {num_blocks} | {0, num_blocks - 1}):
        rows = torch.arange(block * BLOCK_TOKENS, min((block + 1) * BLOCK_TOKENS, q.shape[1]))
        for head, choices in enumerate(selections):
            keys = torch.cat(
                [torch.arange(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS) for index in choices[block][0]]
            )
            keys = keys[keys < q.shape[1]]
            scores = q[head, rows].float() @ k[head, keys].float().T / q.shape[2] ** 0.5
            weights = scores.masked_fill(keys[None] > rows[:, None], float("-inf")).softmax(dim=-1)
            found.append(own[head, rows.numpy()])
            wanted.append(weights @ v[head, keys].float())
    return np.concatenate(found), torch.cat(wanted)


if __name__ == "__main__":
    serve(LimitsWorker())
