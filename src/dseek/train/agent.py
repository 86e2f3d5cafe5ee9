"""One node's part in a training that spans hosts: it starts the ranks that the coordinator gives it, and watches them.

A node that does not reach the coordinator stops its ranks before the coordinator takes it for lost, so that nobody
computes twice: the agent by its own clock, and each rank when it next renews its lease, which ends where the agent has
not heard. An agent that lost touch ends with an error; started again, it is a spare.

What it does not know: an agent that is killed alone leaves its ranks to find that out at their next step.
"""

from __future__ import annotations

import json
import socket
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from dseek.core.errors import ConfigError, PeerError
from dseek.core.logs import get_logger
from dseek.train.local_ranks import POLL_S, Launch, LocalRanks, free_port, launch_command
from dseek.train.supervisor import variables_of

FENCE = 0.6
"""Share of a node's lease after which it stops its ranks."""

_BEATS_A_LEASE = 20
_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentConfig:
    """What a node runs, and for whom."""

    command: tuple[str, ...]
    """Program and arguments of every rank, with the variables that `SupervisorConfig.command` names."""
    coordinator: str
    """HOST:PORT."""
    slots: int = 1
    """Most ranks that this node takes."""
    lease_s: float = 30.0
    """A rank that does not renew for so long is lost; longer than the longest step."""
    start_s: float = 300.0
    """How long a rank's first renewal may take."""
    grace_s: float = 3.0
    """Between SIGTERM and SIGKILL."""
    connect_s: float = 60.0
    """How long to look for the coordinator."""

    def __post_init__(self) -> None:
        """Check the numbers and the address."""
        if not self.command or self.slots < 1 or min(self.lease_s, self.start_s, self.connect_s) <= 0:
            raise ConfigError(f"{self.slots} ranks of {self.command!r}", needed="a command, a rank, positive times")
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(f"the coordinator is {self.coordinator!r}", needed="HOST:PORT")


class Agent:
    """Runs the ranks of one node until the training has ended."""

    def __init__(self, config: AgentConfig, *, launch: Launch | None = None) -> None:
        """Prepare; nobody is talked to yet.

        Args:
            config: what is run.
            launch: starts a rank otherwise than by `config.command`.
        """
        self.config = config
        self._ranks = LocalRanks(
            launch or launch_command(config.command),
            lease_s=config.lease_s,
            start_s=config.start_s,
            grace_s=config.grace_s,
        )

    def run(self) -> None:
        """Run ranks as the coordinator says, until it says that all have ended well.

        Raises:
            PeerError: the coordinator gave up, or cannot be reached.
        """
        link = _Link(self.config)
        with tempfile.TemporaryDirectory(prefix="dseek-leases-") as folder:
            try:
                self._run(link, Path(folder))
            except BaseException:
                self._ranks.stop(grace_s=0.0)
                link.leave()
                raise

    def _run(self, link: _Link, folder: Path) -> None:
        generation, state, lost = 0, "idle", (0, "")
        while True:
            link.check()
            plan, master = link.plan, link.master
            if plan["generation"] != generation:
                # 1. Whatever ran is over.
                self._ranks.stop()
                self._ranks.start(folder, [])
                link.check()
                generation, state = plan["generation"], "idle"
                if plan["state"] in ("done", "failed"):
                    link.leave()
                    if plan["state"] == "failed":
                        raise PeerError(f"the coordinator has given up: {plan['reason']}")
                    return
            share = plan["members"].get(str(link.node)) if plan["state"] == "run" else None
            if share is not None and state == "idle" and master is not None and master[0] == generation:
                # 2. Ranks start once it is known where they meet.
                self._ranks.start(folder, _variables(plan, share, master[1]))
                state = "running"
            if state == "running":
                # 3. How are they?
                self._ranks.allow_until(link.fence_s)
                loss = self._ranks.look()
                if loss is not None:
                    state, lost = "lost", loss
                    _log.warning("rank %d is lost: %s", *loss)
                elif self._ranks.have_ended:
                    state = "ended"
            has_started = state in ("running", "ended")
            link.tell(
                generation=generation,
                state=state,
                rank=lost[0],
                reason=lost[1],
                step=self._ranks.step if has_started or state == "lost" else 0,
                renewed=has_started and self._ranks.have_renewed,
            )
            time.sleep(POLL_S)


