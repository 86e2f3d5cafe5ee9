"""Micro-benchmarks: time the very kernels that a plan will choose between, at sizes like those of real models.

1. Read bandwidth over working sets from a few megabytes to beyond every cache: a small model's weights may stay in the
   last cache between two tokens, a large one's never do.
2. Linear layers in each weight format, over rows from 1 (decode) to 512 (prefill), for several widths, with the weight
   cold (in memory) and warm.
3. Attention, decode and prefill, over contexts, head counts and cache dtypes.
4. Whole decoder blocks (`blocks`), which correct the sum of the parts.
5. Parts again with fewer threads, at three points.
6. Overheads: an empty dispatch, an element of an activation, the engine's bookkeeping.
7. PyTorch's products by dtype (`torch_worker`, a process of its own, so that PyTorch is not imported here).

The steps share a budget of time: points are ordered by worth, those that come after the end are left out, and what time
is left goes into timing the same points again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dseek.core import config, logs
from dseek.core.errors import ConfigError
from dseek.hardware.blocks import block_curves, cold_decode_times
from dseek.hardware.machine import (
    AttentionCurve,
    Bandwidth,
    BlockCurve,
    GemmRate,
    LinearCurve,
    Overheads,
    PackRate,
    ThreadScaling,
)
from dseek.hardware.native import NativeModule
from dseek.hardware.probe import Probe

Progress = Callable[[float, str], None]
"""Called with the share done (0 to 1) and what comes next."""

WEIGHT_FORMATS = ("i8c", "i4g", "i8g", "bf16", "f32", "f16")
CACHE_DTYPES = ("bf16", "int8", "fp32")
NUM_ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
COLD_BYTES = (64 * 2**20, 128 * 2**20)
"""Least and largest working set of cold timings."""
COLD_ROWS = 32
"""Up to so many rows the weight's way from memory matters, and is measured apart."""

LINEAR_SHAPES = (
    (3072, 576),
    (2048, 2048),
    (576, 1536),
    (11264, 2048),
    (32768, 576),
    (960, 576),
    (2048, 5632),
    (576, 576),
)
"""Outputs and inputs: the projections of a small and of a middling model, and a head (rows up to `COLD_ROWS` only)."""
HEAD_OUTPUTS = 32768
"""A layer of so many outputs is a head, which many rows never pass."""

HEAD_SHAPES = ((9, 3, 64), (32, 4, 64), (16, 8, 128))
"""Query heads, key/value heads, width of a head."""
DECODE_CONTEXTS = (64, 512, 2048, 8192)
PREFILL_POINTS = {32: (32, 2048), 512: (512, 2048, 8192)}
"""Query rows: contexts."""

BANDWIDTH_SIZES_MB = (8, 32, 64, 128, 192, 256, 384, 1024)

MAX_PASSES = 3
"""Every point is timed so often at most, some seconds apart: a neighbour's load comes and goes in seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurements:
    """The measured part of a `Machine`; the fields are explained there."""

    cold_bytes: int = 1
    """Working set of the cold timings."""
    bandwidths: tuple[Bandwidth, ...] = ()
    """Read bandwidth."""
    gemm: tuple[GemmRate, ...] = ()
    """PyTorch's products."""
    linears: tuple[LinearCurve, ...] = ()
    """Linear layers."""
    attentions: tuple[AttentionCurve, ...] = ()
    """Attention."""
    blocks: tuple[BlockCurve, ...] = ()
    """Whole decoder blocks."""
    scalings: tuple[ThreadScaling, ...] = ()
    """Fewer threads."""
    overheads: tuple[Overheads, ...] = ()
    """Costs of a step."""
    packing: tuple[PackRate, ...] = ()
    """Packing at load."""
    torch_process_bytes: int = 0
    """Memory of a process with PyTorch."""


