"""Guesses of prompt lookup: the same answers in fewer steps, and an end of guessing where it does not pay."""

from __future__ import annotations

import numpy as np
import pytest

from dseek.core.errors import ConfigError
from dseek.engine.engine import Engine, EngineOptions
from dseek.engine.lookup import PAUSE_TOKENS, DraftState, Speculator
from dseek.engine.request import Request, SamplingParams
from dseek.engine.step_clock import StepClock
from tests.engine.fakes import VOCAB_SIZE, FakeRunner, make_engine
from tests.engine.test_engine import PROMPTS, run_all
from tests.engine.test_paging import check_pages

SAMPLINGS = [
    SamplingParams(max_new_tokens=40, ignore_eos=True),
    SamplingParams(max_new_tokens=40, temperature=0.7, seed=9, ignore_eos=True),
    SamplingParams(max_new_tokens=40, temperature=0.9, top_p=0.8, repetition_penalty=1.1, seed=1),
]


class Repeating(FakeRunner):
    """A model of few words: mostly the last two tokens decide, sometimes the whole history."""

    def logits_after(self, history: np.ndarray) -> np.ndarray:
        self.seen = history
        if len(history) % 11 == 0:
            return super().logits_after(history)
        logits = np.random.default_rng(history[-2:] % 5).standard_normal(VOCAB_SIZE) * 4
        return logits.astype(np.float32)


def answers(engine: Engine, params: SamplingParams, prompts: list[list[int]] = PROMPTS) -> list[tuple[int, ...]]:
    return run_all(engine, [engine.add(prompt, params) for prompt in prompts])


@pytest.mark.parametrize("params", SAMPLINGS)
def test_answers_are_those_without_guesses_in_fewer_steps(params: SamplingParams) -> None:
    plain = make_engine(Repeating(num_pages=200))
    expected = answers(plain, params)
    for most, num_pages in ((1, 200), (5, 200), (5, 40)):
        engine = make_engine(Repeating(num_pages=num_pages), speculate=most)
        requests = [engine.add(prompt, params) for prompt in PROMPTS]
        while engine.has_work:
            engine.step()
            check_pages(engine)
        assert [request.output().token_ids for request in requests] == expected
        counters = engine.counters
        assert counters.generated_tokens == sum(map(len, expected))
        assert 0 < counters.accepted_tokens < counters.drafted_tokens
        assert counters.steps < plain.counters.steps or num_pages == 40
        assert engine.allocator.num_free == num_pages


def test_a_guess_that_ends_the_answer_ends_it() -> None:
    runner = FakeRunner()
    runner.script, runner.prompt_tokens = b"abcabcabc.", 3
    engine = make_engine(runner, speculate=8)
    request = engine.add([1, 2, 3], SamplingParams(stop=("ca",)))
    run_all(engine, [request])
    output = request.output()
    assert (output.text, output.finish_reason) == ("ab", "stop")
    request = engine.add([1, 2, 3], SamplingParams(max_new_tokens=7))
    run_all(engine, [request])
    assert bytes(request.output().token_ids) == b"abcabca"
    assert engine.counters.accepted_tokens > 0


def test_drafts_follow_the_longest_and_latest_match() -> None:
    def guess(text: str, most: int = 4) -> str:
        return bytes(DraftState(4).guess(list(text.encode()), most)).decode()

    assert guess("the cat sat. the ca") == "t sa"
    assert guess("xab1 yab2 zab") == "2 za"  # of two matches of two, the latest
    assert guess("xab1 yab2 xab") == "1 ya"  # but a longer one before it
    assert guess("ababab") == "abab"  # goes on with itself
    assert guess("abcdef") == guess("a") == guess("xbyb") == guess("ab ab", 0) == ""


def test_a_draft_state_follows_a_text_that_grows() -> None:
    state, text = DraftState(4), [1, 2, 3]
    assert state.guess(text, 3) == []
    text += [7, 1, 2]
    assert state.guess(text, 3) == [3, 7, 1]
    text += [*range(100, 300), 1, 2, 3]
    assert state.guess(text, 2) == [7, 1]


def test_guessing_pauses_where_it_is_wrong_or_dear() -> None:
    engine = make_engine()
    request = engine.add([1, 2, 1, 2], SamplingParams(max_new_tokens=100))
    speculator = Speculator(4, None)
    request.drafts = speculator.draft(request, 9, 1)
    assert request.drafts == [1, 2, 1, 2]
    tries = 0
    while (drafts := speculator.draft(request, 9, 1)) and tries < 20:
        request.drafts = drafts
        speculator.learn(request, 0)
        tries += 1
    assert 2 < tries < 12 and len(drafts) == 0
    request.token_ids += [1, 2] * (PAUSE_TOKENS // 2)
    assert len(speculator.draft(request, 9, 1)) == 1  # one at a time, until one is right

    # One row of sixty costs as much as a step: it does not pay, unless hardly any answers share the step.
    dear = Speculator(4, StepClock(answers_s=1.0, row_s=0.3))
    request.draft_state = None
    assert dear.draft(request, 9, 2)
    assert not dear.draft(request, 9, 4)


def test_drafts_leave_the_last_token_and_the_rows_of_others_alone() -> None:
    engine = make_engine()
    request = engine.add([1, 2, 1, 2], SamplingParams(max_new_tokens=3))
    assert Speculator(8, None).draft(request, 9, 1) == [1, 2]
    engine = make_engine(Repeating(num_pages=200), speculate=50, prefill_chunk_tokens=12, max_batch=6)
    answers(engine, SAMPLINGS[0])
    assert engine.counters.accepted_tokens > 0
    assert max(batch.num_rows for batch in engine.runner.batches) <= 12  # type: ignore[attr-defined]


def test_numbers_that_are_not_finite_count_only_where_a_guess_was_right() -> None:
    class Poisoned(Repeating):
        def logits_after(self, history: np.ndarray) -> np.ndarray:
            logits = super().logits_after(history) * (np.nan if 250 in history[3:] else 1)
            logits[250] = np.minimum(logits[250], -99)  # only a guess says it
            return logits

    prompt = [1, 2, 250, 5, 1, 2]
    plain = make_engine(Poisoned())
    expected = answers(plain, SAMPLINGS[0], [prompt])

    class Wrong(Speculator):
        def draft(self, request: Request, limit: int, num_answers: int) -> list[int]:
            return [250]

    engine = make_engine(Poisoned(), speculate=4)
    engine.scheduler.speculator = Wrong(4, None)
    assert answers(engine, SAMPLINGS[0], [prompt]) == expected
    assert engine.counters.drafted_tokens > 30 and engine.counters.accepted_tokens == 0


def test_an_impossible_draft_length_is_refused() -> None:
    for speculate in (-1, 65):
        with pytest.raises(ConfigError, match="speculate is"):
            EngineOptions(speculate=speculate)
