"""The sampler against Hugging Face's logits processors, its distribution, and its independence of the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dseek.core.errors import RequestError
from dseek.engine.request import SamplingParams
from dseek.engine.sampler import Sampler, distribution

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.9, "top_k": 7},
    {"temperature": 1.0, "top_k": 10_000},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 2.5, "top_p": 0.5},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.4, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
]


def random_logits(seed: int, vocab_size: int = 1000) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(vocab_size) * 3).astype(np.float32)


def ours(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    ids, weights = distribution(logits, params)
    probabilities = np.zeros(len(logits))
    probabilities[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    return probabilities


def theirs(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    import torch
    from transformers.generation import logits_process as hf

    scores = torch.from_numpy(logits)[None]
    ids = torch.zeros((1, 1), dtype=torch.long)
    scores = hf.TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = hf.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = hf.TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p > 0:
        scores = hf.MinPLogitsWarper(params.min_p)(ids, scores)
    return scores.softmax(-1)[0].double().numpy()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_distribution_equals_transformers(setting: dict[str, Any]) -> None:
    params = SamplingParams(**setting)
    for seed in range(5):
        logits = random_logits(seed)
        expected = theirs(logits, params)
        actual = ours(logits, params)
        assert ((actual > 0) == (expected > 0)).all()
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-9)


def test_equal_logits_at_the_edges() -> None:
    logits = np.zeros(10, dtype=np.float32)
    ids, _ = distribution(logits, SamplingParams(temperature=1.0, top_p=0.35))
    assert ids is not None
    assert ids.tolist() == [0, 1, 2, 3]
    ids, _ = distribution(logits, SamplingParams(temperature=1.0, top_k=3))
    assert ids is not None
    assert len(ids) == 10  # As in transformers, equals of the k-th stay.


def test_repetition_penalty_equals_transformers() -> None:
    import torch
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = random_logits(1)
    seen = [3, 9, 9, 500]
    sampler = Sampler(SamplingParams(repetition_penalty=1.7))
    for extra in ([], [4], [4, int(logits.argmax())]):
        history = seen + extra
        expected = RepetitionPenaltyLogitsProcessor(1.7)(
            torch.tensor([history]), torch.from_numpy(logits)[None].clone()
        )
        assert sampler.choose(logits, history) == int(expected.argmax())


def test_greedy_is_the_first_of_the_largest_and_changes_nothing() -> None:
    logits = np.array([1, 5, 5, 2], dtype=np.float32)
    for params in (SamplingParams(), SamplingParams(repetition_penalty=1.01), SamplingParams(temperature=1, top_k=1)):
        before = logits.copy()
        assert Sampler(params).choose(logits, [3]) in (1, 2)
        np.testing.assert_array_equal(logits, before)
    assert Sampler(SamplingParams()).choose(logits, []) == 1


def test_draws_follow_the_distribution() -> None:
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=3)
    logits = random_logits(2, vocab_size=12)
    sampler = Sampler(params)
    draws = [sampler.choose(logits, []) for _ in range(20_000)]
    np.testing.assert_allclose(np.bincount(draws, minlength=12) / 20_000, ours(logits, params), atol=0.015)


def test_a_seed_decides_whatever_is_beside() -> None:
    logits = np.stack([random_logits(seed) for seed in range(4)])
    params = SamplingParams(temperature=1.0, seed=11)

    alone = Sampler(params)
    expected = [alone.choose(logits[2], [1]) for _ in range(10)]
    crowd = [Sampler(params) for _ in range(4)]
    answers = [[sampler.choose(row, [1]) for sampler, row in zip(crowd, logits, strict=True)] for _ in range(10)]
    assert [answer[2] for answer in answers] == expected
    assert len(set(expected)) > 1
    other = Sampler(SamplingParams(temperature=1.0, seed=12))
    assert [other.choose(logits[2], []) for _ in range(10)] != expected


def test_no_seed_gives_fresh_answers() -> None:
    logits = random_logits(0) * 0
    params = SamplingParams(temperature=1.0)
    draws = [tuple(sampler.choose(logits, []) for _ in range(8)) for sampler in (Sampler(params), Sampler(params))]
    assert draws[0] != draws[1]


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1, top_k=2)]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(params: SamplingParams, bad: float) -> None:
    with pytest.raises(RequestError, match="logit"):
        Sampler(params).choose(np.array([0, bad, 1], dtype=np.float32), [])
    with pytest.raises(RequestError, match="logit"):
        Sampler(params).choose(np.full(3, -np.inf, dtype=np.float32), [])


def test_some_tokens_may_be_forbidden_by_minus_infinity() -> None:
    logits = np.array([-np.inf, 1, -np.inf], dtype=np.float32)
    for params in (SamplingParams(), SamplingParams(temperature=0.5), SamplingParams(temperature=1.0, top_p=0.5)):
        assert Sampler(params).choose(logits, []) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("logit_bias", ((1, 101.0),)),
        ("logprobs", 21),
        ("seed", -1),
        ("seed", 2**63),
        ("max_new_tokens", 0),
        ("stop", ("",)),
        ("stop", "text"),
    ],
)
def test_bad_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} is "):
        SamplingParams(**{name: value})


def test_stop_texts_need_text() -> None:
    with pytest.raises(RequestError, match="stop"):
        SamplingParams(stop=("x",), detokenize=False)


def test_bias_presence_and_frequency_are_those_of_the_interface() -> None:
    logits = random_logits(3, vocab_size=12)
    text = [0, 1, 5, 5, 7]
    params = SamplingParams(
        presence_penalty=0.5, frequency_penalty=-0.25, logit_bias=((1, 2.0), (9, -100.0), (99, 1.0))
    )
    sampler = Sampler(params, num_prompt_tokens=2)
    for length in range(2, len(text) + 1):  # it follows a text that grows
        changed = sampler._changed(logits, text[:length])
    expected = logits.copy()
    expected[1] += 2
    expected[9] -= 100
    expected[5] -= 0.5 - 2 * 0.25
    expected[7] -= 0.5 - 0.25
    np.testing.assert_allclose(changed, expected, atol=1e-5)
    assert sampler.choose(logits, text) == int(expected.argmax())
    assert Sampler(SamplingParams(logit_bias=((4, 100.0),))).choose(logits, []) == 4
