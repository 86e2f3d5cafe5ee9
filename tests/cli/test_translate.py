"""`dseek translate`: as many lines out as in, JSON, and the user's errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dseek.cli.main import main
from tests.models.tiny_marian import SENTENCES, tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("marian")
    tiny_folder(path)
    return path


@pytest.mark.native
def test_as_many_lines_out_as_in(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "in.txt", tmp_path / "out.txt"
    text.write_text(f"{SENTENCES[0]}\n\n{SENTENCES[1]}\n", encoding="utf-8")
    shown = {}
    for precision in ("fp32", "int8"):
        assert main(["translate", str(folder), "--text", str(text), "--precision", precision]) == 0
        shown[precision] = capsys.readouterr().out
        lines = shown[precision].split("\n")
        assert len(lines) == 4 and lines[0] and not lines[1] and lines[2] and not lines[3]
    assert main(["translate", str(folder), "--text", str(text), "--batch", "1", "--out", str(out)]) == 0
    assert capsys.readouterr().out == "" and out.read_text(encoding="utf-8") == shown["fp32"]
    assert main(["translate", str(folder), "--text", str(text), "--json", "--max-tokens", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [pair["source"] for pair in found["lines"]] == [SENTENCES[0], "", SENTENCES[1]]
    assert found["precision"] == "fp32"


def test_errors_of_the_user(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, empty, binary = tmp_path / "in.txt", tmp_path / "empty.txt", tmp_path / "binary"
    text.write_text("dog\n" + "dog " * 100 + "\n")
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe")
    for arguments, says in (
        ([str(folder), "--text", str(text)], "line 2"),
        ([str(folder), "--text", str(empty)], "empty"),
        ([str(folder), "--text", str(binary)], "UTF-8"),
        ([str(folder), "--text", str(tmp_path / "no")], "cannot be read"),
        ([str(tmp_path / "no"), "--text", str(text)], "no folder"),
        ([str(tmp_path), "--text", str(text)], "config.json is missing"),
    ):
        assert main(["translate", *arguments]) == 2
        assert says in capsys.readouterr().err
