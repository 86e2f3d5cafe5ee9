"""Precision by layer: what is narrowed, what is kept wide, and when a mixture is a candidate at all."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from dseek.core.errors import ConfigError
from dseek.plan import Objective, Plan, make, mixing, quality
from dseek.plan.chooser import TIE
from dseek.plan.explain import Alternative, Choice
from dseek.plan.formats import ROLES, VARIANTS, LayerFormats
from dseek.plan.weights import Weights, formats_text, uniform
from tests.plan.machines import MIDDLING, SMALL, machine

BF16 = {"BF16": MIDDLING.num_parameters()}
BY_FORMAT = {variant.weight_format: variant for variant in VARIANTS}
WRITING = Objective(batch=1, context_tokens=1024, prompt_tokens=64)
"""Decoding counts, so that narrower weights pay."""


def planned(loss: float, **wishes: object) -> Plan:
    objective = dataclasses.replace(WRITING, max_quality_loss=loss)
    return make(MIDDLING, machine(), objective, encodings=BF16, model="m", **wishes)  # type: ignore[arg-type]


def choice(plan: Plan) -> Choice:
    return next(entry for entry in plan.choices if entry.name == "precision and cache")


def taken(plan: Plan) -> Alternative:
    return next(entry for entry in choice(plan).alternatives if not entry.rejected)


def bytes_of(weights: Weights) -> float:
    """A price: bits of each projection, all of one size."""
    bits = {"i4g": 4, "i8g": 8, "i8c": 8, "bf16": 16}
    return float(sum(bits[name] for layer in weights.layer_formats for name in layer.by_role().values()))


@pytest.mark.parametrize("loss", [0.02, 0.05, 0.1, 0.15])
def test_a_mixture_keeps_the_loss_and_is_faster_than_what_else_does(loss: float) -> None:
    plan = planned(loss)
    assert plan.precision == "mixed"
    assert taken(plan).quality_loss <= loss + 1e-9
    for entry in choice(plan).alternatives:
        if entry.quality_loss <= loss and "+" not in entry.value:
            assert TIE * entry.decode_tokens_s < taken(plan).decode_tokens_s
    found = {name for layer in plan.layer_formats for name in layer.by_role().values()}
    assert len(found) == 2
    told = quality.total_loss(plan.layer_formats, quality.prior_losses(MIDDLING, BF16))
    assert told + quality.cache_loss(plan.cache_dtype) == pytest.approx(taken(plan).quality_loss)


def test_more_accepted_loss_makes_it_faster() -> None:
    rates = [planned(loss).predicted.decode_tokens_s for loss in (0.005, 0.02, 0.05, 0.1, 0.2)]
    assert rates == sorted(rates)
    assert rates[-1] > 1.2 * rates[0]
    assert planned(0.2).precision == "int4"


def test_no_mixture_beside_a_uniform_format_that_is_as_good() -> None:
    """Int4 is allowed with one cache and not with the other, where a mixture would be nearly all int4."""
    plan = planned(0.2)
    assert plan.precision == "int4"
    assert not any("+" in entry.value for entry in choice(plan).alternatives)


def test_it_is_told_in_counts() -> None:
    plan = planned(0.05)
    why = choice(plan).why
    assert "quality loss within 5 %: i" in why
    assert why.endswith(formats_text(plan.layer_formats))
    assert f"of {MIDDLING.num_layers} layers" in why


def test_the_plan_file_holds_the_formats_of_each_layer() -> None:
    plan = planned(0.05)
    assert Plan.from_json(plan.to_json()) == plan
    assert len(set(plan.layer_formats)) > 1


@pytest.mark.parametrize("precision", ["int8", "bf16", "int4"])
def test_a_precision_asked_for_is_not_mixed(precision: str) -> None:
    plan = planned(0.05, precision=precision)
    assert plan.precision == precision
    assert len(set(plan.layer_formats)) == 1
    assert not any("+" in entry.value for entry in choice(plan).alternatives)


def test_mixed_is_nothing_to_ask_for() -> None:
    with pytest.raises(ConfigError, match="one of auto, fp32, bf16, fp16, int8, int4"):
        planned(0.05, precision="mixed")


def test_a_4_bit_file_needs_no_mixture() -> None:
    weights = MIDDLING.num_layers * MIDDLING.num_block_parameters()
    encodings = {"Q4_1": weights, "Q8_0": MIDDLING.num_parameters() - weights}
    plan = make(MIDDLING, machine(), dataclasses.replace(WRITING, max_quality_loss=0.05), encodings=encodings)
    assert plan.precision == "int4"
    assert not any("+" in entry.value for entry in choice(plan).alternatives)


def test_no_mixture_that_is_hardly_better() -> None:
    """Half a percent leaves so little room beside int8 that the gain would be less than a tie."""
    plan = planned(0.005)
    assert plan.precision == "int8"
    assert not any("+" in entry.value for entry in choice(plan).alternatives)


@pytest.mark.parametrize("loss", [0.0006, 0.0025, 0.03, 0.1])
def test_the_objective_of_memory_counts_bytes(loss: float) -> None:
    objective = dataclasses.replace(WRITING, kind="memory", max_quality_loss=loss)
    plan = make(MIDDLING, machine(), objective, encodings=BF16)
    assert taken(plan).quality_loss <= loss + 1e-9
    mixtures = [entry for entry in choice(plan).alternatives if "+" in entry.value]
    assert mixtures
    for entry, other in itertools.product(mixtures, choice(plan).alternatives):
        if "+" not in other.value and other.quality_loss <= loss:
            assert other.peak_bytes > TIE * entry.peak_bytes


def test_a_mixture_may_be_what_fits_into_the_memory() -> None:
    whole = planned(0.05, precision="int8").predicted.peak_bytes
    objective = dataclasses.replace(WRITING, max_quality_loss=0.05, memory_limit_bytes=whole - 100_000_000)
    plan = make(MIDDLING, machine(), objective, encodings=BF16)
    assert plan.precision == "mixed"
    assert plan.predicted.peak_bytes <= whole - 100_000_000


def test_what_hurts_least_is_narrowed_first() -> None:
    losses = quality.prior_losses(SMALL, {"BF16": SMALL.num_parameters()})
    for role in ROLES:
        for layer in range(SMALL.num_layers):
            losses[layer, role, "i8g"] = 0.0
            losses[layer, role, "i4g"] = 0.01 if (layer, role) in ((3, "down"), (7, "qkv")) else 0.5
    wide, narrow = (uniform(BY_FORMAT[name], SMALL, losses) for name in ("i8g", "i4g"))
    mixture = mixing.mix(wide, [narrow], losses, 0.03, bytes_of)
    assert mixture is not None
    places = {
        (layer, role)
        for layer, formats in enumerate(mixture.layer_formats)
        for role, name in formats.by_role().items()
        if name == "i4g"
    }
    assert places == {(3, "down"), (7, "qkv")}
    assert (mixture.precision, mixture.loss) == ("mixed", pytest.approx(0.02))
    assert mixing.mix(wide, [narrow], losses, 0.009, bytes_of) is None
    assert mixing.mix(wide, [narrow], losses, 1e3, bytes_of) is None
    assert mixing.mix(wide, [narrow], losses, 0.03, lambda weights: 1.0) is None


def test_measured_losses_replace_the_prior() -> None:
    plan = planned(0.05)
    place = next(
        (layer, role)
        for layer, formats in enumerate(plan.layer_formats)
        for role, name in formats.by_role().items()
        if name == "i4g"
    )
    other = planned(0.05, losses={(*place, "i4g"): 9.0})
    assert other.precision == "mixed"
    assert other.layer_formats[place[0]].by_role()[place[1]] != "i4g"
    harmless = {(layer, role, "i4g"): 0.0001 for layer in range(MIDDLING.num_layers) for role in ROLES}
    assert planned(0.01, losses=harmless).precision == "int4"


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({(22, "qkv", "i4g"): 0.1}, "layers 0 to 21"),
        ({(0, "value", "i4g"): 0.1}, "roles qkv, output"),
        ({(0, "qkv", "i3"): 0.1}, "weight format"),
        ({(0, "qkv", "i4g"): -0.1}, "fraction from 0"),
        ({(0, "qkv", "i4g"): math.nan}, "fraction from 0"),
    ],
)
def test_measured_losses_of_nothing(losses: dict[tuple[int, str, str], float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(0.05, losses=losses)


@pytest.mark.parametrize("shape", [SMALL, MIDDLING, dataclasses.replace(SMALL, num_layers=1)])
def test_the_prior_adds_up_to_the_loss_of_the_whole(shape: object) -> None:
    encodings = {"BF16": shape.num_parameters()}  # type: ignore[attr-defined]
    losses = quality.prior_losses(shape, encodings)  # type: ignore[arg-type]
    for variant in VARIANTS:
        whole = uniform(variant, shape, losses)  # type: ignore[arg-type]
        assert whole.loss == pytest.approx(quality.weight_loss(variant, shape, encodings))  # type: ignore[arg-type]
    assert all(loss >= 0 for loss in losses.values())


def test_counts_of_formats() -> None:
    one = LayerFormats.uniform("i8c")
    assert formats_text((one, one)) == "i8c"
    two = dataclasses.replace(one, down="i4g")
    assert formats_text((one, two, two)) == "i4g in down of 2 of 3 layers, i8c elsewhere"
    three = dataclasses.replace(two, qkv="i4g")
    assert formats_text((three, one, one)) == "i4g in qkv of 1 and down of 1 of 3 layers, i8c elsewhere"