def measure(
    probe: Probe, native: NativeModule | None, *, progress: Progress | None = None, budget_s: float = 20.0
) -> Measurements:
    """Run all micro-benchmarks.

    Args:
        probe: what is known of the machine; its `num_threads` is used.
        native: the compiled kernels, or None to measure PyTorch only.
        progress: told how far it is.
        budget_s: time for the native part, in seconds; PyTorch takes some 6 s more.

    Raises:
        ConfigError: neither the native kernels nor PyTorch can be measured.
    """
    tell = progress if progress is not None else (lambda share, what: None)
    tell(0.0, "PyTorch's products")
    torch_part = _measure_torch(probe.num_threads, with_bandwidth=native is None)
    if native is None:
        if not torch_part.linears:
            raise ConfigError(
                "neither the native kernels nor PyTorch can be measured",
                remedy="install g++ and reinstall dseek, or repair the PyTorch installation",
            )
        tell(1.0, "done")
        return torch_part
    native.set_num_threads(probe.num_threads)
    clock = _Clock(budget_s)
    tell(0.25, "read bandwidth")
    bandwidths = _bandwidths(native, probe)
    tell(0.3, "linear layers")
    cold_bytes = _cold_bytes(probe)
    linears = _linear_curves(
        native, cold_bytes, clock.slice(0.45), lambda share: tell(0.3 + 0.35 * share, "linear layers")
    )
    tell(0.65, "attention")
    attentions = _attention_curves(native, cold_bytes, clock.slice(0.2))
    tell(0.8, "decoder blocks")
    blocks = block_curves(native, WEIGHT_FORMATS, MAX_PASSES, clock.slice(0.3))
    tell(0.9, "threads and overheads")
    scalings = _scalings(native, probe.num_threads)
    overheads = _native_overheads(native, probe.num_threads)
    packing = _packing(native)
    tell(1.0, "done")
    return Measurements(
        cold_bytes=cold_bytes,
        bandwidths=bandwidths,
        gemm=torch_part.gemm,
        linears=linears + torch_part.linears,
        attentions=attentions + torch_part.attentions,
        blocks=blocks,
        scalings=scalings,
        overheads=(overheads, *torch_part.overheads),
        packing=packing,
        torch_process_bytes=torch_part.torch_process_bytes,
    )


class _Clock:
    """Hands out shares of a budget of seconds; what a share does not use is left to the others."""

    def __init__(self, budget_s: float) -> None:
        self._budget_s = budget_s

    def slice(self, share: float) -> Callable[[], bool]:
        """Return a function that tells whether the share, counted from now, is used up."""
        end = time.perf_counter() + share * self._budget_s
        return lambda: time.perf_counter() >= end


