"""`dseek plan --show-attention`: the picture, its figures, the notices, and what is refused."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dseek.cli.main import main
from dseek.engine.llm import load
from tests.models import tiny
from tests.plan.machines import machine

SOURCE = Path(argparse.__file__).read_text()[:2500]
DYNAMIC = ["--attention", "dynamic", "--attention-window", "64", "--attention-top-blocks", "2"]
BY_ROWS = ("--attention", "dynamic", "--attention-window", "64", "--attention-min-share", "0.05")


@pytest.fixture(autouse=True)
def made_up_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up machine, so that nothing is measured."""
    from dseek.cli import measuring

    for name in ("DSEEK_PRECISION_MODE", "DSEEK_NUM_THREADS", "DSEEK_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(measuring, "load_or_measure", lambda **_: machine(with_torch=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama for long texts."""
    path = tiny.save("llama", tmp_path_factory.mktemp("models") / "tiny")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 4096}))
    return path


def pixels(path: Path) -> np.ndarray:
    """The picture's dots, [height, width, 3 or 4]; fails if it is no PNG."""
    from matplotlib.image import imread

    return imread(path, format="png")


def has_colour(picture: np.ndarray, colour: str) -> bool:
    """Whether an area, and not just the rim of a letter, has a colour, #rrggbb."""
    wanted = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return int((np.abs(picture[:, :, :3] - wanted).max(-1) < 0.002).sum()) > 3000


def test_picture_and_summary(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "picture.png"
    options = [*DYNAMIC, "--attention-far", "--show-attention", SOURCE, "--picture", str(path)]
    assert main(["plan", str(folder), *options]) == 0
    captured = capsys.readouterr()
    last = captured.out.splitlines()[-1]
    assert last.startswith(f"{path}: head 0 of layers 0, 1 keeps ") and "by means" in last and "of its pairs" in last
    assert captured.err == ""
    picture = pixels(path)
    for colour in ("#0072b2", "#e69f00", "#cc79a7"):
        assert has_colour(picture, colour), colour
    assert not has_colour(picture, "#dcdcdc"), "with means, nothing is left out"


def test_json_has_the_plan_and_the_figures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(SOURCE)
    command = ["plan", str(folder), *DYNAMIC, "--json", "--layer", "1", "--head", "3", "--save", "plan.json"]
    assert main([*command, "--show-attention", "@text.txt"]) == 0
    printed = json.loads(capsys.readouterr().out)
    shown = printed.pop("shown_attention")
    assert printed == json.loads((tmp_path / "plan.json").read_text())
    (layer,) = shown["layers"]
    assert (shown["picture"], shown["head"], layer["layer"], layer["chosen_by"]) == ("attention.png", 3, 1, "mean keys")
    assert layer["attention"] == "window 64 and 2 blocks"
    with load(str(folder), plan=str(tmp_path / "plan.json")) as llm:
        num_tokens = len(llm.files.tokenizer().encode(SOURCE))
    assert shown["prompt_tokens"] == num_tokens
    assert layer["dense_pairs"] == num_tokens * (num_tokens + 1) // 2
    assert layer["pairs_skipped"] == shown["pairs_skipped"] == 1 - layer["pairs"] / layer["dense_pairs"]
    assert 0.1 < shown["mass_kept"] < 0.999 and shown["mass_in_means"] == 0.0
    assert has_colour(pixels(tmp_path / "attention.png"), "#dcdcdc")


def test_stdin_and_a_dense_plan(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("@a short text"))
    path = tmp_path / "dense.PNG"
    command = ["plan", str(folder), "--json", "--show-attention", "-", "--picture", str(path)]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "dense in every layer drawn" in captured.err and "--attention dynamic" in captured.err
    shown = json.loads(captured.out)["shown_attention"]
    assert (shown["pairs_skipped"], shown["mass_kept"]) == (0.0, pytest.approx(1.0, abs=1e-5))
    assert len(pixels(path)) > 100


def test_the_gate_beside_the_model_is_followed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    gated = Path(shutil.copytree(folder, tmp_path / "gated"))
    options = ["--tokens", "1280", "--samples", "1", "--passes", "1", "--gate-dim", "16"]
    assert main(["train-gate", str(gated), "--text", argparse.__file__, "--out", str(tmp_path / "out"), *options]) == 0
    capsys.readouterr()
    kept = []
    for expected in ("mean keys", "gate"):
        command = ["plan", str(gated), *BY_ROWS, "--json", "--show-attention", SOURCE]
        assert main([*command, "--picture", str(tmp_path / "p.png")]) == 0
        shown = json.loads(capsys.readouterr().out)["shown_attention"]
        assert {layer["chosen_by"] for layer in shown["layers"]} == {expected}
        kept.append([layer["mass_kept"] for layer in shown["layers"]])
        shutil.copy(tmp_path / "out" / "gate.safetensors", gated)
    assert kept[0] != kept[1], "the gate chooses like the mean keys"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--show-attention", "text", "--layer", "0,2"], "needed: 0 to 1, the model's layers"),
        (["--show-attention", "text", "--head", "4"], "needed: 0 to 3, the model's query heads"),
        (["--show-attention", SOURCE, "--context", "256"], "the 256 of the plan's context; to do: shorten it"),
        (["--show-attention", ""], "the prompt has 0 tokens"),
        (["--show-attention", "@none.txt"], "none.txt cannot be read"),
        (["--show-attention", "@latin.txt"], "latin.txt is not text"),
        (["--show-attention", "text", "--picture", "a.pdf"], "needed: the name of a .png file"),
        (["--show-attention", "text", "--picture", "latin.txt/a.png"], "cannot be written to latin.txt"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(
    folder: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert main(["plan", str(folder), *DYNAMIC, *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dseek: error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["latin.txt"]


@pytest.mark.parametrize("text", ["-1", "x", "0,,1", "1.5"])
def test_layers_that_are_no_indices(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "m", f"--layer={text}"])
    assert caught.value.code == 2
    assert "not a whole number of at least 0" in capsys.readouterr().err


def test_matplotlib_is_asked_for_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plan", "no-such-model", "--show-attention", "text"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dseek.cli import attention_picture

    def fail(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(attention_picture, "to_png", fail)
    path = tmp_path / "old.png"
    path.write_bytes(b"old")
    assert main(["plan", str(folder), "--show-attention", "text", "--picture", str(path)]) == 130
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_options_without_effect_warn(caplog: pytest.LogCaptureFixture) -> None:
    from dseek.cli.show_attention import check_options

    check_options(argparse.Namespace(show_attention=None, layer=(0,), head=0, picture=None))
    assert [record.getMessage() for record in caplog.records] == [
        f"--{name} has no effect without --show-attention" for name in ("layer", "head")
    ]
