"""Stop texts and streaming: nothing of a stop text is shown, nothing else is lost, characters stay whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dseek.engine.request import SamplingParams
from dseek.engine.text import TextAssembler
from tests.engine.fakes import FakeRunner, make_engine


def stream(stop: tuple[str, ...], pieces: list[str]) -> tuple[list[str], bool]:
    assembler = TextAssembler(stop)
    taken = []
    for piece in pieces:
        stopped = assembler.push(piece)
        taken.append(assembler.take())
        if stopped:
            return taken, True
    assembler.flush()
    taken.append(assembler.take())
    return taken, False


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=5), max_size=8),
)
def test_text_ends_before_the_first_stop_text(stop: list[str], pieces: list[str]) -> None:
    taken, stopped = stream(tuple(stop), pieces)
    joined = "".join(pieces)
    # The first piece after which any stop text is in the text decides; of several, the one that begins first.
    expected, seen = joined, ""
    for piece in pieces:
        seen += piece
        ends = [position for position in map(seen.find, stop) if position >= 0]
        if ends:
            expected = seen[: min(ends)]
            break
    assert "".join(taken) == expected
    assert stopped == (any(text in joined for text in stop))


def test_only_what_may_become_a_stop_text_is_held_back() -> None:
    assert stream(("END",), ["an E", "N", "x", "E", "NDless"])[0] == ["an ", "", "ENx", "", ""]
    assert stream((), ["a", "b"])[0] == ["a", "b", ""]
    assert stream(("ab",), ["xa"])[0] == ["x", "a"]


def test_text_after_a_stop_text_is_dropped() -> None:
    assembler = TextAssembler(("b",))
    assert assembler.push("abc")
    assert assembler.push("d")
    assembler.flush()
    assert assembler.text == "a"


@pytest.mark.parametrize(
    ("stop", "text", "reason"), [((), "a€🙂z", "stop"), (("🙂",), "a€", "stop"), (("zz",), "a€🙂z", "stop")]
)
def test_streamed_pieces_are_whole_characters(stop: tuple[str, ...], text: str, reason: str) -> None:
    runner = FakeRunner()
    runner.script, runner.prompt_tokens = "a€🙂z".encode(), 1
    engine = make_engine(runner)
    request = engine.add([1], SamplingParams(stop=stop))
    pieces = []
    while engine.has_work:
        engine.step()
        pieces.append(request.take_text())
    output = request.output()
    assert "".join(pieces) == output.text == text
    assert output.finish_reason == reason
    assert "\ufffd" not in output.text


def test_half_a_character_at_the_end_is_replaced_not_lost() -> None:
    runner = FakeRunner()
    runner.script, runner.prompt_tokens = "a€".encode()[:-1], 1
    engine = make_engine(runner)
    request = engine.add([1], SamplingParams())
    while engine.has_work:
        engine.step()
    assert request.output().text == "a\ufffd"


def test_a_stop_text_inside_the_flushed_rest_still_counts() -> None:
    runner = FakeRunner()
    runner.script, runner.prompt_tokens = b"ab" + b"\xe2", 1
    engine = make_engine(runner)
    request = engine.add([1], SamplingParams(stop=("\ufffd",)))
    while engine.has_work:
        engine.step()
    assert request.output().text == "ab"
    assert request.output().finish_reason == "stop"
