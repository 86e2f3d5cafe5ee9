"""Fronts: nothing on them is bettered, everything off them is, and the choice is allowed."""

from __future__ import annotations

import pytest

from dseek.plan.attention_wish import AttentionWish
from dseek.plan.candidates import Wishes
from dseek.plan.head_facts import HeadFacts
from dseek.plan.objective import Objective
from dseek.plan.pareto import FrontPoint, explore, judge
from dseek.plan.pareto_plot import pareto_svg
from tests.plan.machines import MIDDLING, machine


def _better(one: FrontPoint, other: FrontPoint) -> bool:
    mine = (one.seconds, one.memory_bytes, one.quality_loss)
    theirs = (other.seconds, other.memory_bytes, other.quality_loss)
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def _wishes(**changes: object) -> Wishes:
    values: dict[str, object] = {
        "model": "m",
        "precision": "auto",
        "cache_dtype": None,
        "num_threads": None,
        "prefill_chunk_tokens": None,
        "kernels": None,
        "attention": AttentionWish(),
        "heads": HeadFacts(),
    }
    return Wishes(**{**values, **changes})  # type: ignore[arg-type]


def test_a_small_front_by_hand() -> None:
    entries = [
        ("a", 1.0, 10.0, 0.1),
        ("b", 2.0, 5.0, 0.0),
        ("c", 2.5, 6.0, 0.0),
        ("d", 1.02, 10.0, 0.0),
        ("e", 9.0, 1.0, 0.5),
    ]
    found = {point.name: point for point in judge(entries, memory_limit_bytes=20, max_quality_loss=0.2)}
    assert {name for name, point in found.items() if point.on_front} == {"a", "b", "d", "e"}
    assert found["d"].is_chosen  # a tie with a, and loses less
    assert found["c"].why == "no better in anything than b"
    assert "loses 50 % of quality" in found["e"].why
    assert "takes 1.96 times as long, saves 5 B" in found["b"].why
    tight = judge(entries, memory_limit_bytes=0.5, max_quality_loss=1.0)
    assert not any(point.is_chosen for point in tight)
    assert all("of memory" in point.why or "no better" in point.why for point in tight)


def test_the_front_of_a_model_on_a_machine() -> None:
    points = explore(MIDDLING, machine(), Objective(), {"BF16": MIDDLING.num_parameters()}, _wishes())
    front = [point for point in points if point.on_front]
    assert not [1 for one in points for other in front if _better(one, other)]
    for other in (point for point in points if not point.on_front):
        assert any(
            one.seconds <= other.seconds
            and one.memory_bytes <= other.memory_bytes
            and one.quality_loss <= other.quality_loss
            for one in front
        )
    (chosen,) = (point for point in points if point.is_chosen)
    assert chosen.quality_loss <= 0.005
    assert any("int4+" in point.name for point in front)  # mixtures are part of the space
    assert all(point.why for point in points)
    drawing = pareto_svg(points, "a < b")
    assert drawing.count("<circle") == len(points) + 4
    assert "a &lt; b" in drawing


def test_what_is_asked_for_narrows_the_space() -> None:
    wishes = _wishes(precision="int8", cache_dtype="bf16", num_threads=2, prefill_chunk_tokens=256)
    points = explore(MIDDLING, machine(), Objective(kind="throughput", batch=4), {"BF16": 1}, wishes)
    assert points
    assert all(point.name.startswith("int8") and "cache bf16; 2 threads; chunk 256" in point.name for point in points)


def test_no_point_is_an_empty_front() -> None:
    with pytest.raises(ValueError):
        pareto_svg([], "none")
    assert judge([], memory_limit_bytes=1, max_quality_loss=1) == []
