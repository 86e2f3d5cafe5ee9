"""The machine's limits, measured beside the engines in the same run, so that a noisy moment hits both.

`gemm` and `read` give the rate of one measurement; `attention` times dseek's dense attention against PyTorch's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.peers.worker import Answer, Worker, serve

SQUARE = 2048
"""Side of the square products."""

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
        """Operations a second of a square product in int8 or bf16."""
        operations = 2.0 * SQUARE**3
        generator = torch.Generator().manual_seed(0)
        if dtype == "int8":
            a, b = (torch.randint(-127, 127, (SQUARE, SQUARE), dtype=torch.int8, generator=generator) for _ in range(2))
            rates = {"torch": operations / seconds_a_call(lambda: torch._int_mm(a, b), at_least_s)}
            own_format = "i8c"
        elif dtype == "bf16":
            x, y = (torch.randn(SQUARE, SQUARE, generator=generator).to(torch.bfloat16) for _ in range(2))
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
            `own_s`, `torch_s`, `difference` (largest absolute difference) and `cosine` of the two results.
        """
        if self.native is None:
            raise RuntimeError("the native kernels are not built")
        generator = torch.Generator().manual_seed(num_tokens)
        q, k, v = (
            torch.randn(1, num_heads, num_tokens, head_dim, generator=generator).to(torch.bfloat16) for _ in range(3)
        )
        arrays = [tensor[0].contiguous().view(torch.uint16).numpy() for tensor in (q, k, v)]
        time.sleep(SETTLE_S)
        started = time.perf_counter()
        own = self.native.dense_attention(*arrays)
        own_s = time.perf_counter() - started
        time.sleep(SETTLE_S)
        started = time.perf_counter()
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch_s = time.perf_counter() - started
        result = torch.from_numpy(np.ascontiguousarray(own)).view(torch.bfloat16).float()
        wanted = expected[0].float()
        return {
            "own_s": own_s,
            "torch_s": torch_s,
            "difference": float((result - wanted).abs().max()),
            "cosine": float(torch.nn.functional.cosine_similarity(result.flatten(), wanted.flatten(), dim=0)),
        }


if __name__ == "__main__":
    serve(LimitsWorker())
