"""`dseek checkpoint`: listing, verifying, restoring and cleaning up from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dseek.cli.main import main
from dseek.train.checkpoints import Checkpoint, CheckpointConfig, CheckpointWriter, chunks
from dseek.train.checkpoints.files import Files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three checkpoints."""
    writer = CheckpointWriter(CheckpointConfig(folder=tmp_path / "run"))
    for step in (1, 2, 3):
        writer.save(step, {"model": {"a.weight": torch.full((3, 2), step)}, "step": step}).wait()
    writer.close()
    return tmp_path / "run"


def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main(["checkpoint", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out or captured.err


def test_ls_and_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = _run(capsys, "ls", folder, "--json")
    assert status == 0 and [one["step"] for one in json.loads(out)["checkpoints"]] == [1, 2, 3]
    status, out = _run(capsys, "verify", folder)
    assert status == 0 and out.count("whole") == 3
    victim = next(iter(Checkpoint(folder, 2).parts[0].chunks))
    chunks.ChunkStore(folder / "chunks", Files()).path(victim).unlink()
    status, out = _run(capsys, "verify", folder, "--json")
    assert status == 1
    assert [one["is_whole"] for one in json.loads(out)["checkpoints"]] == [True, False, True]
    assert _run(capsys, "verify", folder, "--step", 3)[0] == 0


def test_restore(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.safetensors"
    assert _run(capsys, "restore", folder, "--out", out)[0] == 0
    assert torch.equal(load_file(out)["a.weight"], torch.full((3, 2), 3))
    assert _run(capsys, "restore", folder, "--out", out, "--step", 1, "--prefix", "")[0] == 0
    assert torch.equal(load_file(out)["model.a.weight"], torch.full((3, 2), 1))


def test_gc(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(_run(capsys, "gc", folder, "--json")[1])["freed_bytes"] == 0
    assert json.loads(_run(capsys, "gc", folder, "--keep-last", 1, "--json")[1])["freed_bytes"] > 0
    status, out = _run(capsys, "ls", folder)
    assert status == 0 and "step          3" in out and "step          2" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ls", "nowhere"), "is no folder"),
        (("restore", "."), "needs --out"),
        (("restore", "FOLDER", "--out", "x", "--step", "9"), "cannot be read"),
        (("restore", "FOLDER", "--out", "x", "--prefix", "optim"), "starts with 'optim'"),
        (("gc", "FOLDER", "--keep-last", "0"), "--keep-last is 0"),
    ],
)
def test_mistakes_are_told(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    status, out = _run(capsys, *(folder if argument == "FOLDER" else argument for argument in arguments))
    assert status == 2 and message in out
