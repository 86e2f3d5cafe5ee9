"""What the typical request is, and that plans and predictions are made for it."""

from __future__ import annotations

import dataclasses

import pytest

from dseek.core.errors import ConfigError
from dseek.plan import Objective, make
from tests.plan.machines import MIDDLING, SMALL, machine

Q8_0 = {"Q8_0": SMALL.num_parameters()}


@pytest.mark.parametrize(
    ("stated", "context", "expected"),
    [
        ({}, 8192, (512, 128)),
        ({}, 600, (512, 88)),
        ({}, 256, (255, 1)),
        ({"prompt_tokens": 4000}, 8192, (4000, 128)),
        ({"answer_tokens": 7000}, 7200, (200, 7000)),
        ({"context_tokens": 8192}, 8192, (8064, 128)),
        ({"context_tokens": 640}, 640, (512, 128)),
        ({"context_tokens": 100}, 100, (80, 20)),
        ({"context_tokens": 2}, 2, (1, 1)),
        ({"context_tokens": 1}, 1, (1, 1)),
        ({"context_tokens": 8192, "answer_tokens": 1000}, 8192, (7192, 1000)),
        ({"context_tokens": 8192, "prompt_tokens": 512}, 8192, (512, 128)),
        ({"context_tokens": 8192, "prompt_tokens": 8190}, 8192, (8190, 2)),
        ({"context_tokens": 8192, "prompt_tokens": 100, "answer_tokens": 50}, 8192, (100, 50)),
    ],
)
def test_request(stated: dict[str, int], context: int, expected: tuple[int, int]) -> None:
    assert Objective(**stated).request(context) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "stated",
    [
        {"prompt_tokens": 8192},
        {"answer_tokens": 9000},
        {"context_tokens": 1000, "prompt_tokens": 900, "answer_tokens": 101},
    ],
)
def test_a_stated_request_that_does_not_fit(stated: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="typical request") as caught:
        make(SMALL, machine(), Objective(**stated), encodings=Q8_0)  # type: ignore[arg-type]
    assert "--prompt-tokens" in str(caught.value)


def test_predictions_are_for_the_context_that_was_stated() -> None:
    encodings = {"BF16": MIDDLING.num_parameters()}
    short = make(MIDDLING, machine(), Objective(batch=1), encodings=encodings, precision="bf16")
    long = make(MIDDLING, machine(), Objective(batch=1, context_tokens=16384), encodings=encodings, precision="bf16")
    assert (short.objective.prompt_tokens, short.objective.answer_tokens) == (512, 128)
    assert (long.objective.prompt_tokens, long.objective.answer_tokens) == (16256, 128)
    assert long.predicted == long.predict(machine(), prompt_tokens=16256, context_tokens=16256, batch=1)
    assert long.predicted.decode_tokens_s < short.predicted.decode_tokens_s


def test_a_long_context_is_worth_a_narrow_cache() -> None:
    """Attention is most of a decode step there; on this machine it takes a fifth less with an int8 cache."""
    attentions = [
        dataclasses.replace(
            curve,
            seconds=tuple(0.8 * value for value in curve.seconds),
            warm_seconds=tuple(0.8 * value for value in curve.warm_seconds),
        )
        if curve.cache_dtype == "int8"
        else curve
        for curve in machine().attentions
    ]
    here = dataclasses.replace(machine(), attentions=tuple(attentions))
    chosen = {
        context: make(
            MIDDLING,
            here,
            Objective(batch=1, context_tokens=context),
            encodings={"Q8_0": MIDDLING.num_parameters()},
            precision="int8",
        ).cache_dtype
        for context in (512, 65536)
    }
    assert chosen == {512: "bf16", 65536: "int8"}
