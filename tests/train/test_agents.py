"""Agents and their coordinator: a node that is lost is replaced by a spare, or by those that are left."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from benchmarks import namespaces
from benchmarks.forked import Forked
from benchmarks.peers import soak_worker
from dseek.core.errors import ConfigError, PeerError
from dseek.train.agent import Agent, AgentConfig
from dseek.train.coordinator import Coordinator, CoordinatorConfig, _share_out
from dseek.train.faults import parse
from dseek.train.supervisor import Restart, Supervisor, SupervisorConfig

WORKER = """
import os, sys, time
from pathlib import Path
from dseek.train.lease import Lease
rank, start, node = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"]), sys.argv[2]
folder, lease = Path(sys.argv[1]), Lease()
(folder / f"pid-{start}-{rank}-{node}").write_text(str(os.getpid()))
for step in range(start * 3, 6):
    lease.renew(step)
    while start == 0 and step == 3 and not (folder / "go").exists():
        time.sleep(0.02)
        lease.renew(step)
(folder / f"done-{start}-{rank}-{node}").write_text(os.environ["MASTER_ADDR"])
"""
"""Counts steps and needs no PyTorch; the first start waits in step 3 until it is lost or told to go on."""


class Nodes:
    """A coordinator in a thread, and agents as process groups of their own, on loopback."""

    def __init__(self, folder: Path, num_agents: int, *, slots: int = 1, lease_s: float = 2.0, **given: float) -> None:
        self.folder = folder
        config = CoordinatorConfig(world_size=2, port=0, lease_s=lease_s, **{"gather_s": 20, **given})  # type: ignore[arg-type]
        self.coordinator = Coordinator(config)
        self.restarts: list[Restart] = []
        self.error: Exception | None = None
        self.agents: list[Forked] = []
        for node in range(num_agents):
            self.add(str(node), slots)
            # So that nodes are numbered in the order in which they are started.
            self.wait(lambda: self.coordinator._store.add("agents", 0) == len(self.agents))
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.restarts = self.coordinator.run()
        except Exception as error:
            self.error = error

    def add(self, name: str, slots: int) -> None:
        command = (sys.executable, "-c", WORKER, str(self.folder), name)
        address = f"127.0.0.1:{self.coordinator.port}"
        config = AgentConfig(command=command, coordinator=address, slots=slots, grace_s=0.2, lease_s=60)
        self.agents.append(Forked(Agent(config).run, {}, self.folder / f"log-{name}"))

    def wait(self, condition: Callable[[], object]) -> None:
        while not condition():
            assert all(agent.poll() in (None, 0, -9) for agent in self.agents), self.logs()
            time.sleep(0.02)

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in self.folder.glob("log-*"))

    def started(self, pattern: str, count: int) -> bool:
        return len(list(self.folder.glob(pattern))) == count

    def close(self) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()


def test_the_group_of_an_agent_is_killed_and_the_spare_takes_over(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, 3)
    try:
        nodes.wait(lambda: nodes.started("pid-0-*", 2))
        time.sleep(0.2)
        os.killpg(nodes.agents[1].pid, signal.SIGKILL)
        nodes.thread.join()
        assert nodes.error is None, nodes.logs()
        (restart,) = nodes.restarts
        assert restart.rank == 1 and restart.reason == "node 2 (127.0.0.1) was silent for 2 s"
        assert 0 <= restart.stop_s <= restart.recovery_s
        # Rank 0 stayed where it was, rank 1 went to the spare.
        assert {path.name for path in tmp_path.glob("done-*")} == {"done-1-0-0", "done-1-1-2"}
        assert [nodes.agents[0].wait(), nodes.agents[2].wait()] == [0, 0]
        for path in tmp_path.glob("pid-*"):
            assert not _runs(int(path.read_text())), f"{path.name} was left behind"
    finally:
        nodes.close()


def _runs(pid: int) -> bool:
    """Whether a process still runs a while after it should not."""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        if ") Z" in Path(f"/proc/{pid}/stat").read_text():
            return False
        time.sleep(0.02)
    return Path(f"/proc/{pid}").exists()


def test_a_lost_rank_and_a_node_without_a_spare(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, 2, slots=2)
    try:
        nodes.wait(lambda: nodes.started("pid-0-*", 2))
        time.sleep(0.2)
        # An agent that is interrupted says so, and is not waited for; the other one has room for both ranks.
        os.kill(nodes.agents[0].pid, signal.SIGINT)
        nodes.thread.join()
        assert nodes.error is None, nodes.logs()
        assert [restart.reason for restart in nodes.restarts] == ["node 1 (127.0.0.1) left"]
        assert {path.name for path in tmp_path.glob("done-*")} == {"done-1-0-1", "done-1-1-1"}
    finally:
        nodes.close()


def test_the_loss_of_the_coordinator_ends_the_job_with_an_error(tmp_path: Path) -> None:
    code = """
