"""Perplexity and accuracy against plain arithmetic, and against a window by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dseek.core.errors import RequestError
from dseek.engine.evaluate import evaluate, score
from tests.engine.fakes import FakeRunner, make_llm


def by_hand(token_ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    runner = FakeRunner()
    likelihoods, right = [], []
    for position in range(1, len(token_ids)):
        logits = runner.logits_after(np.array(token_ids[:position])).astype(np.float64)
        likelihoods.append(logits[token_ids[position]] - math.log(np.exp(logits).sum()))
        right.append(int(logits.argmax()) == token_ids[position])
    return np.array(likelihoods), np.array(right)


def test_scores_equal_those_by_hand() -> None:
    llm = make_llm()
    greedy = llm.generate([[1, 2]], max_new_tokens=20, ignore_eos=True)[0].token_ids
    token_ids = [1, 2, *greedy, 5, 6, 7]
    likelihoods, right = score(llm, token_ids)
    expected, expected_right = by_hand(token_ids)
    np.testing.assert_allclose(likelihoods, expected, rtol=1e-5)
    np.testing.assert_array_equal(right, expected_right)
    assert right[1:21].all()


def test_every_token_but_the_first_is_predicted_once() -> None:
    llm = make_llm()
    token_ids = np.random.default_rng(0).integers(0, 256, 100).tolist()
    seen = []
    scores = evaluate(llm, token_ids, window_tokens=17, progress=lambda *state: seen.append(state))
    windows = [by_hand(token_ids[start : start + 17]) for start in range(0, 99, 16)]
    total = sum(likelihoods.sum() for likelihoods, _ in windows)
    assert scores.num_tokens == 99
    assert scores.num_windows == 7
    assert scores.perplexity == pytest.approx(math.exp(-total / 99), rel=1e-5)
    assert scores.accuracy == pytest.approx(sum(right.sum() for _, right in windows) / 99)
    assert [done for done, _, _ in seen] == [16, 32, 48, 64, 80, 96, 99]
    assert scores.tokens_s > 0


def test_what_cannot_be_scored_is_refused() -> None:
    llm = make_llm()
    with pytest.raises(RequestError, match="at least 2"):
        evaluate(llm, [1], window_tokens=10)
    with pytest.raises(RequestError, match="at least 2"):
        score(llm, [1])
    for window_tokens in (1, 257):
        with pytest.raises(RequestError, match="window"):
            evaluate(llm, [1, 2, 3], window_tokens=window_tokens)
    with pytest.raises(RequestError, match="out of range"):
        evaluate(llm, [1, 2, 300], window_tokens=3)
