"""Keeps a training alive that spans hosts: where a node is lost, all stop and start again on those that are left.

One agent a node (`train.agent`) starts that node's ranks and tells the coordinator how they are; the coordinator says
who runs which ranks. Recovery is exact as `train.supervisor` has it: as many ranks as before, from the newest
checkpoint in a folder that every node sees. Agents that are not needed are spares.

They meet in a `torch.distributed.TCPStore` that lives in the coordinator's process. There is one coordinator, and
nobody takes its place: its loss ends the job on every node, with an error. The store knows no passwords, so its port
belongs on a network that is trusted.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

from dseek.core import events
from dseek.core.errors import ConfigError, PeerError
from dseek.core.logs import get_logger
from dseek.train.supervisor import Progress, Restart

DEFAULT_PORT = 29400
_POLL_S = 0.05
_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class CoordinatorConfig:
    """What is kept alive, and how long is waited."""

    world_size: int
    """Ranks of the training."""
    ranks_per_node: int = 1
    """Ranks that a node runs, while there are nodes enough."""
    port: int = DEFAULT_PORT
    """Where agents find the coordinator; 0 takes a free one."""
    lease_s: float = 10.0
    """A node that says nothing for so long is lost."""
    gather_s: float = 300.0
    """How long to wait for nodes enough, at the beginning and after a loss."""
    max_restarts: int = 3
    """So many restarts without a new step in between; the next loss ends the training."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if min(self.world_size, self.ranks_per_node) < 1 or not 0 <= self.port < 65536:
            raise ConfigError(
                f"{self.world_size} ranks, {self.ranks_per_node} a node, at port {self.port}",
                needed="at least one of each, and a port",
            )
        if min(self.lease_s, self.gather_s) <= 0 or self.max_restarts < 0:
            raise ConfigError("a time or a number of restarts is negative", needed="positive times")


@dataclass(slots=True)
class _Node:
    told: str
    """The last that the agent said."""
    seen_s: float
    beat: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Loss:
    rank: int
    reason: str