import sys
from dseek.train.coordinator import *
one = Coordinator(CoordinatorConfig(world_size=1, port=0, lease_s=2.0))
print(one.port, flush=True)
one.run()
"""
    reader, writer = os.pipe()

    def coordinate() -> None:
        os.dup2(writer, 1)
        exec(code, {})

    coordinator = Forked(coordinate, {}, tmp_path / "log-coordinator")
    os.close(writer)
    with os.fdopen(reader) as file:
        port = int(file.readline())
    command = [sys.executable, "-c", WORKER, str(tmp_path), "0"]
    config = AgentConfig(command=command, coordinator=f"127.0.0.1:{port}", grace_s=0.2)
    agent = Forked(Agent(config).run, {}, tmp_path / "log-0")
    while not list(tmp_path.glob("pid-0-*")):
        time.sleep(0.02)
    os.killpg(coordinator.pid, signal.SIGKILL)
    assert coordinator.wait() == -9 and agent.wait() == 1
    assert f"the coordinator at 127.0.0.1:{port} is lost" in (tmp_path / "log-0").read_text()
    (path,) = tmp_path.glob("pid-0-*")
    assert not _runs(int(path.read_text()))


def test_nodes_that_do_not_come_are_named(tmp_path: Path) -> None:
    coordinator = Coordinator(CoordinatorConfig(world_size=2, port=0, gather_s=0.1))
    with pytest.raises(PeerError, match="room for 2"):
        coordinator.run()
    with pytest.raises(ConfigError, match="cannot listen"):
        Coordinator(CoordinatorConfig(world_size=1, port=coordinator.port))


def test_ranks_are_shared_out() -> None:
    assert _share_out(4, [3, 1, 2], {1: 2, 2: 2, 3: 2}, {1: 4, 2: 4, 3: 4}) == {3: (0, 2), 1: (2, 2)}
    assert _share_out(4, [1, 2], {1: 1, 2: 1}, {1: 2, 2: 3}) == {1: (0, 2), 2: (2, 2)}
    assert _share_out(3, [1], {1: 1}, {1: 3}) == {1: (0, 3)}


def test_wrong_settings_are_refused() -> None:
    for wrong in ({"world_size": 0}, {"port": 70000}, {"lease_s": 0}, {"max_restarts": -1}):
        with pytest.raises(ConfigError):
            CoordinatorConfig(**{"world_size": 1, **wrong})  # type: ignore[arg-type]
    for coordinator in ("", "host", "host:", ":1", "host:0", "host:x"):
        with pytest.raises(ConfigError, match="HOST:PORT"):
            AgentConfig(command=("true",), coordinator=coordinator)
    with pytest.raises(ConfigError):
        AgentConfig(command=(), coordinator="host:1")
    with pytest.raises(PeerError, match="no coordinator at"):
        Agent(AgentConfig(command=("true",), coordinator="127.0.0.1:1", connect_s=0.5)).run()


@pytest.mark.cluster
@pytest.mark.native
def test_a_node_that_is_cut_off_is_replaced_and_the_weights_are_bit_equal(tmp_path: Path) -> None:
    """Three hosts: rank 1's loses its link in step 6 for ever, and the spare goes on from the shared folder."""
    if reason := namespaces.why_not():
        pytest.skip(reason)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()

    def launch_whole(variables: Mapping[str, str]) -> Forked:
        return Forked(lambda: soak_worker.train(whole, 12, []), variables, tmp_path / "log-whole")

    Supervisor(SupervisorConfig(command=("worker",), world_size=2), launch=launch_whole).run()
    fault = parse(f"cut:1@6:{namespaces.DEVICE}")
    with namespaces.namespaces(3) as made:
        coordinator = Coordinator(CoordinatorConfig(world_size=2, port=0, lease_s=4.0))
        address = f"{made.bridge_address}:{coordinator.port}"

        def launch(variables: Mapping[str, str]) -> Forked:
            return Forked(lambda: soak_worker.train(broken, 12, [fault]), variables, tmp_path / "log-ranks")

        def live() -> None:
            Agent(AgentConfig(command=("worker",), coordinator=address, grace_s=0.2), launch=launch).run()

        agents = []
        try:
            for node in range(3):
                agents.append(Forked(live, {}, tmp_path / f"log-{node}", made.name(node)))
                while coordinator._store.add("agents", 0) <= node:
                    time.sleep(0.02)
            (restart,) = coordinator.run()
            assert restart.step >= 6, (tmp_path / "log-ranks").read_text()
            assert "is lost" in (tmp_path / "log-1").read_text() and agents[1].wait() == 1
            assert [agents[0].wait(), agents[2].wait()] == [0, 0]
        finally:
            for agent in agents:
                if agent.poll() is None:
                    os.killpg(agent.pid, signal.SIGKILL)
                    agent.wait()
    for rank in range(2):
        assert (broken / f"digest-{rank}").read_text() == (whole / f"digest-{rank}").read_text()
    (_, again) = [json.loads(line) for line in (broken / "starts").read_text().splitlines()]
    assert again["first"][0] == again["first"][1] >= again["acknowledged"] >= 4
