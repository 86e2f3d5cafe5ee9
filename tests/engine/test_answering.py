"""Beside the tokens: log-probabilities, several samples, masks from a grammar, and embeddings."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from dseek.core.errors import RequestError
from dseek.engine.async_engine import AsyncEngine, EngineStoppedError
from dseek.engine.logprobs import token_logprobs
from dseek.engine.request import MAX_SEED, SamplingParams
from dseek.engine.token_filter import masked
from tests.engine.fakes import EOS, VOCAB_SIZE, FakeRunner, make_engine
from tests.engine.test_engine import run_all
from tests.engine.test_speculation import Repeating


def test_logprobs_are_those_of_the_softmax() -> None:
    logits = np.random.default_rng(0).standard_normal(50).astype(np.float32) * 5
    logits[[7, 9]] = logits.max() + 1
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    found = token_logprobs(logits, 3, 5)
    assert (found.token_id, found.logprob) == (3, pytest.approx(expected[3], abs=1e-5))
    order = np.argsort(-logits, kind="stable")[:5]
    assert [token_id for token_id, _ in found.top] == order.tolist() and order[:2].tolist() == [7, 9]
    assert [logprob for _, logprob in found.top] == pytest.approx(expected[order].tolist(), abs=1e-5)
    assert token_logprobs(logits, 3, 0).top == () and len(token_logprobs(logits, 3, 99).top) == 50


@pytest.mark.parametrize("speculate", [0, 4])
def test_every_token_has_its_logprobs(speculate: int) -> None:
    params = SamplingParams(max_new_tokens=30, temperature=0.8, seed=4, logprobs=3, top_k=5, ignore_eos=True)
    engine = make_engine(Repeating(), speculate=speculate)
    request = engine.add([1, 2, 3], params)
    pieces = []
    while not request.finished:
        engine.step()
        token_ids, logprobs = request.take_tokens()
        assert logprobs is not None and tuple(entry.token_id for entry in logprobs) == token_ids
        pieces += logprobs
    output = request.output()
    assert output.logprobs == tuple(pieces) and len(pieces) == 30
    text = [1, 2, 3]
    for token_id, entry in zip(output.token_ids, pieces, strict=True):
        assert entry == token_logprobs(Repeating().logits_after(np.array(text)), token_id, 3)
        text.append(token_id)
    plain = make_engine(Repeating())
    assert run_all(plain, [plain.add([1, 2, 3], params)]) == [output.token_ids]
    plain = make_engine()
    assert plain.add([1], SamplingParams()).output().logprobs is None


def test_samples_have_seeds_of_their_own() -> None:
    assert [params.seed for params in SamplingParams(seed=MAX_SEED).samples(3)] == [MAX_SEED, 0, 1]
    assert [params.seed for params in SamplingParams().samples(2)] == [None, None]


class Alternating:
    """Lets even and odd tokens follow in turn, and the end after six."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.taken: list[int] = []

    def mask(self, token_ids: Sequence[int]) -> np.ndarray | None:
        assert list(token_ids) == self.taken
        allowed = np.zeros(VOCAB_SIZE + 30, dtype=bool)
        if len(token_ids) == 6:
            allowed[EOS] = True
        else:
            allowed[len(token_ids) % 2 : EOS : 2] = True
        if self.kind == "bool":
            return allowed
        padded = np.zeros(-(-len(allowed) // 32) * 32, dtype=bool)
        padded[: len(allowed)] = allowed
        return np.packbits(padded, bitorder="little").view("<i4")

    def accept(self, token_id: int) -> None:
        self.taken.append(token_id)


@pytest.mark.parametrize("kind", ["bool", "bits"])
def test_a_filter_masks_every_token_with_guesses_too(kind: str) -> None:
    params = SamplingParams(max_new_tokens=20, temperature=1.0, seed=2, repetition_penalty=1.2, top_p=0.9)
    found = []
    for speculate in (0, 4):
        engine = make_engine(Repeating(), speculate=speculate, max_batch=1)
        token_filter = Alternating(kind)
        request = engine.add([4, 5, 6, 7], params, token_filter=token_filter)
        other = engine.add([9], params)
        run_all(engine, [request, other])
        answer = request.output().token_ids
        assert [token_id % 2 for token_id in answer[:6]] == [0, 1] * 3 and answer[6:] == (EOS,)
        assert token_filter.taken == list(answer)
        found.append((answer, other.output().token_ids))
    assert found[0] == found[1]


def test_masks_of_another_kind_are_refused() -> None:
    logits = np.zeros(40, dtype=np.float32)
    assert masked(logits, None) is logits
    assert np.isinf(masked(logits, np.array([1, 0], dtype=np.int32))).tolist() == [False] + [True] * 39
    assert np.isinf(masked(logits, np.array([-1, -1], dtype=np.int32))).sum() == 0
    for mask, message in (
        (np.ones(39, dtype=bool), "a mask of bool"),
        (np.ones(1, dtype=np.int32), "a mask of int32"),
        (np.ones(40, dtype=np.float32), "a mask of float32"),
        (np.zeros(40, dtype=bool), "no token pass"),
    ):
        with pytest.raises(RequestError, match=message):
            masked(logits, mask)


def test_a_filter_that_fails_ends_its_request_alone() -> None:
    class Failing(Alternating):
        def accept(self, token_id: int) -> None:
            raise KeyError("state")

    engine = AsyncEngine(make_engine())
    params = SamplingParams(max_new_tokens=5, ignore_eos=True)
    streams = [engine.submit([1, 2], params, token_filter=kind) for kind in (Failing("bool"), None)]
    with pytest.raises(RequestError, match="the token filter failed: KeyError"):
        list(streams[0])
    assert sum(len(delta.token_ids) for delta in streams[1]) == 5
    engine.close()
    engine.engine.isolates_failures = False
    engine.engine.add([1, 2], params, token_filter=Failing("bool"))
    with pytest.raises(RequestError, match="the token filter failed"):
        engine.engine.step()
    assert engine.engine.allocator.num_free == engine.engine.allocator.num_pages


def test_embeddings_pool_the_last_hidden_states() -> None:
    engine = make_engine()
    ids = list(range(10, 50))
    rows = np.stack([np.arange(40), ids, np.ones(40), np.cumsum(ids)], axis=1).astype(np.float64)
    mean = engine.embed(ids, normalise=False)
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(engine.embed(ids), rows.mean(axis=0) / np.linalg.norm(rows.mean(axis=0)), rtol=1e-6)
    np.testing.assert_allclose(engine.embed(ids, pooling="last", normalise=False), rows[-1])
    assert engine.allocator.num_free == engine.allocator.num_pages
    with pytest.raises(RequestError, match="pooling is 'max'"):
        engine.embed(ids, pooling="max")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="no tokens"):
        engine.embed([])


def test_embeddings_beside_streams() -> None:
    async def run() -> None:
        engine = AsyncEngine(make_engine(FakeRunner(num_pages=30)))
        params = SamplingParams(max_new_tokens=60, ignore_eos=True)
        streams = [engine.submit([first, 2], params) for first in (1, 3)]
        texts = [list(range(length)) for length in (100, 40, 7)]
        vectors = await asyncio.gather(*(asyncio.wrap_future(engine.embed(text)) for text in texts))
        for vector, text in zip(vectors, texts, strict=True):
            np.testing.assert_array_equal(vector, make_engine().embed(text))
        for stream, first in zip(streams, (1, 3), strict=True):
            alone = make_engine()
            answer = run_all(alone, [alone.add([first, 2], params)])[0]
            assert answer == tuple([token_id async for delta in stream for token_id in delta.token_ids])
        with pytest.raises(RequestError, match="no tokens"):
            await asyncio.wrap_future(engine.embed([]))
        engine.close()
        assert engine.engine.allocator.num_free == 30
        with pytest.raises(EngineStoppedError):
            engine.embed([1])

    asyncio.run(run())


def test_a_text_takes_pages_from_the_request_that_matters_least() -> None:
    engine = make_engine(FakeRunner(num_pages=10))
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    requests = [engine.add([first] * 6, params) for first in (1, 2)]
    engine.step()
    engine.embed(list(range(32)))
    assert engine.counters.preemptions == 1
    expected = make_engine()
    answers = run_all(engine, requests)
    assert answers == run_all(expected, [expected.add([first] * 6, params) for first in (1, 2)])
