"""Every operator of one kernel variant over odd sizes, then whole decoders over mixed batches.

Run as `python -m tests.sanitizer.kernels VARIANT` (or `--list`) by `test_sanitizer.py`. What the numbers must be is
asked elsewhere; here they must be finite, and every load and store in its place.
"""

from __future__ import annotations

import itertools
import sys
from types import ModuleType

import numpy as np

from dseek.ops import native as kernels
from tests.sanitizer.calls import Caller
from tests.sanitizer.decoders import FORMATS, Sizes, batch, build
from tests.sanitizer.process import load

SHAPES = ((1, 1), (2, 31), (5, 3), (16, 16), (17, 33), (30, 63), (33, 65), (47, 95), (70, 129), (128, 257), (6, 1040))
"""Output channels and inputs."""
FEW_ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 70)
BLOCK_BYTES = {"F32": 128, "F16": 64, "BF16": 64, "Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "I8_CHANNEL": 32}
"""Bytes of 32 values in each encoding that is packed directly."""

BATCHES = (
    [(0, 1)],
    [(0, 5)],
    [(0, 70)],
    [(63, 1), (64, 1), (0, 1)],
    [(0, 3), (10, 1), (60, 9), (127, 1), (0, 64)],
    [(1100, 1)],
    [(600, 1), (511, 1), (3, 1)],
    [(500, 40), (130, 1)],
    [(0, 300), (77, 130), (5, 1)],
)
"""First position and rows of each sequence: lone rows (their pages shared out), prompts, both, few rows and many."""


def products(native: ModuleType, rng: np.random.Generator) -> None:
    """Pack, unpack and multiply."""
    for weight_format in FORMATS:
        for channels, inputs in SHAPES:
            weight = rng.standard_normal((channels, inputs), dtype=np.float32)
            blob = native.pack(weight_format, weight)
            assert native.unpack(blob).shape == weight.shape
            if channels % 2 == 0:
                assert native.unpack(native.pack(weight_format, weight, True)).shape == weight.shape
            for rows in range(1, 71) if (channels, inputs) == (17, 33) else FEW_ROWS:
                product = native.linear(rng.standard_normal((rows, inputs), dtype=np.float32), blob)
                assert product.shape == (rows, channels) and np.isfinite(product).all()
        for encoding, num_bytes in BLOCK_BYTES.items():
            # A row of I8_CHANNEL is 96 bytes behind its scale.
            row_bytes = 4 + 96 if encoding == "I8_CHANNEL" else 3 * num_bytes
            pieces = [(encoding, rows, rng.integers(0, 256, rows * row_bytes, np.uint8)) for rows in (3, 16, 21)]
            blob = native.pack_encoded(weight_format, pieces, 96)
            native.linear(rng.standard_normal((5, 96), dtype=np.float32), blob)  # numbers of any kind, infinite too
    caller = Caller(native, rng)
    for _ in range(200):
        for name in ("integer_conv", "depthwise_conv"):
            arguments = caller.arguments(name)
            getattr(native, name)(**arguments)
            assert np.isfinite(arguments["out"]).all()
    for size in range(1, 140):
        rows = rng.standard_normal((3, size), dtype=np.float32)
        assert np.isfinite(native.rms_norm(rows, rows[0].copy(), 1e-5)).all()


def dense_attention(native: ModuleType, rng: np.random.Generator) -> None:
    """Dense attention of every head width."""
    for head_dim in range(16, 129, 16):
        for heads, tokens in ((1, 1), (3, 15), (1, 64), (2, 65), (1, 130)):
            wide = rng.standard_normal((3, heads, tokens, head_dim), dtype=np.float32)
            q, k, v = (wide.view(np.uint32) >> 16).astype(np.uint16)
            assert native.dense_attention(q, k, v).shape == q.shape
    assert native.dense_attention(*(np.zeros((1, 66, 512), np.uint16),) * 3).shape == (1, 66, 512)


def decoders(native: ModuleType, rng: np.random.Generator) -> None:
    """Decoders over every cache, head width and window, in batches of every kind."""
    for cache in ("fp32", "bf16", "int8"):
        for number, head_dim in enumerate(range(16, 129, 16)):
            window = (0, 1, 7, 64, 100, 0, 513, 65)[number]
            hidden, heads, kv_heads = ((48, 4, 2), (33, 3, 1), (80, 2, 2), (17, 8, 1))[number % 4]
            sizes = Sizes(
                cache=cache,
                head_dim=head_dim,
                window=window,
                hidden=hidden,
                heads=heads,
                kv_heads=kv_heads,
                patterns=number % 2 == 0,
            )
            decoder = build(native, sizes, seed=number)
            for rows in BATCHES:
                arguments = batch(sizes, rows, rng)
                logits = decoder.forward(**arguments)
                assert logits.shape == (len(arguments["logit_rows"]), sizes.vocab)
            if hidden % 16 == 0:
                x = rng.standard_normal((len(arguments["positions"]), hidden), dtype=np.float32)
                names = ("positions", "row_starts", "page_tables")
                decoder.run_blocks(x, *(arguments[name] for name in names), 1, 2)


def main(variant: str) -> None:
    """Run it all, with two threads and with three."""
    native = load()
    assert kernels.require() is native
    if variant == "--list":
        print(*native.variants())
        return
    native.set_variant(variant)
    rng = np.random.default_rng(0)
    native.set_num_threads(2)
    products(native, rng)
    dense_attention(native, rng)
    decoders(native, rng)
    native.set_num_threads(3)
    dense_attention(native, rng)
    for cache in ("fp32", "bf16", "int8"):
        sizes = Sizes(cache=cache, head_dim=64)
        decoder = build(native, sizes, seed=9)
        for most_stretches, rows in zip(itertools.cycle((0, 5, 10_000)), BATCHES, strict=False):
            # The clocks run too, with no room, too little and enough for the timeline.
            decoder.set_timing(True, most_stretches)
            decoder.forward(**batch(sizes, rows, rng))
            nanoseconds, stretches, _ = decoder.timings()
            assert len(stretches) == len(nanoseconds) == 3 and (nanoseconds >= 0).all()
            assert all(len(part) <= most_stretches for part in stretches)
        for num_rows, context in ((1, 1), (1, 700), (70, 130)):
            assert native.time_attention(num_rows, context, 4, 2, 48, cache, 1) > 0
    assert native.read_bandwidth(70_001, 1) > 0


if __name__ == "__main__":
    main(sys.argv[1])
