"""What the search decides, refuses and says."""

from __future__ import annotations

import pytest

from dseek.core.errors import ConfigError, MemoryLimitError
from dseek.core.shape import ModelShape
from dseek.plan import Objective, Plan, make, quality
from dseek.plan.explain import Choice
from dseek.plan.formats import VARIANTS
from tests.plan.machines import GB, MIDDLING, SMALL, machine

WEIGHTS = SMALL.num_layers * SMALL.num_block_parameters()
TABLE = SMALL.vocab_size * SMALL.hidden_size
Q4_1 = {"Q4_1": WEIGHTS, "Q8_0": TABLE, "F32": 61 * 576}
Q8_0 = {"Q8_0": WEIGHTS + TABLE, "F32": 61 * 576}
BF16 = {"BF16": SMALL.num_parameters()}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DSEEK_PRECISION_MODE", "DSEEK_NUM_THREADS", "DSEEK_KERNELS"):
        monkeypatch.delenv(name, raising=False)


BF16_MIDDLING = {"BF16": MIDDLING.num_parameters()}


def choice(plan: Plan, name: str) -> Choice:
    return next(entry for entry in plan.choices if entry.name == name)


def formats(plan: Plan) -> set[str]:
    return {name for layer in plan.layer_formats for name in layer.by_role().values()}


def test_exact_int4_is_taken_for_a_4_bit_file() -> None:
    plan = make(SMALL, machine(), Objective(batch=1), encodings=Q4_1, model="m")
    assert (plan.precision, formats(plan)) == ("int4", {"i4g"})
    assert plan.embedding_format == plan.head_format == "i8g"
    assert choice(plan, "precision and cache").alternatives[-1].quality_loss <= 0.005


def test_quality_budget_decides_between_precisions() -> None:
    kinds = {}
    for budget in (0.0, 0.0006, 0.005, 0.2):
        kinds[budget] = make(SMALL, machine(), Objective(max_quality_loss=budget), encodings=BF16).precision
    assert kinds == {0.0: "bf16", 0.0006: "mixed", 0.005: "int8", 0.2: "int4"}
    lossless = make(SMALL, machine(), Objective(max_quality_loss=0.0), encodings=Q8_0)
    assert formats(lossless) == {"i8g"}


def test_every_alternative_says_why_not() -> None:
    plan = make(MIDDLING, machine(), Objective(context_tokens=2048), encodings=BF16_MIDDLING)
    for entry in plan.choices:
        taken = [option for option in entry.alternatives if not option.rejected]
        assert [option.value for option in taken] == [entry.chosen]
        assert all(option.prefill_tokens_s > 0 and option.peak_bytes > 0 for option in entry.alternatives)
    told = {option.value: option.rejected for option in choice(plan, "precision and cache").alternatives}
    assert "0.5 % accepted" in told["int4, groups of 32; cache bf16"]
    assert "times as long" in told["fp32; cache fp32"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_precision_asked_for_is_had_whatever_it_loses(precision: str) -> None:
    plan = make(SMALL, machine(), Objective(max_quality_loss=0.0), encodings=BF16, precision=precision)
    assert plan.precision == precision
    expected = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "i8g", "int4": "i4g"}
    assert formats(plan) == {expected[precision]}
    assert plan.cache_dtype == ("fp32" if precision == "fp32" else "bf16")


def test_environment_decides_where_the_caller_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSEEK_PRECISION_MODE", "fp32")
    monkeypatch.setenv("DSEEK_NUM_THREADS", "1")
    plan = make(SMALL, machine(), Objective(), encodings=Q4_1)
    assert (plan.precision, plan.num_threads) == ("fp32", 1)
    assert make(SMALL, machine(), Objective(), encodings=Q4_1, precision="auto", num_threads=2).precision == "int4"


def test_objectives_differ() -> None:
    latency = make(MIDDLING, machine(), Objective(context_tokens=1024), encodings=BF16_MIDDLING)
    throughput = make(MIDDLING, machine(), Objective(kind="throughput", context_tokens=1024), encodings=BF16_MIDDLING)
    least = make(MIDDLING, machine(), Objective(kind="memory", context_tokens=1024), encodings=BF16_MIDDLING)
    assert latency.max_batch == 1
    assert throughput.max_batch > 4
    assert throughput.predicted.decode_tokens_s > 2 * latency.predicted.decode_tokens_s
    assert least.predicted.peak_bytes <= latency.predicted.peak_bytes
    assert least.cache_dtype == "int8" or least.precision == "int8"
    assert choice(throughput, "batch").chosen == str(throughput.max_batch)


def test_threads_and_chunk_asked_for() -> None:
    plan = make(SMALL, machine(), Objective(), encodings=Q4_1, num_threads=1, prefill_chunk_tokens=96)
    assert (plan.num_threads, plan.prefill_chunk_tokens) == (1, 96)
    assert make(SMALL, machine(), Objective(), encodings=Q4_1).num_threads == 2
    assert make(SMALL, machine(), Objective(), encodings=Q4_1, cache_dtype="int8").cache_dtype == "int8"


