"""Texts of the rows: the split of the standard library, joined sequences, the user's prose, needles in haystacks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks import needles, prose, standard_library
from benchmarks.errors import BenchmarkError
from benchmarks.prepare import recall
from benchmarks.prepare import standard_library as printing


def test_files_are_parted_by_their_path_alone(tmp_path: Path) -> None:
    names = [f"package{number % 7}/module{number}.py" for number in range(400)]
    for name in [*names, "test/test_ast.py", "idlelib/idle_test/mock.py", "site-packages/numpy/core.py"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    (tmp_path / "empty.py").touch()
    assert standard_library.source_files(tmp_path) == sorted(names)
    training, held_out = standard_library.training_files(tmp_path), standard_library.held_out_files(tmp_path)
    assert sorted(training + held_out) == sorted(names) and not set(training) & set(held_out)
    assert 0.10 < len(held_out) / len(names) < 0.20
    for name in names[::2]:
        (tmp_path / name).unlink()
    assert set(standard_library.held_out_files(tmp_path)) == set(held_out) & set(names[1::2])


def test_split_stays_what_gates_were_trained_with() -> None:
    held_out = [name for name in ("argparse.py", "ast.py", "enum.py", "subprocess.py", "asyncio/tasks.py", "typing.py")
                if standard_library.is_held_out(name)]  # fmt: skip
    assert held_out == ["enum.py", "subprocess.py", "asyncio/tasks.py"]


def test_training_files_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    printing.main(["--training"])
    training = capsys.readouterr().out.splitlines()
    printing.main(["--held-out"])
    held_out = capsys.readouterr().out.splitlines()
    assert all(Path(path).is_file() for path in training + held_out)
    assert str(standard_library.root() / "argparse.py") in training
    assert str(standard_library.root() / "enum.py") in held_out
    with pytest.raises(SystemExit):
        printing.main([])


def test_order_depends_on_the_seed_alone() -> None:
    names = [str(number) for number in range(30)]
    assert standard_library.shuffled(reversed(names), 1) == standard_library.shuffled(names, 1) != names
    assert standard_library.shuffled(names, 2) != standard_library.shuffled(names, 1)


def test_whole_files_are_joined_and_serve_one_sequence() -> None:
    files = [[1] * 3, [2] * 4, [3] * 9, [4] * 2, [5] * 2]
    assert standard_library.joined(files, 5, 2) == [[1, 1, 1, 2, 2], [3] * 5]
    assert files[0] == [1] * 3
    with pytest.raises(BenchmarkError, match="fill 2 sequences of 5 tokens, 3 are needed"):
        standard_library.joined(files, 5, 3)


def _records(*records: dict[str, str]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_articles_are_joined_and_the_longest_comes_first(tmp_path: Path) -> None:
    text = _records(
        {"title": "short", "context": "one"},
        {"title": "long", "context": "first part"},
        {"title": "long", "context": "second part"},
        {"title": "long", "context": "first part"},
    )
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    for path in (plain, packed):
        assert list(prose.articles(path).items()) == [("long", "first part\nsecond part"), ("short", "one")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "x"}\n', "line 1, has no text in `context`"),
        (b"[]\n", "line 1"),
        (b"{", "JSON lines"),
        (b"\xff", "JSON lines"),
    ],
)
def test_unusable_prose_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(BenchmarkError, match=message):
        prose.articles(path)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"context": "x"}\n' * 999)[:20])
    with pytest.raises(BenchmarkError, match="cannot be read"):
        prose.articles(packed)


def test_prose_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(prose.PROSE_VARIABLE, raising=False)
    with pytest.raises(BenchmarkError, match="set BENCHMARKS_PROSE to a file of JSON lines"):
        prose.prose_path()
    monkeypatch.setenv(prose.PROSE_VARIABLE, str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(BenchmarkError, match="cannot be read"):
        prose.articles(prose.prose_path())


def test_needles_differ_and_their_question_begins_their_sentence() -> None:
    drawn = needles.make_needles(9, 0)
    assert drawn == needles.make_needles(9, 0) != needles.make_needles(9, 1)
    assert len({needle.name for needle in drawn}) == 9
    for needle in drawn:
        assert needle.sentence == needle.question + needle.answer + "."
        assert needle.code.isdigit() and len(needle.code) == needles.CODE_DIGITS


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.24, 20), (0.5, 40), (0.74, 60), (0.95, 93), (1.0, 93)])
def test_needle_lies_between_lines_at_its_depth(depth: float, place: int) -> None:
    haystack, breaks = list(range(1000, 1200)), list(range(0, 200, 20))
    prompt = needles.hide(haystack, breaks, [1, 2, 3], [4, 5, 6, 7], num_tokens=100, depth=depth)
    assert len(prompt) == 100 and prompt[-4:] == [4, 5, 6, 7]
    assert prompt[place : place + 3] == [1, 2, 3]
    assert prompt[:place] + prompt[place + 3 : -4] == haystack[:93]


def test_short_haystack_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="a haystack of 50 tokens, 93 are needed"):
        needles.hide([0] * 50, [], [1] * 3, [2] * 4, num_tokens=100, depth=0.5)


def test_every_third_piece_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source.py"
    # Every line is there once: one that is found again was repeated.
    source.write_text("\n".join(f"line number {number} of the only source" for number in range(20_000)))
    assert recall.main([str(source), "--out", str(tmp_path / "texts"), "--texts", "2"]) == 0
    first, second = (path.read_text() for path in sorted((tmp_path / "texts").iterdir()))
    assert first != second
    for text in (first, second):
        lines = text.splitlines()
        assert len(text) >= recall.MIN_CHARACTERS and 0.25 < 1 - len(set(lines)) / len(lines) < 0.45
    source.write_text("too short\n")
    assert recall.main([str(source), "--out", str(tmp_path / "none")]) == 2
    assert "no file has more than" in capsys.readouterr().err
