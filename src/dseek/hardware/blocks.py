"""Times whole decoder blocks, as the engine runs them.

A block is more than the sum of its parts: projections share prepared rows, norms and activations hide behind products,
threads meet more or less often. The planner adds up the parts and corrects the sum by what these blocks took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dseek.hardware.machine import BlockCurve
from dseek.hardware.native import NativeDecoder, NativeModule

PAGE_TOKENS = 64
DECODE_CONTEXT = 64
DECODE_ROWS = (1, 4, 16, 32)
PREFILL_ROWS = (128, 512)
MAX_SEQUENCES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockShape:
    """Sizes of the blocks that are timed; the names are those of `ModelShape`."""

    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the gated MLP."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads."""
    head_dim: int
    """Width of a head."""
    num_layers: int
    """Blocks run one after the other, so that weights do not stay in the nearest cache."""

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of the four projections."""
        width = self.num_heads * self.head_dim
        return {
            "qkv": (width + 2 * self.num_kv_heads * self.head_dim, self.hidden_size),
            "output": (self.hidden_size, width),
            "gate_up": (2 * self.intermediate_size, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
        }


SHAPES = (
    BlockShape(hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64, num_layers=16),
    BlockShape(hidden_size=2048, intermediate_size=5632, num_heads=32, num_kv_heads=4, head_dim=64, num_layers=2),
)
"""Like a small and a middling model."""


def block_curves(
    native: NativeModule, weight_formats: tuple[str, ...], max_passes: int, is_over: Callable[[], bool]
) -> tuple[BlockCurve, ...]:
    """Time blocks of each shape in each format; the least of some passes counts.

    Args:
        native: the compiled kernels.
        weight_formats: formats, the more important first.
        max_passes: passes over the rows of one set of blocks.
        is_over: tells that the time is used up; what is left then is left out, but for the first shape.
    """
    curves: list[BlockCurve] = []
    for shape in SHAPES:
        weights = _weights(shape)
        for weight_format in weight_formats:
            if is_over() and shape is not SHAPES[0]:
                continue
            decoder = _decoder(native, shape, weight_format, weights)
            times: dict[int, float] = {}
            for _ in range(max_passes):
                for num_rows in (*DECODE_ROWS, *PREFILL_ROWS):
                    seconds = _time(decoder, shape, num_rows) / shape.num_layers
                    times[num_rows] = min(times.get(num_rows, seconds), seconds)
                if is_over():
                    break
            curves.append(
                BlockCurve(
                    kernels="native",
                    weight_format=weight_format,
                    hidden_size=shape.hidden_size,
                    intermediate_size=shape.intermediate_size,
                    num_heads=shape.num_heads,
                    num_kv_heads=shape.num_kv_heads,
                    head_dim=shape.head_dim,
                    num_layers=shape.num_layers,
                    decode_context=DECODE_CONTEXT,
                    max_decode_rows=DECODE_ROWS[-1],
                    num_rows=tuple(times),
                    seconds=tuple(times.values()),
                )
            )
    return tuple(curves)


def _weights(shape: BlockShape) -> dict[str, npt.NDArray[np.float32]]:
    generator = np.random.default_rng(0)
    return {
        role: generator.standard_normal(size, dtype=np.float32) * np.float32(size[1] ** -0.5)
        for role, size in shape.linear_sizes().items()
    }


def _decoder(
    native: NativeModule,
    shape: BlockShape,
    weight_format: str,
    weights: Mapping[str, npt.NDArray[np.float32]],
    *,
    cache_dtype: str = "bf16",
    num_pages: int = max(DECODE_ROWS[-1], PREFILL_ROWS[-1] // PAGE_TOKENS),
    num_positions: int = PREFILL_ROWS[-1],
) -> NativeDecoder:
    """Build blocks with equal weights, each a copy of its own."""
    decoder = native.Decoder(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=64,
        epsilon=1e-5,
        cache_type=cache_dtype,
    )
    packed = {role: native.pack(weight_format, weight, role == "gate_up") for role, weight in weights.items()}
    norm = np.ones(shape.hidden_size, np.float32)
    for _ in range(shape.num_layers):
        copies = {role: blob.copy() for role, blob in packed.items()}
        decoder.add_block(**copies, input_norm=norm, post_attention_norm=norm)
    table = native.pack("f32", np.zeros((64, shape.hidden_size), np.float32), False)
    decoder.set_tables(embedding=table, head=table, final_norm=norm)
    angles = np.outer(np.arange(num_positions), 1e4 ** -np.linspace(0, 1, shape.head_dim // 2, endpoint=False))
    decoder.set_rotary(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    decoder.allocate_cache(num_pages)
    return decoder


def cold_decode_times(
    native: NativeModule,
    heads: tuple[int, int, int],
    cache_dtype: str,
    contexts: Sequence[int],
    warm_s: Sequence[float],
    cold_bytes: int,
) -> list[float]:
    """Time decode attention over caches that are read in turn, as layer after layer reads its own.

    Blocks with hardly any weights are run; what they take at the shortest context, beyond the warm attention there, is
    taken off.

    Args:
        native: the compiled kernels.
        heads: query heads, key/value heads, width of a head.
        cache_dtype: fp32, bf16 or int8.
        contexts: positions in the cache, rising, the last a multiple of the others and all of a page.
        warm_s: warm time of attention at each context.
        cold_bytes: size of all caches that are read in turn.

    Returns:
        Seconds of attention in one layer, for each context, never less than warm.
    """
    num_heads, num_kv_heads, head_dim = heads
    width = {"fp32": 4, "bf16": 2, "int8": 1}[cache_dtype]
    layer_bytes = 2 * contexts[-1] * num_kv_heads * head_dim * width
    shape = BlockShape(
        hidden_size=64,
        intermediate_size=64,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_layers=max(2, round(cold_bytes / layer_bytes)),
    )
    num_pages = contexts[-1] // PAGE_TOKENS
    decoder = _decoder(
        native,
        shape,
        "i8c",
        _weights(shape),
        cache_dtype=cache_dtype,
        num_pages=num_pages,
        num_positions=contexts[-1],
    )
    # Fill every page: memory that was never written is not there to be read.
    for first in range(0, num_pages, 8):
        count = min(8, num_pages - first)
        x = np.random.default_rng(first).standard_normal((count * PAGE_TOKENS, 64), dtype=np.float32)
        positions = np.tile(np.arange(PAGE_TOKENS, dtype=np.int32), count)
        row_starts = np.arange(0, count * PAGE_TOKENS + 1, PAGE_TOKENS, dtype=np.int32)
        pages = np.arange(first, first + count, dtype=np.int32)[:, None]
        decoder.run_blocks(x, positions, row_starts, pages, 0, shape.num_layers)
    x = np.ones((1, 64), np.float32)
    one_row = np.array([0, 1], np.int32)
    totals = []
    for context in contexts:
        # Several sequences in turn fill the same memory as one long one.
        tables = np.arange(num_pages, dtype=np.int32).reshape(-1, 1, context // PAGE_TOKENS)[:MAX_SEQUENCES]
        position = np.array([context - 1], np.int32)
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            for table in tables:
                decoder.run_blocks(x, position, one_row, table, 0, shape.num_layers)
            best = min(best, (time.perf_counter() - start) / len(tables) / shape.num_layers)
        totals.append(best)
    rest = max(0.0, totals[0] - warm_s[0])
    return [max(warm, total - rest) for warm, total in zip(warm_s, totals, strict=True)]


def _time(decoder: NativeDecoder, shape: BlockShape, num_rows: int) -> float:
    """Seconds of all blocks: up to `DECODE_ROWS[-1]` rows are sequences decoding, more are one prompt."""
    x = np.random.default_rng(1).standard_normal((num_rows, shape.hidden_size), dtype=np.float32)
    if num_rows <= DECODE_ROWS[-1]:
        positions = np.full(num_rows, DECODE_CONTEXT - 1, np.int32)
        row_starts = np.arange(num_rows + 1, dtype=np.int32)
        pages = np.arange(num_rows, dtype=np.int32)[:, None]
    else:
        positions = np.arange(num_rows, dtype=np.int32)
        row_starts = np.array([0, num_rows], np.int32)
        pages = np.arange(-(-num_rows // PAGE_TOKENS), dtype=np.int32)[None, :]
    best = float("inf")
    for _ in range(4 if num_rows <= DECODE_ROWS[-1] else 2):
        start = time.perf_counter()
        decoder.run_blocks(x, positions, row_starts, pages, 0, shape.num_layers)
        best = min(best, time.perf_counter() - start)
    return best
