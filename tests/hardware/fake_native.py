"""A made-up processor with the measuring functions of the compiled kernels, and the true times behind them.

Times come from formulas with what real kernels have: a dispatch, weights streamed at a bandwidth that depends on where
they lie, a compute rate for each format, rows worked on in tiles, attention bound by compute or by its cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "i8c": 1.0, "i8g": 1.0625, "i4g": 0.625}
CACHE_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0625}


class FakeDecoder:
    """Blocks that do nothing, in no time."""

    def __init__(self, **sizes: object) -> None:
        self.sizes = sizes

    def add_block(self, **arrays: np.ndarray) -> None:
        assert set(arrays) == {"qkv", "output", "gate_up", "down", "input_norm", "post_attention_norm"}

    def set_tables(self, **arrays: np.ndarray) -> None:
        assert set(arrays) == {"embedding", "head", "final_norm"}

    def set_rotary(self, cos: np.ndarray, sin: np.ndarray) -> None:
        assert cos.shape == sin.shape

    def allocate_cache(self, num_pages: int) -> None:
        assert num_pages > 0

    def run_blocks(
        self,
        x: np.ndarray,
        positions: np.ndarray,
        row_starts: np.ndarray,
        page_tables: np.ndarray,
        block_begin: int,
        block_end: int,
    ) -> np.ndarray:
        assert len(x) == len(positions) == row_starts[-1]
        assert len(page_tables) == len(row_starts) - 1
        return x


@dataclass
class FakeNative:
    """See the module; the defaults are a processor with AVX-512 and VNNI."""

    __file__: str = __file__
    Decoder: Callable[..., FakeDecoder] = FakeDecoder
    dispatch_s: float = 3e-6
    memory_gbs: float = 84.0
    cache_gbs: float = 200.0
    cache_bytes: float = 32e6
    gflops: dict[str, float] = field(
        default_factory=lambda: {"f32": 220, "f16": 210, "bf16": 900, "i8c": 2000, "i8g": 1500, "i4g": 1300}
    )
    tile_rows: int = 4
    attention_gflops: float = 450.0
    threads: int = 2
    calls: int = 0

    def variant(self) -> str:
        return "avx512"

    def variants(self) -> list[str]:
        return ["generic", "avx2", "avx512"]

    def cpu_features(self) -> list[str]:
        return ["avx512f"]

    def set_variant(self, name: str) -> None:
        assert name in self.variants()

    def num_threads(self) -> int:
        return self.threads

    def set_num_threads(self, count: int) -> None:
        self.threads = count

    def gbs(self, working_set: float) -> float:
        """Bandwidth over a working set: all from the last cache, or a falling share of it."""
        share = min(1.0, self.cache_bytes / working_set) ** 3
        return 1 / (share / self.cache_gbs + (1 - share) / self.memory_gbs) * self.threads / 2

    def read_bandwidth(self, num_bytes: int, repeats: int) -> float:
        return self.gbs(num_bytes)

    def pack(self, weight_format: str, weight: np.ndarray, interleaved: bool = False) -> np.ndarray:
        return np.zeros(int(weight.size * BYTES[weight_format]), np.uint8)

    def linear_s(self, weight_format: str, m: int, n: int, k: int, working_set: float) -> float:
        """The true time of a linear layer."""
        memory = n * k * BYTES[weight_format] / self.gbs(working_set) * 1e-9
        tiles = math.ceil(m / self.tile_rows) * self.tile_rows
        efficiency = k / (k + 100) * n / (n + 64)
        compute = 2e-9 * tiles * n * k / (self.gflops[weight_format] * efficiency) * 2 / self.threads
        return self.dispatch_s + (memory**4 + compute**4) ** 0.25

    def time_linear(
        self, weight_format: str, m: int, n: int, k: int, repeats: int, cold: bool, working_set_bytes: int = 2**28
    ) -> float:
        self.calls += 1
        return self.linear_s(weight_format, m, n, k, working_set_bytes if cold else n * k * BYTES[weight_format])

    def attention_s(
        self, rows: int, context: int, heads: int, kv: int, dim: int, cache: str, working_set: float
    ) -> float:
        """The true time of attention."""
        pairs = rows * (context - rows) + rows * (rows + 1) / 2
        rate = self.attention_gflops * (0.12 if rows == 1 else rows / (rows + 40)) * dim / (dim + 16)
        compute = 4e-9 * pairs * heads * dim / rate * 2 / self.threads
        memory = 2 * context * kv * dim * CACHE_BYTES[cache] / self.gbs(working_set) * 1e-9
        return self.dispatch_s + (memory**4 + compute**4) ** 0.25

    def time_attention(
        self, rows: int, context: int, heads: int, kv: int, dim: int, cache_dtype: str, repeats: int
    ) -> float:
        self.calls += 1
        near = 2 * context * kv * dim * CACHE_BYTES[cache_dtype]
        return self.attention_s(rows, context, heads, kv, dim, cache_dtype, near)


def vnni() -> FakeNative:
    """A processor with AVX-512 and VNNI, and a last cache smaller than any model."""
    return FakeNative()


def amx() -> FakeNative:
    """A processor with matrix tiles: 16 rows a tile, fast bf16 and int8, a large last cache, slow memory."""
    return FakeNative(
        memory_gbs=40.0,
        cache_gbs=110.0,
        cache_bytes=300e6,
        gflops={"f32": 300, "f16": 280, "bf16": 2400, "i8c": 4500, "i8g": 2500, "i4g": 2200},
        tile_rows=16,
        attention_gflops=900.0,
        dispatch_s=4e-6,
    )