def _variables(plan: Mapping[str, Any], share: Sequence[int], master: str) -> list[dict[str, str]]:
    """Environments of this node's ranks."""
    first, count = share
    address, _, port = master.rpartition(":")
    return [
        variables_of(
            first + local, plan["world_size"], local, count, address, int(port), run=plan["run"], start=plan["start"]
        )
        for local in range(count)
    ]


class _Link:
    """The connection to the coordinator, in a thread of its own: a call that hangs must not keep ranks from ending."""

    def __init__(self, config: AgentConfig) -> None:
        host, _, port = config.coordinator.rpartition(":")
        self._name, self._slots = config.coordinator, config.slots
        timeout = timedelta(seconds=config.connect_s)
        try:
            self._store = TCPStore(host, int(port), None, False, timeout, wait_for_workers=False)
            self._lease_s = float(json.loads(self._store.get("settings"))["lease_s"])
            self.node = int(self._store.add("agents", 1))
            plan: dict[str, Any] = json.loads(self._store.get("plan"))
        except RuntimeError as error:
            raise PeerError(
                f"there is no coordinator at {self._name} ({str(error).splitlines()[0]})",
                remedy="start it, and see that its port can be reached from here",
            ) from error
        self._address = _own_address(host)
        self.plan = plan
        self.master: tuple[int, str] | None = None
        """Generation, and where rank 0 of it listens."""
        self._told: dict[str, Any] = {"generation": 0, "state": "idle", "step": 0, "renewed": False}
        self._heard_s = time.monotonic()
        self._error: BaseException | None = None
        self._is_leaving = threading.Event()
        self._has_left = threading.Event()
        threading.Thread(target=self._serve, name="dseek-agent", daemon=True).start()

    @property
    def fence_s(self) -> float:
        """When this node's ranks have to be stopped, by `time.monotonic`."""
        return self._heard_s + FENCE * self._lease_s

    def tell(self, **fields: Any) -> None:
        """Say how the ranks are; it is sent with the next beat."""
        self._told = fields

    def check(self) -> None:
        """Raise PeerError where the coordinator is lost to this node."""
        if self._error is not None or time.monotonic() > self.fence_s:
            how = f"{self._error}".splitlines()[0] if self._error else f"nothing heard for {FENCE * self._lease_s:g} s"
            raise PeerError(
                f"the coordinator at {self._name} is lost ({how}), and nobody takes its place",
                remedy="if it still runs, start this agent again, as a spare; else start coordinator and agents again: "
                "the training goes on from its newest checkpoint",
            )

    def leave(self) -> None:
        """Say that this node takes no ranks any more, if that can still be said."""
        self._is_leaving.set()
        self._has_left.wait(FENCE * self._lease_s)

    def _serve(self) -> None:
        count = 0
        try:
            while True:
                sent_s, count = time.monotonic(), count + 1
                is_leaving = self._is_leaving.is_set()
                state = {"state": "left"} if is_leaving else {}
                self._store.set(f"beat/{self.node}", json.dumps({**self._about(count), **self._told, **state}))
                plan = json.loads(self._store.get("plan"))
                if is_leaving:
                    break
                self._meet(plan)
                # What was answered was sent after `sent_s`: from then on the coordinator may count.
                self.plan, self._heard_s = plan, sent_s
                self._is_leaving.wait(self._lease_s / _BEATS_A_LEASE)
        except Exception as error:
            self._error = error
        self._has_left.set()

    def _about(self, count: int) -> dict[str, Any]:
        return {"count": count, "address": self._address, "slots": self._slots, "rank": 0, "reason": ""}

    def _meet(self, plan: Mapping[str, Any]) -> None:
        """Find where rank 0 listens; on its node, decide."""
        generation = plan["generation"]
        share = plan["members"].get(str(self.node)) if plan["state"] == "run" else None
        if share is None or (self.master is not None and self.master[0] == generation):
            return
        key = f"master/{generation}"
        if share[0] == 0:
            self._store.set(key, f"{self._address}:{free_port(self._address)}")
        if self._store.check([key]):
            self.master = generation, self._store.get(key).decode()


def _own_address(coordinator: str) -> str:
    """This host's address on the way to the coordinator."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((coordinator, 9))  # a datagram socket sends nothing here
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
