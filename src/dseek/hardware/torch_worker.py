"""Times PyTorch's own products and attention; run as a process by `measure`, prints one line of JSON.

    python -m dseek.hardware.torch_worker NUM_THREADS [--bandwidth]

A product that turns out slow is timed once and no more, so that a dtype without fast kernels costs seconds and not
minutes.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from dseek.core import config
from dseek.hardware.machine import AttentionCurve, Bandwidth, GemmRate, LinearCurve, Overheads, ThreadScaling
from dseek.hardware.measure import Measurements, bookkeeping_times

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
GEMM_SHAPES = {"matvec": (1, 4096, 4096), "thin": (32, 4096, 4096), "square": (2048, 2048, 2048)}
LINEAR_SHAPES = ((3072, 576), (2048, 2048), (576, 1536), (8192, 2048))
NUM_ROWS = (1, 8, 32, 512)
HEAD_SHAPES = ((9, 3, 64), (16, 8, 128))
ATTENTION_POINTS = {1: (64, 2048), 512: (512, 2048)}
SLOW_S = 0.15


def best_time(call: Callable[[], object], budget_s: float = 0.06) -> float:
    """Time a call, the best of as many as fit into the budget.

    Args:
        call: what is timed.
        budget_s: seconds to spend, roughly.

    Returns:
        Seconds of the fastest call.
    """
    best = float("inf")
    end = time.perf_counter() + budget_s
    for attempt in range(1000):
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        # The first call may build kernels and caches: it counts only if there is no time for another.
        if attempt > 0 or now - start > SLOW_S:
            best = min(best, now - start)
        if (now >= end and attempt > 0) or now - start > SLOW_S:
            break
    return max(best, 1e-9)


def gemm_rates() -> list[GemmRate]:
    """Time a matrix product in each dtype and shape class."""
    rates = []
    for dtype in (*DTYPES, "int8"):
        for shape_class, (m, n, k) in GEMM_SHAPES.items():
            seconds = best_time(_product(dtype, m, n, k))
            rates.append(
                GemmRate(dtype=dtype, shape_class=shape_class, m=m, n=n, k=k, gflops=2e-9 * m * n * k / seconds)
            )
    return rates


def _product(dtype: str, m: int, n: int, k: int) -> Callable[[], torch.Tensor]:
    if dtype == "int8":
        left = torch.randint(-127, 128, (m, k), dtype=torch.int8)
        right = torch.randint(-127, 128, (n, k), dtype=torch.int8).t()
        return lambda: torch._int_mm(left, right)
    x, weight = torch.randn(m, k).to(DTYPES[dtype]), torch.randn(n, k).to(DTYPES[dtype])
    return lambda: F.linear(x, weight)


def linear_curves() -> list[LinearCurve]:
    """Time `F.linear` over rows; a slow dtype is timed at the smaller shapes only."""
    curves = []
    for weight_format, dtype in FORMATS.items():
        for outputs, inputs in LINEAR_SHAPES:
            weight = torch.randn(outputs, inputs).to(dtype)
            seconds: list[float] = []
            for num_rows in NUM_ROWS:
                if seconds and seconds[-1] * num_rows / 32 > 4 * SLOW_S:
                    break
                x = torch.randn(num_rows, inputs).to(dtype)
                seconds.append(best_time(functools.partial(F.linear, x, weight), 0.03))
            curves.append(
                LinearCurve(
                    kernels="torch",
                    weight_format=weight_format,
                    num_outputs=outputs,
                    num_inputs=inputs,
                    num_rows=NUM_ROWS[: len(seconds)],
                    seconds=tuple(seconds),
                    warm_seconds=tuple(seconds),
                )
            )
    return curves


def attention_curves() -> list[AttentionCurve]:
    """Time `scaled_dot_product_attention` with grouped heads over contexts."""
    curves = []
    for cache_dtype in ("bf16", "fp32"):
        for heads, kv_heads, head_dim in HEAD_SHAPES:
            for num_rows, contexts in ATTENTION_POINTS.items():
                seconds = []
                for context in contexts:
                    q = torch.randn(1, heads, num_rows, head_dim).to(DTYPES[cache_dtype])
                    k, v = torch.randn(2, 1, kv_heads, context, head_dim).to(DTYPES[cache_dtype]).unbind(0)
                    mask = torch.ones(num_rows, context, dtype=torch.bool).tril(context - num_rows)
                    seconds.append(best_time(_attention(q, k, v, mask), 0.03))
                curves.append(
                    AttentionCurve(
                        kernels="torch",
                        cache_dtype=cache_dtype,
                        num_heads=heads,
                        num_kv_heads=kv_heads,
                        head_dim=head_dim,
                        num_rows=num_rows,
                        contexts=contexts,
                        seconds=tuple(seconds),
                        warm_seconds=tuple(seconds),
                    )
                )
    return curves


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def overheads() -> Overheads:
    """Time a tiny operator, an activation and the engine's bookkeeping."""
    tiny, large = torch.ones(16), torch.randn(512, 1536)
    step_s, row_s, logit_s = bookkeeping_times()
    return Overheads(
        kernels="torch",
        dispatch_s=best_time(lambda: tiny + 1.0, 0.01),
        element_s=best_time(lambda: F.silu(large), 0.02) / large.numel(),
        step_s=step_s,
        row_s=row_s,
        logit_s=logit_s,
    )


def bandwidths() -> tuple[Bandwidth, ...]:
    """Time the sum of a large tensor, all threads reading."""
    values = torch.ones(2**26, dtype=torch.int64)
    seconds = best_time(lambda: values.sum(), 0.5)
    return (Bandwidth(num_bytes=values.nbytes, gbs=values.nbytes / seconds * 1e-9),)


def main(arguments: list[str]) -> None:
    """Measure and print.

    Args:
        arguments: the number of threads, then optionally `--bandwidth`.
    """
    num_threads = int(arguments[0])
    torch.set_num_threads(num_threads)
    torch_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.manual_seed(0)
    with torch.inference_mode():
        result = Measurements(
            bandwidths=bandwidths() if "--bandwidth" in arguments else (),
            gemm=tuple(gemm_rates()),
            linears=tuple(linear_curves()),
            attentions=tuple(attention_curves()),
            scalings=(ThreadScaling(num_threads=num_threads, matvec=1.0, matmul=1.0, attention=1.0),),
            overheads=(overheads(),),
            torch_process_bytes=torch_bytes,
        )
    print(json.dumps(config.to_plain(result)))


if __name__ == "__main__":
    main(sys.argv[1:])