def _bandwidths(native: NativeModule, probe: Probe) -> tuple[Bandwidth, ...]:
    """Working sets up to twice the last cache at least, but never more than a quarter of the memory."""
    last_cache = max((cache.num_bytes for cache in probe.caches), default=0)
    sizes = {size * 2**20 for size in BANDWIDTH_SIZES_MB} | {2 * last_cache}
    fitting = sorted(size for size in sizes if 0 < size <= probe.memory_limit_bytes // 4)
    return tuple(
        Bandwidth(num_bytes=size, gbs=native.read_bandwidth(size, 3 if size > 2**28 else 7)) for size in fitting
    )


def _cold_bytes(probe: Probe) -> int:
    """Three times the last cache, but not more than a model of some size has, and that can be set up in no time."""
    last_cache = max((cache.num_bytes for cache in probe.caches), default=0)
    return min(COLD_BYTES[1], max(COLD_BYTES[0], 3 * last_cache))


def _linear_curves(
    native: NativeModule, cold_bytes: int, is_over: Callable[[], bool], tell: Callable[[float], None]
) -> tuple[LinearCurve, ...]:
    """Time every format at every shape and number of rows, then again while time lasts; the least time counts.

    Rows are thinned out in the shapes after the first two: the curves are smooth. If the time is over within the first
    pass, the last shapes are left out.
    """
    jobs = [(rank, shape, fmt) for rank, shape in enumerate(LINEAR_SHAPES) for fmt in WEIGHT_FORMATS]
    times: dict[tuple[str, int, int], dict[int, tuple[float, float]]] = {}
    for attempt in range(MAX_PASSES):
        for index, (rank, (outputs, inputs), weight_format) in enumerate(jobs):
            if is_over() and (attempt > 0 or rank >= 2):
                continue
            points = times.setdefault((weight_format, outputs, inputs), {})
            for num_rows in _rows_of(rank, outputs):
                points[num_rows] = _least(
                    points.get(num_rows), _time_linear(native, weight_format, num_rows, outputs, inputs, cold_bytes)
                )
            tell((attempt + (index + 1) / len(jobs)) / MAX_PASSES)
    return tuple(
        LinearCurve(
            kernels="native",
            weight_format=weight_format,
            num_outputs=outputs,
            num_inputs=inputs,
            num_rows=tuple(points),
            seconds=tuple(cold for cold, _ in points.values()),
            warm_seconds=tuple(warm for _, warm in points.values()),
        )
        for (weight_format, outputs, inputs), points in times.items()
    )


def _rows_of(rank: int, outputs: int) -> tuple[int, ...]:
    if outputs >= HEAD_OUTPUTS:
        return (1, 8, 32)
    return NUM_ROWS if rank < 2 else (1, 4, 8, 32, 128, 512)


def _time_linear(
    native: NativeModule, weight_format: str, num_rows: int, outputs: int, inputs: int, cold_bytes: int
) -> tuple[float, float]:
    """Cold and warm seconds of one point."""
    repeats = 7 if num_rows <= COLD_ROWS else 3
    warm = native.time_linear(weight_format, num_rows, outputs, inputs, repeats, False)
    if num_rows > COLD_ROWS:
        return warm, warm
    # A cold repeat is a pass over all copies, a mean already.
    return max(warm, native.time_linear(weight_format, num_rows, outputs, inputs, 3, True, cold_bytes)), warm


def _least(known: tuple[float, float] | None, new: tuple[float, float]) -> tuple[float, float]:
    return new if known is None else (min(known[0], new[0]), min(known[1], new[1]))


def _attention_curves(native: NativeModule, cold_bytes: int, is_over: Callable[[], bool]) -> tuple[AttentionCurve, ...]:
    """Time decode and prefill, then again while time lasts; the least time counts.

    If the time is over within the first pass, the last head shapes are left out.
    """
    rows_and_contexts = {1: DECODE_CONTEXTS, **PREFILL_POINTS}
    warm: dict[tuple[tuple[int, int, int], str, int], list[float]] = {}
    cold: dict[tuple[tuple[int, int, int], str, int], list[float]] = {}
    for attempt in range(MAX_PASSES):
        for heads in HEAD_SHAPES:
            for cache_dtype in CACHE_DTYPES:
                if is_over() and (attempt > 0 or heads != HEAD_SHAPES[0]):
                    continue
                for num_rows, contexts in rows_and_contexts.items():
                    repeats = 3 if num_rows >= 512 else 7
                    new = [native.time_attention(num_rows, at, *heads, cache_dtype, repeats) for at in contexts]
                    new_cold = new
                    if num_rows == 1:
                        new_cold = cold_decode_times(native, heads, cache_dtype, contexts, new, cold_bytes)
                    key = heads, cache_dtype, num_rows
                    warm[key] = [min(pair) for pair in zip(warm.get(key, new), new, strict=True)]
                    cold[key] = [min(pair) for pair in zip(cold.get(key, new_cold), new_cold, strict=True)]
    return tuple(
        AttentionCurve(
            kernels="native",
            cache_dtype=cache_dtype,
            num_heads=heads[0],
            num_kv_heads=heads[1],
            head_dim=heads[2],
            num_rows=num_rows,
            contexts=rows_and_contexts[num_rows],
            seconds=tuple(cold[heads, cache_dtype, num_rows]),
            warm_seconds=tuple(seconds),
        )
        for (heads, cache_dtype, num_rows), seconds in warm.items()
    )


def _scalings(native: NativeModule, num_threads: int) -> tuple[ThreadScaling, ...]:
    """Time three typical calls with 1, 2, 4, ... threads and put them in relation to all threads."""
    counts = sorted({1 << power for power in range(num_threads.bit_length())} | {num_threads})
    counts = [count for count in counts if count <= num_threads]
    times = {}
    try:
        for count in counts:
            native.set_num_threads(count)
            times[count] = (
                native.time_linear("i8c", 1, 2048, 2048, 5, True, COLD_BYTES[1]),
                native.time_linear("i8c", 512, 2048, 2048, 3, False),
                native.time_attention(1, 4096, *HEAD_SHAPES[0], "bf16", 9),
            )
    finally:
        native.set_num_threads(num_threads)
    matvec, matmul, attention = times[num_threads]
    return tuple(
        ThreadScaling(
            num_threads=count,
            matvec=times[count][0] / matvec,
            matmul=times[count][1] / matmul,
            attention=times[count][2] / attention,
        )
        for count in counts
    )


def _native_overheads(native: NativeModule, num_threads: int) -> Overheads:
    """Time an all but empty dispatch, and activations by a stand-in: numpy's exp, which is vectorised as ours are."""
    dispatch_s = min(
        min(native.time_linear("f32", 1, 16, 32, 51, False), native.time_attention(1, 1, 2, 2, 64, "bf16", 51))
        for _ in range(5)
    )
    values = np.linspace(-4.0, 4.0, 65536, dtype=np.float32)
    result = np.empty_like(values)
    element_s = _best_of(lambda: np.exp(values, out=result), 15) / values.size / num_threads
    step_s, row_s, logit_s = bookkeeping_times()
    return Overheads(
        kernels="native", dispatch_s=dispatch_s, element_s=element_s, step_s=step_s, row_s=row_s, logit_s=logit_s
    )


def bookkeeping_times() -> tuple[float, float, float]:
    """Time the interpreter's part of an engine step with the kind of work that a step does.

    Returns:
        Seconds a step (small arrays built and joined), a sequence (list and dictionary work), and a logit (arg max).
    """

    def step() -> None:
        for _ in range(30):
            np.concatenate([np.asarray([1, 2, 3], dtype=np.int32), np.asarray([4], dtype=np.int32)])

    def row() -> None:
        state: dict[str, Any] = {"tokens": [], "count": 0}
        for index in range(40):
            state["tokens"].append(index)
            state["count"] += 1
        np.asarray(state["tokens"], dtype=np.int32)

    logits = np.linspace(0.0, 1.0, 32768, dtype=np.float32)
    return _best_of(step, 50), _best_of(row, 50), _best_of(lambda: logits.argmax(), 20) / logits.size


def _packing(native: NativeModule) -> tuple[PackRate, ...]:
    weight = np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)

    def rate(weight_format: str) -> float:
        return weight.size / _best_of(lambda: native.pack(weight_format, weight), 3)

    return tuple(PackRate(weight_format=name, weights_per_s=rate(name)) for name in WEIGHT_FORMATS)


def _best_of(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of some calls, after one that does not count; never 0."""
    call()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return max(best, 1e-9)


def _measure_torch(num_threads: int, *, with_bandwidth: bool) -> Measurements:
    """Run `torch_worker` in a process of its own and read its JSON; nothing measured where PyTorch fails."""
    command = [sys.executable, "-P", "-m", "dseek.hardware.torch_worker", str(num_threads)]
    if with_bandwidth:
        command.append("--bandwidth")
    environ = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    log = logs.get_logger(__name__)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True, env=environ)
        return config.from_mapping(Measurements, json.loads(done.stdout.splitlines()[-1]), where="torch_worker")
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        log.warning("PyTorch could not be measured: %s", detail.strip().splitlines()[-1] if detail.strip() else error)
        return Measurements()
