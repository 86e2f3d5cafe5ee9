"""Streams for threads and asyncio over one engine: the same tokens as alone, aborts, failures, and an orderly end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from dseek.core.errors import NotFiniteError, RequestError
from dseek.engine.async_engine import AsyncEngine, EngineStoppedError
from dseek.engine.batch import Batch
from dseek.engine.engine import Engine
from dseek.engine.request import SamplingParams
from dseek.engine.stream import Stream
from tests.engine.fakes import FakeRunner, make_engine
from tests.engine.test_engine import PROMPTS, alone

LONG = SamplingParams(max_new_tokens=200, ignore_eos=True)


@pytest.fixture
def opened() -> Iterator[AsyncEngine]:
    engine = AsyncEngine(make_engine())
    yield engine
    engine.close()
    assert not engine.engine.has_work
    assert engine.engine.allocator.num_free == engine.engine.allocator.num_pages


def token_ids(stream: Stream) -> tuple[int, ...]:
    return tuple(token_id for delta in stream for token_id in delta.token_ids)


def test_streams_in_a_loop_give_what_requests_alone_give(opened: AsyncEngine) -> None:
    params = SamplingParams(max_new_tokens=20, temperature=1.1, seed=3)

    async def read(prompt: list[int]) -> tuple[tuple[int, ...], str, str | None]:
        token_ids, text, reason = (), "", None
        async for delta in opened.submit(prompt, params):
            token_ids, text, reason = token_ids + delta.token_ids, text + delta.text, delta.finish_reason
        return token_ids, text, reason

    async def read_all() -> list[tuple[tuple[int, ...], str, str | None]]:
        return await asyncio.gather(*map(read, PROMPTS))

    answers = asyncio.run(read_all())
    assert [answer for answer, _, _ in answers] == [alone(prompt, params) for prompt in PROMPTS]
    for answer, text, reason in answers:
        assert text == bytes(i for i in answer if i < 256).decode("utf-8", "replace")
        assert reason in ("stop", "length")


def test_many_threads_submit_and_read(opened: AsyncEngine) -> None:
    params = SamplingParams(max_new_tokens=12)
    answers: dict[int, tuple[int, ...]] = {}

    def read(index: int) -> None:
        answers[index] = token_ids(opened.submit(PROMPTS[index], params))

    threads = [threading.Thread(target=read, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[index] for index in range(len(PROMPTS))] == [alone(prompt, params) for prompt in PROMPTS]
    stats = opened.stats()
    assert (stats.running, stats.waiting, stats.error) == (0, 0, None)
    assert stats.generated_tokens == sum(map(len, answers.values()))
    assert stats.prefill_rows + stats.saved_tokens + len(PROMPTS) >= sum(map(len, PROMPTS))
    assert stats.steps > 0 and stats.tokens_s > 0


class Held(FakeRunner):
    """Waits before its third step until `go` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def forward(self, batch: Batch) -> np.ndarray:
        if len(self.batches) == 2:
            self.go.wait()
        return super().forward(batch)


def test_leaving_a_loop_or_cancelling_a_task_aborts() -> None:
    runner = Held()
    opened = AsyncEngine(make_engine(runner))

    async def leave() -> None:
        streams = [opened.submit([1, 2], LONG) for _ in range(3)]
        async for _ in streams[0]:
            break

        async def read(stream: Stream) -> None:
            async for _ in stream:
                pass

        task = asyncio.create_task(read(streams[1]))
        await asyncio.sleep(0)
        task.cancel()
        async with streams[2]:
            pass
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    runner.go.set()
    for _ in opened.submit([3], LONG):
        break
    opened.call(lambda engine: None).result()  # the aborts were left before it
    assert opened.stats().running == opened.stats().waiting == 0
    assert opened.engine.allocator.num_free == opened.engine.allocator.num_pages
    opened.close()


def test_an_aborted_stream_ends_for_its_reader(opened: AsyncEngine) -> None:
    stream = opened.submit([1, 2], LONG)
    opened.abort(stream)
    assert [delta.finish_reason for delta in stream][-1] in ("abort", "length")
    opened.abort(stream)


