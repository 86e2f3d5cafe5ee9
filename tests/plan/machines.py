"""Machines measured on made-up kernels, the true time of a run on them, and model shapes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from dseek.core.attention_pattern import DENSE
from dseek.core.shape import ModelShape
from dseek.hardware.blocks import SHAPES as BLOCK_SHAPES
from dseek.hardware.machine import FORMAT_VERSION, BlockCurve, Machine, Overheads
from dseek.hardware.measure import measure
from dseek.hardware.probe import Probe
from dseek.plan.formats import VARIANTS, CacheDtype, LayerFormats, Variant
from dseek.plan.layout import Layout
from tests.hardware.fake_native import BYTES, CACHE_BYTES, FakeNative, amx, vnni

GB = 10**9
FAKES = {"vnni": vnni, "amx": amx}
FUSION = {False: 0.9, True: 0.75}
BLOCK_ROWS = (1, 4, 16, 32, 128, 512)
BLOCK_FIELDS = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")


def shape_of(**changes: object) -> ModelShape:
    """SmolLM2-135M, or a change of it."""
    values: dict[str, object] = {
        "family": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_layers": 30,
        "num_heads": 9,
        "num_kv_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    return ModelShape(**{**values, **changes})  # type: ignore[arg-type]


SMALL = shape_of()
MIDDLING = shape_of(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_layers=22,
    num_heads=32,
    num_kv_heads=4,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
UNSEEN = shape_of(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    qk_norm=True,
)
"""None of its projections is a measured shape."""


@functools.cache
def machine(name: str = "vnni", *, memory_bytes: int = 24 * GB, with_torch: bool = False) -> Machine:
    """Measure a made-up machine."""
    from unittest import mock

    from dseek.hardware import measure as measuring

    fake = FAKES[name]()
    probe = Probe(
        cpu_name=name,
        features=(),
        num_cores=2,
        num_threads=2,
        caches=(),
        memory_bytes=memory_bytes,
        memory_limit_bytes=memory_bytes,
        accelerators=(),
    )
    with (
        mock.patch.object(measuring, "_measure_torch", return_value=measuring.Measurements()),
        mock.patch.object(measuring, "block_curves", return_value=block_curves(fake)),
        mock.patch.object(measuring, "cold_decode_times", new=cold_decode_times),
    ):
        found = measure(probe, fake)
    linears, attentions = found.linears, found.attentions
    # The interpreter's own times are this computer's: replaced, so that a test says the same everywhere.
    cost = Overheads(
        kernels="native", dispatch_s=fake.dispatch_s, element_s=1e-10, step_s=3e-5, row_s=3e-6, logit_s=1e-10
    )
    overheads = (cost,)
    if with_torch:
        import dataclasses

        linears += tuple(
            dataclasses.replace(
                curve,
                kernels="torch",
                seconds=tuple(2 * value for value in curve.seconds),
                warm_seconds=tuple(2 * value for value in curve.warm_seconds),
            )
            for curve in linears
            if curve.weight_format in ("f32", "bf16", "f16")
        )
        attentions += tuple(
            dataclasses.replace(curve, kernels="torch") for curve in attentions if curve.cache_dtype != "int8"
        )
        overheads = (cost, dataclasses.replace(cost, kernels="torch"))
    return Machine(
        format_version=FORMAT_VERSION,
        machine_id=name,
        cpu_name=name,
        features=(),
        num_cores=2,
        num_threads=2,
        caches=(),
        memory_bytes=memory_bytes,
        memory_limit_bytes=memory_bytes,
        accelerators=(),
        kernel_variant=fake.variant(),
        process_bytes=60_000_000,
        torch_process_bytes=300_000_000,
        other_load=0.0,
        cold_bytes=found.cold_bytes,
        bandwidths=found.bandwidths,
        gemm=(),
        linears=linears,
        attentions=attentions,
        blocks=found.blocks,
        scalings=found.scalings,
        overheads=overheads,
        packing=found.packing,
    )


def block_curves(fake: FakeNative) -> tuple[BlockCurve, ...]:
    """Whole blocks of made-up kernels, timed without noise."""
    curves = []
    for sizes in BLOCK_SHAPES:
        shape = shape_of(**{name: getattr(sizes, name) for name in BLOCK_FIELDS}, num_layers=1)
        for variant in VARIANTS:
            width = BYTES[variant.weight_format]
            working_set = sizes.num_layers * shape.num_block_parameters() * width
            seconds = []
            for rows in BLOCK_ROWS:
                heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
                one = fake.attention_s(1 if rows <= 32 else rows, max(64, rows), *heads, "bf16", working_set)
                attention = fake.dispatch_s + (rows if rows <= 32 else 1) * (one - fake.dispatch_s)
                seconds.append(attention + block_without_attention_s(fake, shape, variant, rows, working_set))
            curves.append(
                BlockCurve(
                    kernels="native",
                    weight_format=variant.weight_format,
                    num_layers=sizes.num_layers,
                    decode_context=64,
                    max_decode_rows=32,
                    num_rows=BLOCK_ROWS,
                    seconds=tuple(seconds),
                    **{name: getattr(sizes, name) for name in BLOCK_FIELDS},
                )
            )
    return tuple(curves)


def cold_decode_times(
    fake: FakeNative,
    heads: tuple[int, int, int],
    cache: str,
    contexts: Sequence[int],
    warm_s: Sequence[float],
    cold_bytes: int,
) -> list[float]:
    """Attention over caches read in turn, timed without noise."""
    return [fake.attention_s(1, context, *heads, cache, cold_bytes) for context in contexts]


def block_without_attention_s(
    fake: FakeNative, shape: ModelShape, variant: Variant, rows: int, working_set: float
) -> float:
    """True time of a block: its parts, of which fusion saves a part that depends on the rows."""
    parts = sum(fake.linear_s(variant.weight_format, rows, n, k, working_set) for n, k in shape.linear_sizes().values())
    elements = 4 * shape.hidden_size + shape.query_size + shape.kv_size + 2 * shape.intermediate_size
    return FUSION[rows > 64] * (parts + rows * elements * 1e-10)


def layout_of(shape: ModelShape, variant: Variant, cache_dtype: CacheDtype, *, batch: int = 1) -> Layout:
    """A complete layout in one variant."""
    return Layout(
        kernels="native",
        layer_formats=(LayerFormats.uniform(variant.weight_format),) * shape.num_layers,
        embedding_format=variant.table_format,
        head_format=variant.table_format,
        cache_dtype=cache_dtype,
        attention_patterns=(DENSE,) * shape.num_layers,
        num_pages=batch * 128,
        max_batch=batch,
        prefill_chunk_tokens=512,
        num_threads=2,
    )


def true_times(
    fake: FakeNative, shape: ModelShape, variant: Variant, cache: str, prompt: int, context: int, batch: int
) -> tuple[float, float]:
    """What a run really takes on made-up kernels: seconds of prefill, seconds of a decode step."""
    width = BYTES[variant.weight_format]
    weights = shape.num_layers * shape.num_block_parameters() * width
    weights += shape.vocab_size * shape.hidden_size * BYTES[variant.table_format]
    cache_bytes = batch * context * 2 * shape.kv_size * CACHE_BYTES[cache] * shape.num_layers
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)

    def step(rows: int, sampled: int, attention: float, working_set: float) -> float:
        layer = block_without_attention_s(fake, shape, variant, rows, working_set)
        head = fake.linear_s(variant.table_format, sampled, shape.vocab_size, shape.hidden_size, working_set)
        fixed = 3e-5 + sampled * (3e-6 + shape.vocab_size * 1e-10)
        return shape.num_layers * (layer + attention) + (head + fixed if sampled else fixed)

    whole = weights + cache_bytes
    one = fake.attention_s(1, context, *heads, cache, whole)
    decode = step(batch, batch, fake.dispatch_s + batch * (one - fake.dispatch_s), whole)
    prefill = 0.0
    for start in range(0, prompt, 512):
        rows = min(512, prompt - start)
        attention = fake.attention_s(rows, start + rows, *heads, cache, weights)
        prefill += step(rows, 1 if start + rows == prompt else 0, attention, weights)
    return batch * prefill, decode
