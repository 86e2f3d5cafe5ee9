"""The supervisor: who is lost, who is only slow, when it gives up, and that a recovered training is bit-equal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from benchmarks.forked import Forked
from dseek.core.errors import ConfigError, PeerError
from dseek.train.lease import Lease, allow_until, read_lease
from dseek.train.supervisor import Restart, Supervisor, SupervisorConfig, supervise
from tests.train import supervised_worker

WORKER = """
import os, signal, sys, time
from pathlib import Path
from dseek.train import faults
from dseek.train.lease import Lease
rank, start = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
folder, lease = Path(sys.argv[1]), Lease()
(folder / f"pid-{start}-{rank}").write_text(str(os.getpid()))
for step in range(start * 3, 6):
    lease.renew(step)
    faults.strike([faults.parse(text) for text in sys.argv[2:]], rank=rank, step=step, start=start)
    time.sleep(0.05)
(folder / f"done-{rank}").write_text(str(start))
"""
"""Counts steps and needs no PyTorch, so that it starts at once; a restart begins at step 3."""


def _run(folder: Path, *given: str, **options: float) -> Supervisor:
    command = (sys.executable, "-c", WORKER, str(folder), *given)
    settings = {"world_size": 2, "lease_s": 1.5, "start_s": 60, "grace_s": 0.2, **options}
    supervisor = Supervisor(SupervisorConfig(command=command, **settings))  # type: ignore[arg-type]
    supervisor.run()
    return supervisor


def test_nothing_happens_where_nothing_fails(tmp_path: Path) -> None:
    assert _run(tmp_path).restarts == []
    assert (tmp_path / "done-1").read_text() == "0"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("kill:1@2", "killed by signal 9"), ("exit:0@2", "ended with status 3"), ("stop:1@2", "silent for 1.5 s")],
)
def test_all_start_again_where_one_is_lost(tmp_path: Path, fault: str, reason: str) -> None:
    (restart,) = _run(tmp_path, fault).restarts
    assert restart.reason == reason and restart.rank == int(fault[5]) and 2 <= restart.step <= 5
    assert 0 <= restart.stop_s <= restart.recovery_s
    # Whoever had ended well before is run again too, and nobody of the first start is left.
    assert [(tmp_path / f"done-{rank}").read_text() for rank in range(2)] == ["1", "1"]
    for path in tmp_path.glob("pid-*"):
        assert not Path(f"/proc/{path.read_text()}").exists()


def test_a_slow_one_is_not_lost(tmp_path: Path) -> None:
    assert _run(tmp_path, "slow:1@2:0.6").restarts == []


def test_it_gives_up_where_nothing_moves(tmp_path: Path) -> None:
    supervisor = Supervisor(
        SupervisorConfig(command=(sys.executable, "-c", "raise SystemExit(4)"), world_size=2, max_restarts=2)
    )
    with pytest.raises(PeerError, match="ended with status 4"):
        supervisor.run()
    assert len(supervisor.restarts) == 3


def test_a_lease_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lease"
    path.write_bytes(b"")
    assert read_lease(path) == (0, 0)
    lease = Lease(path)
    lease.renew(5)
    lease.renew(9)
    assert read_lease(path) == (2, 9)
    allow_until(path, time.monotonic() + 60)
    lease.renew(9)
    assert read_lease(path) == (3, 9)
    allow_until(path, time.monotonic() - 1)
    with pytest.raises(PeerError, match="out of touch"):
        lease.renew(10)
    assert read_lease(path) == (3, 9)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(PeerError, match="supervisor of this process has ended"):
        lease.renew(10)
    lease.close()
    lease.renew(11)


def test_wrong_settings_are_refused() -> None:
    for wrong in ({"command": ()}, {"world_size": 0}, {"lease_s": 0}, {"max_restarts": -1}):
        with pytest.raises(ConfigError):
            SupervisorConfig(**{"command": ("true",), "world_size": 1, **wrong})  # type: ignore[arg-type]


def _train(folder: Path, *given: str) -> list[Restart]:
    """Run the worker's training under the supervisor, its ranks forks of this process, which knows PyTorch already."""

    def launch(variables: Mapping[str, str]) -> Forked:
        return Forked(lambda: supervised_worker.run(folder, 8, given), variables, folder / f"log-{variables['RANK']}")

    folder.mkdir()
    return Supervisor(SupervisorConfig(command=("worker",), world_size=2, lease_s=60), launch=launch).run()


@pytest.mark.native
def test_a_recovered_training_is_bit_equal(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert _train(whole) == []
    (restart,) = _train(broken, "kill:1@5")
    assert restart.rank in (0, 1) and restart.step >= 4
    wanted, found = (torch.load(folder / "weights.pt", weights_only=True) for folder in (whole, broken))
    assert list(found) == list(wanted)
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


def test_a_command_is_supervised(tmp_path: Path) -> None:
    assert supervise([sys.executable, "-c", WORKER, str(tmp_path)], 1, lease_s=60) == []
    assert (tmp_path / "done-0").exists()