def test_bad_prompts_are_refused_where_they_are_submitted(opened: AsyncEngine) -> None:
    with pytest.raises(RequestError, match="out of range"):
        opened.submit([9999], LONG)


def test_calls_come_between_steps(opened: AsyncEngine) -> None:
    stream = opened.submit([1, 2], LONG)
    assert opened.call(lambda engine: len(list(engine.logits([1, 2, 3])))).result() == 1
    with pytest.raises(ZeroDivisionError):
        opened.call(lambda engine: 1 // 0).result()
    assert token_ids(stream) == alone([1, 2], LONG)


def test_requests_wait_for_pages_that_a_text_holds() -> None:
    opened = AsyncEngine(make_engine(FakeRunner(num_pages=10)))

    def begin(engine: Engine) -> Iterator[tuple[int, np.ndarray]]:
        text = engine.logits(list(range(40)))
        next(text)
        return text

    text = opened.call(begin).result()
    stream = opened.submit([1, 2], SamplingParams(max_new_tokens=5, ignore_eos=True))
    assert opened.call(lambda engine: engine.allocator.num_free).result() == 0
    assert opened.stats().waiting == 1
    opened.call(lambda engine: text.close()).result()  # type: ignore[attr-defined]
    assert len(token_ids(stream)) == 5
    opened.close()


class Poisoned(FakeRunner):
    """Gives NaN after the token 99."""

    def logits_after(self, history: np.ndarray) -> np.ndarray:
        return super().logits_after(history) * (np.nan if 99 in history else 1)


def test_a_request_that_is_not_finite_fails_alone() -> None:
    engine = AsyncEngine(make_engine(Poisoned()))
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    good, bad = engine.submit([1, 2], params), engine.submit([1, 99], params)
    with pytest.raises(NotFiniteError, match="after token 1 are not finite"):
        token_ids(bad)
    assert len(token_ids(good)) == 4
    engine.close()
    assert engine.engine.allocator.num_free == engine.engine.allocator.num_pages


def test_a_runner_that_fails_ends_everything_with_one_error() -> None:
    class Broken(FakeRunner):
        def forward(self, batch: Batch) -> np.ndarray:
            if len(self.batches) == 3:
                raise OSError("the device is gone")
            return super().forward(batch)

    engine = AsyncEngine(make_engine(Broken()))
    streams = [engine.submit([1, 2], LONG) for _ in range(3)]
    for stream in streams:
        with pytest.raises(EngineStoppedError, match="OSError: the device is gone"):
            token_ids(stream)
    with pytest.raises(EngineStoppedError, match="the device is gone"):
        engine.submit([1], LONG)
    assert "the device is gone" in str(engine.stats().error)
    engine.close()


def test_closing_drains_or_aborts() -> None:
    params = SamplingParams(max_new_tokens=5, ignore_eos=True)
    runner = Held()
    engine = AsyncEngine(make_engine(runner))
    stream = engine.submit([1, 2], params)
    threading.Timer(0.05, runner.go.set).start()
    engine.close(drain_s=60)
    assert len(token_ids(stream)) == 5
    with pytest.raises(EngineStoppedError, match="closed"):
        engine.submit([1], params)
    engine.close()

    runner = Held()
    engine = AsyncEngine(make_engine(runner))
    stream = engine.submit([1, 2], params)
    threading.Timer(0.05, runner.go.set).start()
    engine.close()
    assert list(stream)[-1].finish_reason == "abort"


def test_deltas_that_wait_are_joined() -> None:
    engine = make_engine()
    stream = Stream(engine.add([1, 2], SamplingParams(max_new_tokens=3, ignore_eos=True)), lambda stream: None)
    for _ in range(3):
        engine.step()
        assert stream.push() == 1
    (delta,) = list(stream)
    assert (len(delta.token_ids), delta.finish_reason) == (3, "length")