def test_pages_hold_every_sequence() -> None:
    plan = make(SMALL, machine(), Objective(context_tokens=100, batch=3), encodings=Q4_1)
    assert (plan.context_tokens, plan.max_batch, plan.num_pages) == (100, 3, 6)
    assert make(MIDDLING, machine(), Objective(), encodings=BF16_MIDDLING).context_tokens == 8192
    tiny = make(SMALL, machine(), Objective(context_tokens=1), encodings=Q4_1)
    assert tiny.num_pages == 1


def test_what_does_not_fit_is_refused_with_numbers_and_advice() -> None:
    with pytest.raises(MemoryLimitError) as caught:
        make(SMALL, machine(), Objective(memory_limit_bytes=10**8), encodings=Q4_1, model="smollm2")
    assert "smollm2 needs" in str(caught.value)
    assert "at most 100 MB" in str(caught.value)
    objective = Objective(context_tokens=131072, batch=8, memory_limit_bytes=4 * GB)
    with pytest.raises(MemoryLimitError, match=r"--context (\d+) or less, or fewer sequences"):
        make(MIDDLING, machine(), objective, encodings=BF16_MIDDLING)
    # A limit that leaves room for a narrow precision only is a reason, not an error.
    plan = make(SMALL, machine(), Objective(memory_limit_bytes=600_000_000, context_tokens=512), encodings=BF16)
    assert "of memory" in choice(plan, "precision and cache").alternatives[0].rejected


def test_quality_and_memory_together_leave_nothing() -> None:
    objective = Objective(max_quality_loss=0.0, memory_limit_bytes=250_000_000, context_tokens=512)
    with pytest.raises(ConfigError, match="max-quality-loss"):
        make(SMALL, machine(), objective, encodings=BF16)


def test_torch_beside_native() -> None:
    both = machine(with_torch=True)
    plan = make(SMALL, both, Objective(), encodings=BF16, precision="bf16")
    told = choice(plan, "kernels")
    assert (plan.kernels, told.chosen) == ("native", "native")
    assert [option.value for option in told.alternatives] == ["native", "torch"]
    assert "times as long" in told.alternatives[1].rejected
    asked = make(SMALL, both, Objective(), encodings=Q4_1, kernels="torch")
    assert asked.kernels == "torch"
    assert asked.precision in ("fp32", "bf16", "fp16")
    with pytest.raises(ConfigError, match="not run on the torch kernels"):
        make(SMALL, both, Objective(), encodings=Q4_1, kernels="torch", precision="int4")
    with pytest.raises(ConfigError, match="not measured"):
        make(SMALL, machine(), Objective(), encodings=Q4_1, kernels="torch")


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"precision": "int7"}, "auto, fp32"),
        ({"cache_dtype": "fp8"}, "fp32, bf16, int8"),
        ({"num_threads": -1}, "1 to 1024"),
        ({"prefill_chunk_tokens": -5}, "1 to 65536"),
        ({"kernels": "cuda"}, "native, torch"),
    ],
)
def test_bad_wishes(wishes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(SMALL, machine(), Objective(), encodings=Q4_1, **wishes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "speed"},
        {"context_tokens": 0},
        {"batch": 0},
        {"prompt_tokens": -1},
        {"max_quality_loss": -0.1},
        {"max_quality_loss": float("nan")},
        {"memory_limit_bytes": 0},
    ],
)
def test_bad_objectives(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Objective(**values)  # type: ignore[arg-type]


def test_context_beyond_the_model() -> None:
    with pytest.raises(ConfigError, match="at most 8192"):
        make(SMALL, machine(), Objective(context_tokens=9000), encodings=Q4_1)


def test_a_model_of_odd_encodings_is_planned() -> None:
    shape: ModelShape = SMALL
    plan = make(shape, machine(), Objective(), encodings={"Q6_K": shape.num_parameters()})
    assert plan.precision == "int8"


def test_quality_counts_the_weights_that_are_rounded() -> None:
    by_format = {variant.weight_format: variant for variant in VARIANTS}
    assert quality.weight_loss(by_format["i4g"], SMALL, Q4_1) == 0.0
    assert quality.weight_loss(by_format["i4g"], SMALL, Q8_0) == pytest.approx(quality.WEIGHT_LOSS["i4g"])
    assert quality.weight_loss(by_format["i8g"], SMALL, Q8_0) == 0.0
    # The table is in the widest encoding of the file, so its Q8_0 says nothing about the projections.
    assert quality.weight_loss(by_format["i8g"], SMALL, Q4_1) == pytest.approx(quality.WEIGHT_LOSS["i8g"])
    half = {"Q4_1": WEIGHTS // 2, "Q5_1": WEIGHTS // 2, "Q8_0": TABLE, "F32": 61 * 576}
    assert quality.weight_loss(by_format["i4g"], SMALL, half) == pytest.approx(quality.WEIGHT_LOSS["i4g"] / 2)
    assert quality.weight_loss(by_format["f32"], SMALL, half) == 0.0
