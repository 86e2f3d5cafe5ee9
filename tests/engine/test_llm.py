"""The Python interface: prompts of every kind, streaming, chat, logits, and a clean engine whatever goes wrong."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from dseek.core.errors import ModelNotFoundError, RequestError
from dseek.engine.llm import load
from dseek.engine.request import SamplingParams
from tests.engine.fakes import EOS, FakeRunner, make_files, make_llm, make_plan


def scripted(text: str, prompt_tokens: int) -> FakeRunner:
    runner = FakeRunner()
    runner.script, runner.prompt_tokens = text.encode(), prompt_tokens
    return runner


def test_one_text_or_a_list_of_texts_or_of_ids() -> None:
    llm = make_llm()
    (text,) = llm.generate("abc", max_new_tokens=4)
    (ids,) = llm.generate([257, 97, 98, 99], max_new_tokens=4)
    both = llm.generate(["abc", "x"], max_new_tokens=4)
    arrays = llm.generate([np.array([257, 97, 98, 99]), [257, 120]], max_new_tokens=4)  # type: ignore[list-item]
    assert text.prompt_token_ids == (257, 97, 98, 99)
    assert text.token_ids == ids.token_ids == both[0].token_ids == arrays[0].token_ids
    assert both[1].token_ids == arrays[1].token_ids
    assert llm.generate([]) == []


def test_sampling_fields_replace_those_of_params() -> None:
    llm = make_llm()
    params = SamplingParams(max_new_tokens=9, ignore_eos=True)
    assert len(llm.generate("a", params, max_new_tokens=3)[0].token_ids) == 3
    assert len(llm.generate("a", params)[0].token_ids) == 9
    with pytest.raises(TypeError, match="max_tokens"):
        llm.generate("a", max_tokens=3)


def test_a_refused_prompt_refuses_the_whole_list() -> None:
    llm = make_llm()
    with pytest.raises(RequestError, match="fewer than the context's 256"):
        llm.generate(["a", "b" * 300])
    assert not llm.engine.has_work


def test_stream_gives_the_same_text_in_pieces() -> None:
    llm = make_llm(scripted("Salut, ça va?", 3))
    pieces = list(llm.stream("ab"))
    assert "".join(pieces) == "Salut, ça va?"
    assert len(pieces) == len("Salut, ça va?")
    assert llm.generate("ab")[0].text == "Salut, ça va?"


def test_leaving_a_stream_early_frees_its_pages() -> None:
    llm = make_llm()
    stream = llm.stream("ab", ignore_eos=True)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_work
    assert llm.engine.allocator.num_free == llm.engine.allocator.num_pages


def test_an_interrupt_leaves_the_engine_usable() -> None:
    class Interrupted(FakeRunner):
        def forward(self, batch):  # type: ignore[no-untyped-def]
            if len(self.batches) == 2:
                self.batches.append(batch)
                raise KeyboardInterrupt
            return super().forward(batch)

    llm = make_llm(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], ignore_eos=True)
    assert not llm.engine.has_work
    assert llm.generate("a", max_new_tokens=3)[0].token_ids == make_llm().generate("a", max_new_tokens=3)[0].token_ids


def test_chat_goes_through_the_template_without_a_second_start_token() -> None:
    messages = [{"role": "user", "content": "hi"}]
    prompt = b"<user>hi<assistant>"
    llm = make_llm(scripted("yo", len(prompt)))
    output = llm.chat(messages)
    assert output.prompt_token_ids == tuple(prompt)
    assert output.text == "yo"
    assert output.token_ids[-1] == EOS


def test_chat_without_a_template_is_refused() -> None:
    llm = make_llm()
    llm.files = make_files(chat_template=None)
    with pytest.raises(RequestError, match="no chat template"):
        llm.chat([{"role": "user", "content": "hi"}])


def test_logits_are_those_of_every_position() -> None:
    llm = make_llm()
    logits = llm.logits([1, 2, 3])
    assert logits.shape == (3, 258)
    assert logits.dtype == np.float32
    longer = llm.logits(list(range(40)))
    np.testing.assert_array_equal(longer[39], FakeRunner().logits_after(np.arange(40)))


def test_a_context_manager_closes_runner_and_files() -> None:
    closed = []
    runner = FakeRunner()
    from dseek.engine.llm import LLM

    with LLM(make_files(close=lambda: closed.append(True)), make_plan(runner), runner):
        pass
    assert runner.closed
    assert closed


@pytest.mark.parametrize("enabled", [True, False])
def test_loading_leaves_the_garbage_collector_as_it_was(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def open_nothing(name: str) -> None:
        seen.append(gc.isenabled())
        raise ModelNotFoundError(f"no {name}")

    monkeypatch.setattr("dseek.models.files.open_model", open_nothing)
    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ModelNotFoundError):
            load("model")
        assert (gc.isenabled(), seen) == (enabled, [False])
    finally:
        (gc.enable if was_enabled else gc.disable)()
