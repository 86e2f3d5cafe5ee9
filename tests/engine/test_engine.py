"""The loop: continuous batching, chunks, admission, ends, aborts, and what an engine refuses."""

from __future__ import annotations

import time

import numpy as np
import pytest

from dseek.core import events
from dseek.core.errors import RequestError
from dseek.engine.engine import Engine
from dseek.engine.request import Request, SamplingParams
from tests.engine.fakes import EOS, VOCAB_SIZE, FakeRunner, make_engine, make_files, make_plan

PROMPTS = [list(range(3, 3 + length)) for length in (1, 5, 40, 7, 23, 16, 17, 2, 33)]


def run_all(engine: Engine, requests: list[Request]) -> list[tuple[int, ...]]:
    while engine.has_work:
        engine.step()
    assert all(request.finished for request in requests)
    return [request.output().token_ids for request in requests]


def alone(prompt: list[int], params: SamplingParams) -> tuple[int, ...]:
    engine = make_engine()
    return run_all(engine, [engine.add(prompt, params)])[0]


@pytest.mark.parametrize("params", [SamplingParams(max_new_tokens=20), SamplingParams(temperature=1.3, seed=5)])
@pytest.mark.parametrize(("chunk_tokens", "max_batch"), [(16, 8), (5, 3), (1, 1), (1000, 9)])
def test_batched_answers_equal_those_given_alone(params: SamplingParams, chunk_tokens: int, max_batch: int) -> None:
    engine = make_engine(prefill_chunk_tokens=chunk_tokens, max_batch=max_batch)
    answers = run_all(engine, [engine.add(prompt, params) for prompt in PROMPTS])
    assert answers == [alone(prompt, params) for prompt in PROMPTS]
    assert engine.allocator.num_free == engine.allocator.num_pages


def test_requests_may_join_at_any_step() -> None:
    params = SamplingParams(max_new_tokens=9, ignore_eos=True)
    engine = make_engine()
    requests = []
    for prompt in PROMPTS:
        requests.append(engine.add(prompt, params))
        engine.step()
    assert run_all(engine, requests) == [alone(prompt, params) for prompt in PROMPTS]


def test_a_step_stays_within_its_rows_and_answers_never_wait() -> None:
    engine = make_engine(prefill_chunk_tokens=8, max_batch=4)
    first = engine.add([1, 2], SamplingParams(max_new_tokens=30, ignore_eos=True))
    engine.step()
    engine.add(list(range(60)), SamplingParams(max_new_tokens=2))
    before = first.num_tokens
    for _ in range(5):
        engine.step()
    assert first.num_tokens == before + 5
    assert [batch.num_rows for batch in engine.runner.batches[1:]] == [8] * 5  # type: ignore[attr-defined]


def test_an_answer_ends_at_the_end_token_the_length_or_the_context() -> None:
    runner = FakeRunner(num_pages=5, page_tokens=4)
    runner.script, runner.prompt_tokens = b"abc", 3
    engine = make_engine(runner)

    def answer(**sampling: object) -> tuple[str, str, tuple[int, ...]]:
        request = engine.add([1, 2, 3], SamplingParams(**sampling))  # type: ignore[arg-type]
        run_all(engine, [request])
        output = request.output()
        return output.finish_reason, output.text, output.token_ids

    assert answer() == ("stop", "abc", (97, 98, 99, EOS))
    assert answer(max_new_tokens=2) == ("length", "ab", (97, 98))
    reason, text, token_ids = answer(ignore_eos=True, max_new_tokens=999)
    assert (reason, text, len(token_ids)) == ("length", "abc", 20 - 3)


def test_timings_are_those_of_the_request() -> None:
    engine = make_engine()
    request = engine.add([1, 2, 3], SamplingParams(max_new_tokens=5, ignore_eos=True))
    run_all(engine, [request])
    output = request.output()
    assert output.first_token_s > 0
    assert output.decode_s > 0
    assert output.decode_tokens_s == pytest.approx(4 / output.decode_s)
    assert output.prefill_tokens_s == pytest.approx(3 / output.first_token_s)


def test_abort_frees_the_pages_of_running_and_waiting_requests() -> None:
    engine = make_engine(max_batch=1)
    running = engine.add([1] * 40, SamplingParams())
    waiting = engine.add([2], SamplingParams())
    engine.step()
    for request in (waiting, running, running):
        engine.abort(request)
    assert (running.output().finish_reason, waiting.output().finish_reason) == ("abort", "abort")
    assert engine.allocator.num_free == engine.allocator.num_pages
    assert not engine.has_work
    assert engine.step() == []