class Coordinator:
    """Says which node runs which ranks, until the training has ended."""

    def __init__(self, config: CoordinatorConfig) -> None:
        """Open the store; agents may come from now on.

        Args:
            config: what is kept alive.

        Raises:
            ConfigError: the port is taken.
        """
        self.config = config
        self.restarts: list[Restart] = []
        try:
            self._store = TCPStore("0.0.0.0", config.port, None, True, timedelta(seconds=60), wait_for_workers=False)
        except RuntimeError as error:
            raise ConfigError(
                f"the coordinator cannot listen at port {config.port} ({str(error).splitlines()[0]})",
                remedy="choose another port, for the agents too",
            ) from error
        self._run_id = secrets.token_hex(4)
        self._nodes: dict[int, _Node] = {}
        self._lost: set[int] = set()
        self._generation = self._start = 0
        self._members: dict[int, tuple[int, int]] = {}
        self._store.set("settings", json.dumps({"lease_s": config.lease_s}))
        self._say("wait")

    @property
    def port(self) -> int:
        """Where agents find it."""
        return int(self._store.port)

    def run(self) -> list[Restart]:
        """Keep the training alive until all ranks have ended well.

        Returns:
            The recoveries there were.

        Raises:
            PeerError: nodes did not come, or ranks were lost again and again; the agents are told.
        """
        try:
            self._run()
        except BaseException as error:
            self._say("failed", reason=str(error) or type(error).__name__)
            self._dismiss()
            raise
        self._say("done")
        self._dismiss()
        return self.restarts

    def _run(self) -> None:
        progress = Progress(self.config.max_restarts)
        loss: _Loss | None = None
        while True:
            # 1. Place the ranks and let them start.
            noticed_s, step, stop_s = time.monotonic(), self._step(), 0.0
            if loss is not None:
                _log.warning("rank %d is lost at step %d: %s", loss.rank, step, loss.reason)
                progress.count_loss(loss.rank, loss.reason, step)
                # Nobody starts before everybody who can still be reached has stopped; who cannot has stopped itself.
                self._say("stop")
                while not all(beat["generation"] == self._generation for beat in self._beats(self._members)):
                    time.sleep(_POLL_S)
                stop_s = time.monotonic() - noticed_s
                self._start += 1
            self._members = self._place()
            self._say("run")
            # 2. Watch them.
            next_loss = self._watch(until_renewed=True)
            if loss is not None:
                recovery_s = time.monotonic() - noticed_s
                restart = Restart(rank=loss.rank, reason=loss.reason, step=step, stop_s=stop_s, recovery_s=recovery_s)
                self.restarts.append(restart)
                events.emit("supervisor.restart", restart=restart)
            loss = next_loss or self._watch(until_renewed=False)
            if loss is None:
                return

    def _say(self, state: str, reason: str = "") -> None:
        """Tell all agents what is to be done from now on."""
        self._generation += 1
        plan = {
            "generation": self._generation,
            "state": state,
            "members": {str(node): list(share) for node, share in self._members.items()},
            "world_size": self.config.world_size,
            "run": self._run_id,
            "start": self._start,
            "reason": reason,
        }
        self._store.set("plan", json.dumps(plan))

    def _listen(self) -> None:
        """Take in what the agents have said; whoever says nothing for too long is lost."""
        for node in range(1, self._store.add("agents", 0) + 1):
            if node in self._lost or not self._store.check([f"beat/{node}"]):
                continue
            told = self._store.get(f"beat/{node}").decode()
            known = self._nodes.get(node)
            if known is None or known.told != told:
                self._nodes[node] = known = _Node(told=told, seen_s=time.monotonic(), beat=json.loads(told))
            if known.beat["state"] == "left" or time.monotonic() - known.seen_s > self.config.lease_s:
                self._lost.add(node)

    def _beats(self, nodes: Mapping[int, Any]) -> list[Mapping[str, Any]]:
        """The last words of those nodes that are not lost."""
        self._listen()
        return [self._nodes[node].beat for node in nodes if node not in self._lost]

    def _step(self) -> int:
        """The furthest step that a member has told of."""
        return max((self._nodes[node].beat["step"] for node in self._members if node in self._nodes), default=0)

    def _place(self) -> dict[int, tuple[int, int]]:
        """Wait for nodes enough, and share out the ranks: first rank and number of each node."""
        deadline = time.monotonic() + self.config.gather_s
        while True:
            self._listen()
            alive = [node for node in self._nodes if node not in self._lost]
            # Those that have run go on; a node takes more ranks than usual only where there is no other.
            alive.sort(key=lambda node: (node not in self._members, node))
            room = {node: int(self._nodes[node].beat["slots"]) for node in alive}
            usual = {node: min(slots, self.config.ranks_per_node) for node, slots in room.items()}
            is_crowded = bool(self._members) or time.monotonic() > deadline
            if sum((room if is_crowded else usual).values()) >= self.config.world_size:
                return _share_out(self.config.world_size, alive, usual, room)
            if time.monotonic() > deadline:
                raise PeerError(
                    f"{len(alive)} nodes are there, with room for {sum(room.values())} ranks",
                    needed=f"room for {self.config.world_size}",
                    remedy="start agents on more nodes; the training goes on from its newest checkpoint",
                )
            time.sleep(_POLL_S)

    def _watch(self, *, until_renewed: bool) -> _Loss | None:
        """Wait until a rank or node is lost; None where all have ended well, or each rank has made a step."""
        while True:
            self._listen()
            silent = None
            for node, (first, _) in self._members.items():
                beat = self._nodes[node].beat
                if beat["generation"] == self._generation and beat["state"] == "lost":
                    return _Loss(rank=int(beat["rank"]), reason=str(beat["reason"]))
                if node in self._lost:
                    how = "left" if beat["state"] == "left" else f"was silent for {self.config.lease_s:g} s"
                    silent = _Loss(rank=first, reason=f"node {node} ({beat['address']}) {how}")
            if silent is not None:
                return silent
            beats = [self._nodes[node].beat for node in self._members]
            current = [beat for beat in beats if beat["generation"] == self._generation]
            if len(current) == len(beats):
                if all(beat["state"] == "ended" for beat in current):
                    return None
                if until_renewed and all(beat["renewed"] for beat in current):
                    return None
            time.sleep(_POLL_S)

    def _dismiss(self) -> None:
        """Wait until every agent has heard how it ended, as long as one can be silent."""
        deadline = time.monotonic() + self.config.lease_s
        while time.monotonic() < deadline and self._beats(self._nodes):
            time.sleep(_POLL_S)


def _share_out(
    world_size: int, nodes: list[int], usual: Mapping[int, int], room: Mapping[int, int]
) -> dict[int, tuple[int, int]]:
    """Give each node its usual ranks while there are any left, then more up to its room."""
    counts = dict.fromkeys(nodes, 0)
    for limit in (usual, room):
        for node in nodes:
            counts[node] += min(limit[node] - counts[node], world_size - sum(counts.values()))
    found, first = {}, 0
    for node in nodes:
        if counts[node]:
            found[node] = (first, counts[node])
            first += counts[node]
    return found
