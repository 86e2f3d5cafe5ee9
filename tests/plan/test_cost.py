"""The cost model against the true times of made-up kernels, and its arithmetic of memory."""

from __future__ import annotations

import itertools
import statistics

import pytest

from dseek.core.errors import ConfigError
from dseek.core.shape import ModelShape
from dseek.plan import cost
from dseek.plan.formats import VARIANTS, cache_bytes_per_token, packed_bytes
from dseek.plan.rates import Rates, blend, interpolate, visible_pairs
from tests.plan.machines import FAKES, MIDDLING, SMALL, UNSEEN, layout_of, machine, shape_of, true_times

COMBINATIONS = list(itertools.product(VARIANTS, (100, 300, 2048, 6000), (1, 3, 6, 24)))


@pytest.mark.parametrize("name", FAKES)
@pytest.mark.parametrize("shape", [SMALL, MIDDLING, UNSEEN], ids=["small", "middling", "unseen"])
def test_median_error_is_small_over_precisions_contexts_and_batches(name: str, shape: ModelShape) -> None:
    errors = []
    for variant, context, batch in COMBINATIONS:
        cache = "fp32" if variant.precision == "fp32" else "bf16"
        predicted = cost.predict(
            shape,
            machine(name),
            layout_of(shape, variant, cache, batch=batch),
            prompt_tokens=context,
            context_tokens=context,
            batch=batch,
        )
        prefill, decode = true_times(FAKES[name](), shape, variant, cache, context, context, batch)
        errors.append(abs(predicted.prefill_tokens_s / (batch * context / prefill) - 1))
        errors.append(abs(predicted.decode_tokens_s / (batch / decode) - 1))
    assert statistics.median(errors) < 0.12
    assert statistics.quantiles(errors, n=10)[-1] < 0.40


def test_measured_points_come_back_exactly() -> None:
    here = machine("vnni")
    rates = Rates(here, "native", 2)
    curve_set = here.cold_bytes
    for curve in here.linears:
        for rows, seconds in zip(curve.num_rows, curve.seconds, strict=True):
            found = rates.linear_s(curve.weight_format, rows, curve.num_outputs, curve.num_inputs, curve_set)
            assert found == pytest.approx(seconds)
    for attention in here.attentions:
        for context, seconds in zip(attention.contexts, attention.seconds, strict=True):
            heads = (attention.num_heads, attention.num_kv_heads, attention.head_dim)
            found = rates.attention_s(attention.cache_dtype, attention.num_rows, context, *heads, curve_set)
            assert found == pytest.approx(seconds)


def test_slow_fp16_is_seen_from_measurement_alone() -> None:
    """No name of a format or processor decides: a machine whose bf16 is slow is told so just the same."""
    import dataclasses

    here = machine("vnni")
    slow = tuple(
        dataclasses.replace(
            curve,
            seconds=tuple(30 * value for value in curve.seconds),
            warm_seconds=tuple(30 * value for value in curve.warm_seconds),
        )
        if curve.weight_format == "bf16"
        else curve
        for curve in here.linears
    )
    odd = dataclasses.replace(here, linears=slow)
    bf16 = next(variant for variant in VARIANTS if variant.name == "bf16")
    layout = layout_of(SMALL, bf16, "bf16")
    jobs = {"prompt_tokens": 512, "context_tokens": 512, "batch": 1}
    usual = cost.predict(SMALL, here, layout, **jobs)
    assert cost.predict(SMALL, odd, layout, **jobs).prefill_tokens_s < usual.prefill_tokens_s / 8


def test_small_helpers() -> None:
    assert interpolate([1, 4], [1.0, 2.0], 2) == pytest.approx(2**0.5)
    assert interpolate([1, 4], [1.0, 2.0], 0.5) == 1.0
    assert interpolate([1, 4], [1.0, 2.0], 8) == 4.0
    assert interpolate([3], [5.0], 3) == 5.0
    assert blend([((1, 1), 2.0), ((4, 4), 8.0)], (4, 4)) == 8.0
    assert blend([((1, 1), 2.0), ((4, 4), 8.0)], (2, 2)) == pytest.approx(4.0)
    assert visible_pairs(1, 10) == 10
    assert visible_pairs(3, 3) == 6
    assert visible_pairs(2, 5) == 4 + 5


def test_weight_bytes_by_hand() -> None:
    assert packed_bytes("f32", 10, 7) == 16 * 7 * 4
    assert packed_bytes("bf16", 16, 33) == 16 * 64 * 2
    assert packed_bytes("i8c", 16, 64) == 16 * 64 + 16 * 8
    assert packed_bytes("i8g", 16, 64) == 16 * 64 + 16 * 2 * 2
    assert packed_bytes("i4g", 16, 64) == 16 * 32 + 16 * 2 * 4
    assert cache_bytes_per_token("int8", 3, 64) == 2 * 3 * 68
    assert cache_bytes_per_token("bf16", 3, 64) == 2 * 3 * 128
    fp32 = VARIANTS[0]
    total, streamed = cost.weight_bytes(SMALL, layout_of(SMALL, fp32, "fp32"))
    assert total == streamed == 4 * SMALL.num_parameters()
    untied = shape_of(tie_word_embeddings=False)
    total, streamed = cost.weight_bytes(untied, layout_of(untied, fp32, "fp32"))
    assert total == 4 * untied.num_parameters()
    assert total - streamed == 4 * untied.vocab_size * untied.hidden_size


def test_prediction_adds_up_and_windows_make_long_contexts_cheaper() -> None:
    variant = VARIANTS[1]
    jobs = {"prompt_tokens": 8192, "context_tokens": 8192, "batch": 1}
    full = cost.predict(SMALL, machine(), layout_of(SMALL, variant, "bf16"), **jobs)
    assert full.peak_bytes == full.weights_bytes + full.cache_bytes + full.workspace_bytes
    assert full.cache_bytes == 128 * 64 * 30 * 2 * 3 * 64 * 2
    assert full.load_s > 0
    windowed = shape_of(sliding_window=512)
    some = shape_of(sliding_window=512, window_layers=(True, False) * 15)
    all_windowed = cost.predict(windowed, machine(), layout_of(SMALL, variant, "bf16"), **jobs)
    half_windowed = cost.predict(some, machine(), layout_of(SMALL, variant, "bf16"), **jobs)
    assert all_windowed.prefill_tokens_s > half_windowed.prefill_tokens_s > full.prefill_tokens_s
    assert all_windowed.decode_tokens_s > half_windowed.decode_tokens_s > full.decode_tokens_s


def test_fewer_threads_are_slower_and_unmeasured_kernels_are_named() -> None:
    import dataclasses

    layout = layout_of(SMALL, VARIANTS[1], "bf16")
    jobs = {"prompt_tokens": 512, "context_tokens": 512, "batch": 1}
    both = cost.predict(SMALL, machine(), layout, **jobs)
    one = cost.predict(SMALL, machine(), dataclasses.replace(layout, num_threads=1), **jobs)
    assert 1.5 < both.decode_tokens_s / one.decode_tokens_s < 2.1
    with pytest.raises(ConfigError, match="torch kernels were not measured"):
        cost.predict(SMALL, machine(), dataclasses.replace(layout, kernels="torch"), **jobs)
