"""Pages that are shared, taken on demand and given back: answers are those given alone, and no page is lost."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dseek.engine.engine import Engine
from dseek.engine.prefix_cache import PrefixCache
from dseek.engine.request import Request, SamplingParams
from tests.engine.fakes import FakeRunner, make_engine
from tests.engine.test_engine import alone, run_all

BEGINNING = list(range(40, 60))
"""Five pages that prompts share."""


def check_pages(engine: Engine) -> None:
    """Every page is free, kept, or held exactly as often as it is counted; a name stands for what the page holds."""
    allocator, prefixes = engine.allocator, engine.prefixes
    held = Counter(page for request in engine.scheduler.running for page in request.pages)
    assert [held[page] for page in range(allocator.num_pages)] == allocator._uses
    free, idle = Counter(allocator._free), set(allocator._idle)
    assert max(free.values(), default=1) == 1 and not idle & set(free) and not (idle | set(free)) & set(held)
    assert len(free) + len(idle) + len(held) == allocator.num_pages
    assert all(not request.pages for request in engine.scheduler.waiting)
    if prefixes is None:
        assert not idle and not allocator._kept
        return
    assert set(prefixes._of_page) == allocator._kept and len(prefixes._nodes) == len(prefixes._of_page)
    for name, node in prefixes._nodes.items():
        assert node.parent is None or prefixes._of_page[node.parent.page] is node.parent
        assert node.parent is None or name in node.parent.children
        cached = engine.runner.cache[node.page]  # type: ignore[attr-defined]
        assert cached.astype("int32").tobytes() == node.tokens
    assert {id(owner) for owner in prefixes._under_way.values()} <= set(map(id, engine.scheduler.running))


REQUEST = st.tuples(
    st.integers(0, len(BEGINNING)),  # how much of the beginning
    st.lists(st.integers(0, 2), min_size=1, max_size=9),
    st.integers(1, 24),  # tokens of the answer
    st.integers(-1, 1),  # priority
    st.sampled_from([0.0, 1.2]),
)
OPERATION = st.one_of(
    st.tuples(st.just("add"), REQUEST),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("abort"), st.integers(0, 20)),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(OPERATION, min_size=4, max_size=30),
    st.sampled_from([13, 16, 30]),
    st.integers(1, 5),
    st.sampled_from([5, 16]),
)
def test_no_page_is_lost_and_no_answer_changes(
    operations: list[tuple[str, object]], num_pages: int, max_batch: int, chunk_tokens: int
) -> None:
    engine = make_engine(FakeRunner(num_pages=num_pages), max_batch=max_batch, prefill_chunk_tokens=chunk_tokens)
    asked: list[tuple[Request, list[int], SamplingParams]] = []
    for kind, value in operations:
        if kind == "add":
            shared, rest, num_tokens, priority, temperature = value  # type: ignore[misc]
            prompt = BEGINNING[:shared] + rest
            params = SamplingParams(max_new_tokens=num_tokens, temperature=temperature, seed=7, ignore_eos=True)
            asked.append((engine.add(prompt, params, priority=priority), prompt, params))
        elif kind == "step":
            for _ in range(value):  # type: ignore[call-overload]
                engine.step()
                check_pages(engine)
        elif asked:
            engine.abort(asked[value % len(asked)][0])  # type: ignore[operator]
            check_pages(engine)
    run_all(engine, [request for request, _, _ in asked])
    check_pages(engine)
    assert engine.allocator.num_free == num_pages
    for request, prompt, params in asked:
        output = request.output()
        expected = alone(prompt, params)
        if output.finish_reason == "abort":
            assert output.token_ids == expected[: len(output.token_ids)]
        else:
            assert output.token_ids == expected[: 4 * num_pages - len(prompt)]


def test_a_prompt_that_begins_alike_computes_only_the_rest() -> None:
    engine = make_engine()
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    first = engine.add([*BEGINNING, 1], params)
    run_all(engine, [first])
    assert engine.counters.saved_tokens == first.num_cached_tokens == 0
    rows = engine.counters.prefill_rows
    second = engine.add([*BEGINNING, 2, 3], params)
    assert run_all(engine, [second]) == [alone([*BEGINNING, 2, 3], params)]
    assert engine.counters.saved_tokens == second.num_cached_tokens == len(BEGINNING)
    assert engine.counters.prefill_rows == rows + 2
    # The very same prompt of whole pages computes its last page again, for the logits.
    third = engine.add(BEGINNING, params)
    assert run_all(engine, [third]) == [alone(BEGINNING, params)]
    assert third.num_cached_tokens == len(BEGINNING) - 4
    # A conversation goes on from its answer.
    answer = list(third.output().token_ids)
    fourth = engine.add([*BEGINNING, *answer, 9], params)
    run_all(engine, [fourth])
    assert fourth.num_cached_tokens == len(BEGINNING)


def test_without_the_prefix_cache_everything_is_computed() -> None:
    engine = make_engine(prefix_cache=False)
    params = SamplingParams(max_new_tokens=1)
    for _ in range(2):
        run_all(engine, [engine.add(BEGINNING, params)])
    assert (engine.counters.saved_tokens, engine.counters.prefill_rows) == (0, 2 * len(BEGINNING))
    assert engine.allocator.num_cached == 0


def test_samples_of_one_prompt_compute_it_once() -> None:
    engine = make_engine()
    prompt = [*BEGINNING, 1, 2]
    kinds = [SamplingParams(max_new_tokens=5, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(4)]
    requests = [engine.add(prompt, params) for params in kinds]
    assert run_all(engine, requests) == [alone(prompt, params) for params in kinds]
    assert engine.counters.prefill_rows == len(prompt) + 3 * 2


def test_the_least_recently_used_page_goes_first_and_ends_before_beginnings() -> None:
    engine = make_engine(FakeRunner(num_pages=12))
    params = SamplingParams(max_new_tokens=1)
    for first in (1, 2):  # four full pages each, and one for the last token that is not
        run_all(engine, [engine.add([first] * 17, params)])
    run_all(engine, [engine.add([1] * 17, params)])
    run_all(engine, [engine.add([3] * 21, params)])  # five new pages: three of the second prompt's, from its end

    def found(first: int) -> int:
        request = engine.make_request([first] * 17, params)
        return len(engine.prefixes.match(request) or [])  # type: ignore[union-attr]

    assert found(1) == 4
    assert 0 < found(2) < 4


def test_a_hit_is_believed_only_for_these_tokens_after_these_pages() -> None:
    engine = make_engine()
    params = SamplingParams(max_new_tokens=1)
    run_all(engine, [engine.add(BEGINNING, params)])
    request = engine.make_request(BEGINNING, params)
    prefixes = engine.prefixes
    assert prefixes is not None and len(prefixes.match(request) or []) == 4
    for node in prefixes._nodes.values():
        node.tokens = bytes(16)
    assert prefixes.match(request) == []
    other = PrefixCache(make_engine().allocator)
    assert other._full_page(engine.make_request(BEGINNING, params), 0)[0] != request.full_pages[0][0]


def test_the_youngest_gives_way_and_goes_on_as_before() -> None:
    params = SamplingParams(max_new_tokens=24, temperature=1.3, seed=2, ignore_eos=True)
    prompts = [[first] * 6 for first in range(4)]
    for prefix_cache in (True, False):
        engine = make_engine(FakeRunner(num_pages=12), prefix_cache=prefix_cache)
        requests = [engine.add(prompt, params) for prompt in prompts]
        ended: list[int] = []
        said = [0] * 4
        while engine.has_work:
            for request in engine.step():
                said[request.request_id] += len(request.take_tokens()[0])
                if request.finished:
                    ended.append(request.request_id)
            check_pages(engine)
        assert engine.counters.preemptions > 0
        assert [request.output().token_ids for request in requests] == [alone(prompt, params) for prompt in prompts]
        assert said == [24] * 4 and ended[0] == 0
        assert (engine.counters.saved_tokens > 0) == prefix_cache


def test_a_higher_priority_takes_the_place_of_a_lower_one() -> None:
    engine = make_engine(max_batch=2)
    params = SamplingParams(max_new_tokens=10, ignore_eos=True)
    usual = [engine.add([first] * 5, params) for first in (1, 2)]
    for _ in range(3):
        engine.step()
    urgent = engine.add([3] * 5, params, priority=-1)
    late = engine.add([4] * 5, params, priority=1)
    engine.step()
    assert [request.request_id for request in engine.scheduler.running] == [2, 0]
    order = []
    while engine.has_work:
        order += [request.request_id for request in engine.step() if request.finished]
    assert order == [0, 2, 1, 3]
    for request, first in zip([*usual, urgent, late], (1, 2, 3, 4), strict=True):
        assert request.output().token_ids == alone([first] * 5, params)


def test_pages_of_numbers_that_are_not_finite_are_not_found_again() -> None:
    from tests.engine.test_async_engine import Poisoned

    engine = make_engine(Poisoned())
    engine.isolates_failures = True
    prompt = [99, *BEGINNING]
    request = engine.add(prompt, SamplingParams())
    run_all(engine, [request])
    assert request.output().finish_reason == "error"
    assert engine.allocator.num_cached == 0 and engine.allocator.num_free == engine.allocator.num_pages


@pytest.mark.parametrize("num_pages", [1, 2])
def test_one_request_may_fill_the_whole_cache(num_pages: int) -> None:
    engine = make_engine(FakeRunner(num_pages=num_pages))
    params = SamplingParams(max_new_tokens=99, ignore_eos=True)
    requests = [engine.add([first], params) for first in (1, 2)]
    for answer, first in zip(run_all(engine, requests), (1, 2), strict=True):
        assert answer == alone([first], params)[: 4 * num_pages - 1]
