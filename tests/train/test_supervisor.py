"""The supervisor: who is lost, who is only slow, who ends all, when it gives up; recovery is bit-equal."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.forked import Forked
from dseek.core.errors import ConfigError, PeerError
from dseek.train import processes
from dseek.train.config import DataConfig, TrainConfig
from dseek.train.lease import Lease, LeaseState, allow_until, read_lease
from dseek.train.supervisor import Progress, Restart, Supervisor, SupervisorConfig, supervise, variables_of
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
    assert len(supervisor.restarts) == 2


def test_no_restart_means_none(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="ended with status 3"):
        _run(tmp_path, "exit:1@2", max_restarts=0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_users_error_is_not_restarted(rank: int, caplog: pytest.LogCaptureFixture) -> None:
    code = "import os, sys, time\nif os.environ['RANK'] == sys.argv[1]:\n    sys.exit(print('wrong key') or 2)\n"
    code += "time.sleep(600)"
    command = (sys.executable, "-c", code, str(rank))
    supervisor = Supervisor(SupervisorConfig(command=command, world_size=2, grace_s=0.2, only_first_speaks=True))
    assert supervisor.run() == 2 and not supervisor.restarts
    assert ("[rank 1] wrong key" in caplog.text) == (rank == 1), "rank 0 has told it itself"


STOPPABLE = """
import os, signal, sys, time
from pathlib import Path
from dseek.train.lease import Lease
def stop(*_):
    time.sleep(0.1)
    (Path(sys.argv[1]) / f"saved-{os.environ['RANK']}").touch()
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
lease = Lease()
while True:
    lease.renew(1)
    time.sleep(0.02)
"""


@pytest.mark.parametrize("times", [1, 2])
def test_a_stop_is_handed_on_once_and_the_second_one_ends_all(tmp_path: Path, times: int) -> None:
    command = (sys.executable, "-c", STOPPABLE if times == 1 else STOPPABLE.replace("0.1", "600"), str(tmp_path))
    supervisor = Supervisor(SupervisorConfig(command=command, world_size=2))

    def ask() -> None:
        while not supervisor.renewed():
            time.sleep(0.02)
        for _ in range(times):
            supervisor.stop()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    assert supervisor.run() == 130 and not supervisor.restarts
    asking.join()
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == (["saved-0", "saved-1"] if times == 1 else [])


def test_patience_grows_with_the_longest_wait(tmp_path: Path) -> None:
    assert _run(tmp_path, "slow:1@1:0.6", "slow:1@4:2.2", patience=10.0).restarts == []


def test_a_lease_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lease"
    path.write_bytes(b"")
    assert read_lease(path) == LeaseState()
    lease = Lease(path)
    lease.renew(5)
    lease.renew(9)
    lease.sign()
    assert read_lease(path) == LeaseState(signs=3, renewals=2, step=9)
    allow_until(path, time.monotonic() + 60)
    lease.renew(9)
    assert read_lease(path) == LeaseState(signs=4, renewals=3, step=9)
    allow_until(path, time.monotonic() - 1)
    with pytest.raises(PeerError, match="out of touch"):
        lease.renew(10)
    assert read_lease(path) == LeaseState(signs=4, renewals=3, step=9)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(PeerError, match="supervisor of this process has ended"):
        lease.renew(10)
    lease.close()
    lease.renew(11)


def test_wrong_settings_are_refused() -> None:
    for wrong in ({"command": ()}, {"world_size": 0}, {"lease_s": 0}, {"max_restarts": -1}, {"patience": -1}):
        with pytest.raises(ConfigError):
            SupervisorConfig(**{"command": ("true",), "world_size": 1, **wrong})  # type: ignore[arg-type]


def test_restarts_in_vain_are_counted_between_new_steps() -> None:
    progress = Progress(2)
    for step in (0, 0, 1, 1, 2):
        progress.count_loss(1, "silent", step)
    progress.count_loss(1, "silent", 2)
    with pytest.raises(PeerError, match=r"rank 1 was lost .silent. after 2 restarts without a new step"):
        progress.count_loss(1, "silent", 2)


def _train(folder: Path, *given: str) -> list[Restart]:
    """Run the worker's training under the supervisor, its ranks forks of this process, which knows PyTorch already."""

    def launch(variables: Mapping[str, str]) -> Forked:
        return Forked(lambda: supervised_worker.run(folder, 8, given), variables, folder / f"log-{variables['RANK']}")

    folder.mkdir()
    return supervise(SupervisorConfig(command=("worker",), world_size=2, lease_s=60), launch=launch)


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
    command = (sys.executable, "-c", WORKER, str(tmp_path))
    assert supervise(SupervisorConfig(command=command, world_size=1, lease_s=60)) == []
    assert (tmp_path / "done-0").exists()
    with pytest.raises(PeerError, match="ended with status 2"):
        supervise(SupervisorConfig(command=(sys.executable, "-c", "raise SystemExit(2)"), world_size=1))


def test_ranks_meet_again_over_a_store_that_torchrun_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second start must not look for the ranks of the first one, whose addresses are still in the store."""
    monkeypatch.setattr(processes, "TIMEOUT_S", 60.0)
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    config = TrainConfig(model="m", output_dir="o", device="cpu", data=DataConfig(train=("t",)))

    def meet() -> None:
        assert processes.Processes(config).sum(1.0) == [2.0]

    for start in range(2):
        ranks = []
        for rank in range(2):
            variables = variables_of(rank, 2, rank, 2, "127.0.0.1", store.port, run="none", start=start)
            variables["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            ranks.append(Forked(meet, variables, tmp_path / "log"))
            time.sleep(0.5)  # so that rank 0 looks before rank 1 has written its address anew
        assert [one.wait() for one in ranks] == [0, 0], (tmp_path / "log").read_text()
