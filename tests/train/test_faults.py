"""Faults as values: texts, drawing by seed, each strikes once, and what a damaged or full disk does to checkpoints."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import namespaces
from dseek.core.errors import ConfigError, FileFormatError
from dseek.train import faults
from dseek.train.checkpoints import Checkpoint, CheckpointConfig, CheckpointError, CheckpointWriter, newest
from dseek.train.faults import Fault, parse
from dseek.train.injection import FullDisk, Injector, damage, struck


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kill:1@2", Fault(kind="kill", rank=1, step=2)),
        ("exit:0@12", Fault(kind="exit", rank=0, step=12)),
        ("stop:1@2", Fault(kind="stop", rank=1, step=2)),
        ("stop:1@2:0.25", Fault(kind="stop", rank=1, step=2, seconds=0.25)),
        ("slow:1@2:0.5", Fault(kind="slow", rank=1, step=2, seconds=0.5)),
        ("full:1@2:3", Fault(kind="full", rank=1, step=2, writes=3)),
        ("torn:1@2:chunk", Fault(kind="torn", rank=1, step=2, file="chunk")),
        ("rot:1@2:part", Fault(kind="rot", rank=1, step=2, file="part")),
        ("cut:1@2:eth0:1.5", Fault(kind="cut", rank=1, step=2, device="eth0", seconds=1.5)),
        ("cut:1@2:eth0.7", Fault(kind="cut", rank=1, step=2, device="eth0.7")),
    ],
)
def test_a_fault_prints_as_its_text(text: str, fault: Fault) -> None:
    assert parse(text) == fault and str(fault) == text


@pytest.mark.parametrize(
    "text",
    [
        *("kill", "kill:1", "burn:1@2", "kill:-1@2", "slow:1@2:x", "kill:1@2:3", "full:1@2:0", "torn:1@2:header"),
        *("cut:1@2", "cut:1@2:", "cut:1@2:eth0;reboot", "cut:1@2:-a", "slow:1@2:1:2", "kill:1@2 ", "slow:1@2:1e3"),
    ],
)
def test_what_is_no_fault_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"KIND:RANK@STEP|ip link"):
        parse(text)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 30))
def test_what_is_drawn_can_be_read(seed: int, count: int) -> None:
    drawn = faults.draw(seed, count, num_ranks=3, num_steps=9, device="eth0", longest_s=2.0)
    assert drawn == faults.draw(seed, count, num_ranks=3, num_steps=9, device="eth0", longest_s=2.0)
    assert [parse(str(fault)) for fault in drawn] == drawn and len(drawn) == count
    assert [fault.step for fault in drawn] == sorted(fault.step for fault in drawn)
    assert all(fault.rank < 3 and fault.step < 9 and (fault.seconds or 0) <= 2 for fault in drawn)


def test_every_kind_is_drawn() -> None:
    assert {one.kind for one in faults.draw(0, 100, num_ranks=2, num_steps=5, device="eth0")} == set(faults.KINDS)
    assert {one.kind for one in faults.draw(0, 9, num_ranks=2, num_steps=5, kinds=["kill"])} == {"kill"}
    for wrong in ({"count": -1}, {"num_ranks": 0}, {"kinds": []}, {"kinds": ["burn"]}):
        with pytest.raises(ConfigError):
            faults.draw(**{"seed": 0, "count": 1, "num_ranks": 1, "num_steps": 1, **wrong})  # type: ignore[arg-type]


def _state(step: int) -> dict[str, Any]:
    return {"frozen": torch.arange(6.0), "weight": torch.full((5,), float(step)), "step": step}


def _saved(folder: Path, last: int, *, remote: Path | None = None) -> CheckpointWriter:
    writer = CheckpointWriter(CheckpointConfig(folder=folder, remote=remote, keep_last=2))
    for step in range(1, last + 1):
        writer.save(step, _state(step)).wait()
    return writer


def test_a_fault_strikes_once_however_often_a_training_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    given = [parse(text) for text in ("slow:0@1:0.5", "slow:1@1:7", "slow:0@1:0.25", "slow:0@3")]
    for last in (1, 4):
        injector = Injector(given, rank=0, ledger=tmp_path / "ledger")
        for step in range(last):
            injector.strike(step)
            injector.strike(step + 1)
    assert slept == [0.5, 0.25, 1.0]
    assert struck(tmp_path / "ledger") == ["slow:0@1:0.5", "slow:0@1:0.25", "slow:0@3"]
    assert struck(tmp_path / "none") == []


def test_a_full_disk_costs_a_checkpoint_and_no_more(tmp_path: Path) -> None:
    injector = Injector([parse("full:0@2:2")], rank=0, ledger=tmp_path / "ledger")
    writer = CheckpointWriter(CheckpointConfig(folder=tmp_path / "saved"), files=injector.files)
    failed = []
    for step in range(6):
        injector.strike(step)
        pending = writer.save(step, _state(step))
        with contextlib.suppress(CheckpointError):
            pending.wait()
        if writer.last_error is not None:
            assert isinstance(writer.last_error, OSError) and writer.last_error.errno == errno.ENOSPC
            failed.append(step)
            writer.last_error = None
        found = newest(tmp_path / "saved")
        assert found is not None and found.step == step - (len(failed) if step in failed else 0)
    writer.close()
    assert failed == [2, 3]


@pytest.mark.parametrize("file", faults.FILES)
@pytest.mark.parametrize("kind", ["torn", "rot"])
def test_damage_is_noticed_and_the_second_folder_helps(tmp_path: Path, kind: str, file: str) -> None:
    saved, remote = tmp_path / "saved", tmp_path / "remote"
    _saved(saved, 3, remote=remote).close()
    path = damage(saved, parse(f"{kind}:0@4:{file}"))
    assert path is not None and path.is_relative_to(saved)
    with pytest.raises(FileFormatError):
        Checkpoint(saved, 3).verify()
    found = newest(saved, remote)
    assert found is not None and found.step == 3 and torch.equal(found.state()["weight"], torch.full((5,), 3.0))
    alone = newest(saved)
    # Without it the one before is taken, unless that needs the chunk too.
    assert alone is None if file == "chunk" and _is_shared(saved, path) else alone is not None and alone.step == 2


def _is_shared(saved: Path, path: Path) -> bool:
    return any(path.name in part.chunks for part in Checkpoint(saved, 2).parts)


@pytest.mark.parametrize("file", faults.FILES)
def test_saving_goes_on_beside_rotten_files(tmp_path: Path, file: str) -> None:
    saved, remote = tmp_path / "saved", tmp_path / "remote"
    writer = _saved(saved, 3, remote=remote)
    for fault_step in range(3):  # every one of the chunks
        damage(saved, parse(f"rot:0@{fault_step}:{file}"))
    for step in range(4, 8):
        writer.save(step, _state(step)).wait()
        found = newest(saved, remote)
        assert found is not None and found.step == step and torch.equal(found.state()["frozen"], torch.arange(6.0))
    writer.close()
    # A writer that starts anew finds what is rotten and writes it again.
    _saved(saved, 9).close()
    Checkpoint(saved, 9).verify()


def test_nothing_is_damaged_where_nothing_is(tmp_path: Path) -> None:
    assert damage(tmp_path, parse("rot:0@1:chunk")) is None
    with pytest.raises(ConfigError, match="folder of the checkpoints"):
        Injector([parse("rot:0@1")], rank=0, ledger=tmp_path)
    with pytest.raises(ConfigError, match="Injector"):
        faults.strike([parse("full:0@1")], rank=0, step=1, start=0)
    disk = FullDisk()
    disk.fill(1)
    with pytest.raises(OSError, match="No space left"):
        disk.write(tmp_path / "file", b"content")
    disk.write(tmp_path / "file", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_stopped_process_goes_on_after_its_time() -> None:
    child = os.fork()
    if child == 0:
        faults.happen(parse("stop:0@0:0.2"))
        os._exit(7)
    _, status = os.waitpid(child, os.WUNTRACED)
    assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGSTOP
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7


def test_an_interface_that_is_not_there_cannot_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot be cut"):
        faults.happen(parse("cut:0@0:dsk-none"))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="the program `ip`"):
        faults.happen(parse("cut:0@0:dsk-none"))


@pytest.mark.cluster
def test_a_cut_link_is_mended_after_its_time() -> None:
    if reason := namespaces.why_not():
        pytest.skip(reason)
    with namespaces.namespaces(2) as made:

        def reaches() -> bool:
            command = ["ip", "netns", "exec", made.name(0), "python3", "-c", _CONNECT, made.address(1)]
            return subprocess.run(command, check=False).returncode == 0

        listening = ["ip", "netns", "exec", made.name(1), "python3", "-c", _LISTEN]
        with subprocess.Popen(listening, stdout=subprocess.PIPE) as listener:
            try:
                assert listener.stdout is not None and listener.stdout.readline() == b"ready\n" and reaches()
                code = "import sys; from dseek.train import faults; faults.happen(faults.parse(sys.argv[1]))"
                fault = str(Fault(kind="cut", rank=0, step=0, device=namespaces.DEVICE, seconds=3))
                subprocess.run(["ip", "netns", "exec", made.name(0), sys.executable, "-c", code, fault], check=True)
                assert not reaches()
                while not reaches():
                    time.sleep(0.2)
            finally:
                listener.kill()


_CONNECT = """
import socket, sys
try: socket.create_connection((sys.argv[1], 4711), timeout=0.5).close()
except OSError: sys.exit(1)
"""
_LISTEN = """
import socket
with socket.create_server(("", 4711)) as server:
    print("ready", flush=True)
    while True: server.accept()[0].close()
"""
