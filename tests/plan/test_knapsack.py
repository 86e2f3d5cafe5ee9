"""The knapsack behind mixed precision against an exact solver, and against every assignment of small cases."""

from __future__ import annotations

import itertools
import random

import pytest

from dseek.plan import mixing, quality
from dseek.plan.formats import ROLES, VARIANTS
from dseek.plan.mixing import Option, choose
from dseek.plan.weights import uniform
from tests.plan.machines import MIDDLING

Places = dict[tuple[int, str], list[Option]]

FORMATS = ("f16", "bf16", "i8g", "i8c", "i4g")


def drawn(num_places: int, seed: int) -> Places:
    """Places whose formats lose about ten times as much from one to the next, and cost less, mostly."""
    order = random.Random(seed)
    places: Places = {}
    for index in range(num_places):
        size = order.choice((0.5, 1.0, 3.0))
        loss = size * 10 ** order.uniform(-5, -4)
        entries: list[Option] = []
        for step, name in enumerate(FORMATS):
            entries.append((loss * 4**step * order.uniform(0.5, 2), size * (5 - step) * order.uniform(0.8, 1.2), name))
        places[index // 4, ROLES[index % 4]] = entries
    return places


def exact(places: Places, accepted_loss: float) -> float:
    """Least cost, by the list of all sums of loss and cost that no other one beats in both (Nemhauser and Ullmann)."""
    sums = [(0.0, 0.0)]
    for entries in places.values():
        grown = sorted((loss + a, cost + b) for loss, cost in sums for a, b, _ in entries if loss + a <= accepted_loss)
        sums, least = [], float("inf")
        for loss, cost in grown:
            if cost < least:
                sums.append((loss, cost))
                least = cost
    return sums[-1][1]


def cost_of(places: Places, chosen: dict[tuple[int, str], str]) -> tuple[float, float]:
    """Loss and cost of a choice."""
    taken = [next(e for e in entries if e[2] == chosen[place]) for place, entries in places.items()]
    return sum(e[0] for e in taken), sum(e[1] for e in taken)


def limits(places: Places) -> tuple[float, float]:
    """Least and largest loss."""
    return sum(min(entries)[0] for entries in places.values()), sum(max(entries)[0] for entries in places.values())


@pytest.mark.parametrize("seed", range(4))
def test_the_exact_solver_is_exact(seed: int) -> None:
    places = drawn(5, seed)
    least, largest = limits(places)
    accepted = least + 0.2 * (largest - least)
    every = itertools.product(*places.values())
    best = min(sum(e[1] for e in taken) for taken in every if sum(e[0] for e in taken) <= accepted)
    assert exact(places, accepted) == pytest.approx(best)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.2, 0.6])
@pytest.mark.parametrize("seed", range(6))
def test_it_is_near_the_exact_one(seed: int, share: float) -> None:
    places = drawn(24, seed)
    least, largest = limits(places)
    accepted = least + share * (largest - least)
    chosen = choose(places, accepted)
    assert chosen is not None
    loss, cost = cost_of(places, chosen)
    best = exact(places, accepted)
    assert loss <= accepted + 1e-9
    # The relaxed problem takes a part of the first step that does not fit: no choice is better than with all of it.
    largest_step = max(max(e[1] for e in entries) - min(e[1] for e in entries) for entries in places.values())
    assert best - 1e-9 <= cost <= best + largest_step
    # Of what the best one saves over the formats that lose least.
    widest = sum(min(entries)[1] for entries in places.values())
    assert widest - cost >= 0.9 * (widest - best)


def test_it_takes_more_than_two_formats_where_that_pays() -> None:
    places = drawn(24, 1)
    least, largest = limits(places)
    chosen = choose(places, least + 0.1 * (largest - least))
    assert chosen is not None
    assert len(set(chosen.values())) > 2
    accepted = cost_of(places, chosen)[0]
    for pair in itertools.combinations(FORMATS, 2):
        two = {place: [e for e in entries if e[2] in pair] for place, entries in places.items()}
        fewer = choose(two, accepted)
        if fewer is not None:
            assert cost_of(two, fewer)[1] > cost_of(places, chosen)[1]


def test_nothing_fits_or_everything_does() -> None:
    places = drawn(8, 3)
    least, largest = limits(places)
    assert choose(places, 0.99 * least) is None
    chosen = choose(places, largest)
    assert chosen is not None
    assert cost_of(places, chosen)[1] == pytest.approx(sum(min(e[1] for e in entries) for entries in places.values()))


def test_a_mixture_of_a_model_counts_what_its_tables_lose() -> None:
    losses = quality.prior_losses(MIDDLING, {"BF16": MIDDLING.num_parameters()})
    tables = {"i8g": 0.003}
    bits = {"i4g": 4.5, "i8c": 8, "i8g": 8.5, "bf16": 16, "f16": 16, "f32": 32}
    weights = [uniform(variant, MIDDLING, losses, tables) for variant in VARIANTS]
    home = weights[-2]
    assert home.loss == pytest.approx(0.005)

    def price(of: object) -> float:
        return sum(bits[name] for layer in of.layer_formats for name in layer.by_role().values())  # type: ignore[attr-defined]

    mixture = mixing.mix(home, weights, losses, 0.02, price)
    assert mixture is not None
    assert mixture.table_format == home.table_format
    assert mixture.loss <= 0.02
    assert mixture.loss == pytest.approx(quality.total_loss(mixture.layer_formats, losses) + 0.003)
    assert mixing.mix(home, weights, losses, 0.0029, price) is None