def test_an_engine_works_on_after_its_runner_raised() -> None:
    class Interrupted(FakeRunner):
        def forward(self, batch):  # type: ignore[no-untyped-def]
            if len(self.batches) == 3:
                self.batches.clear()
                raise KeyboardInterrupt
            return super().forward(batch)

    engine = make_engine(Interrupted())
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    request = engine.add([1, 2, 3], params)
    with pytest.raises(KeyboardInterrupt):
        run_all(engine, [request])
    engine.abort(request)
    other = make_engine()
    expected = run_all(other, [other.add([4, 5], SamplingParams(max_new_tokens=2))])
    assert run_all(engine, [engine.add([4, 5], SamplingParams(max_new_tokens=2))]) == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "no tokens"),
        ([1, VOCAB_SIZE], f"token id {VOCAB_SIZE} is out of range"),
        ([-1], "token id -1 is out of range"),
        ([1.5], "wrong kind"),
        (["a"], "wrong kind"),
        ([1] * 256, "the prompt has 256 tokens; needed: fewer than the context's 256"),
        ([1] * 9999, "the prompt has 9999 tokens"),
    ],
)
def test_bad_prompts_are_refused(prompt: list[int], message: str) -> None:
    engine = make_engine()
    with pytest.raises(RequestError, match=message):
        engine.add(prompt, SamplingParams())
    assert not engine.has_work


def test_the_longest_prompt_gets_one_token() -> None:
    engine = make_engine()
    (answer,) = run_all(engine, [engine.add(np.ones(255, dtype=np.int64), SamplingParams())])  # type: ignore[arg-type]
    assert len(answer) == 1


def test_logits_of_every_position_beside_running_requests() -> None:
    engine = make_engine()
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    request = engine.add([5, 6], params)
    engine.step()
    text = list(range(50))
    pieces = [(start, logits.copy()) for start, logits in engine.logits(text)]
    assert [start for start, _ in pieces] == [0, 16, 32, 48]
    logits = np.concatenate([piece for _, piece in pieces])
    for row in (0, 15, 16, 49):
        np.testing.assert_array_equal(logits[row], FakeRunner().logits_after(np.arange(row + 1)))
    assert run_all(engine, [request]) == [alone([5, 6], params)]


def test_logits_refuse_what_does_not_fit_and_free_their_pages() -> None:
    engine = make_engine()
    with pytest.raises(RequestError, match="at most the context"):
        next(engine.logits([1] * 257))
    started = engine.logits([1] * 256)
    next(started)
    with pytest.raises(RequestError, match="0 cache pages are free"):
        next(engine.logits([1]))
    started.close()
    assert engine.allocator.num_free == engine.allocator.num_pages


def test_a_context_beyond_the_cache_is_cut_to_it() -> None:
    runner = FakeRunner(num_pages=2)
    assert Engine(make_files(), make_plan(runner, context_tokens=999), runner).context_tokens == 8


def test_close_ends_everything() -> None:
    engine = make_engine()
    request = engine.add([1], SamplingParams())
    engine.close()
    engine.close()
    assert request.output().finish_reason == "abort"
    assert engine.runner.closed  # type: ignore[attr-defined]


def test_every_step_is_an_event() -> None:
    seen = []
    stop = events.subscribe("engine.step", lambda **fields: seen.append(fields))
    engine = make_engine()
    run_all(engine, [engine.add([1] * 20, SamplingParams(max_new_tokens=2, ignore_eos=True))])
    stop()
    assert seen == [{"num_rows": rows, "num_sequences": 1} for rows in (16, 4, 1)]


def test_the_loop_costs_little() -> None:
    """Well under 100 microseconds a step for one stream; the bound here is loose because tests share the machine."""

    class Instant(FakeRunner):
        logits = np.zeros((1, 49_152), dtype=np.float32)

        def forward(self, batch):  # type: ignore[no-untyped-def]
            return self.logits[: len(batch.logit_rows)]

    engine = make_engine(Instant(num_pages=64, page_tokens=64))
    engine.add([1], SamplingParams(max_new_tokens=3000, ignore_eos=True))
    durations = []
    for _ in range(2000):
        start_s = time.perf_counter()
        engine.step()
        durations.append(time.perf_counter() - start_s)
    assert sorted(durations)[200] < 200e-6
