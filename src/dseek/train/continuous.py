"""Goes on training while a replica is lost: groups that average gradients by torchft and heal each other.

Where `train.supervisor` stops everybody and repeats, here the groups that are left go on with a smaller batch, and one
that comes back takes weights and moments from them. So the trajectory is another one than without the fault, and cannot
be repeated; who needs the same bits takes the supervisor.

One process is one replica group. The groups meet at a lighthouse (`lighthouse`, or torchft's own program). torchft
sends states between groups by HTTP, as PyTorch pickles them: the network has to be trusted. Needs the extra
`continuous`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
from torch.distributed import TCPStore

from dseek.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaConfig:
    """One replica group among others."""

    lighthouse: str
    """Where they meet, `http://HOST:PORT`."""
    name: str
    """Of this group; another than the others'."""
    min_replicas: int = 1
    """Groups without which no step is made."""
    timeout_s: float = 30.0
    """How long is waited for a group that has fallen silent."""
    address: str = "127.0.0.1"
    """Of this host, as the other groups see it."""

    def __post_init__(self) -> None:
        """Check address and numbers."""
        if not self.lighthouse.startswith(("http://", "https://")) or not self.name:
            raise ConfigError(
                f"the lighthouse of {self.name!r} is {self.lighthouse!r}", needed="http://HOST:PORT, a name"
            )
        if self.min_replicas < 1 or self.timeout_s <= 0:
            raise ConfigError(f"{self.min_replicas} groups within {self.timeout_s} s", needed="at least 1, and a time")


class ReplicaGroup:
    """This process as one replica group.

    A step is `begin`, forward and backward, `average`, and where `commit` says so, the optimiser's step.
    """

    def __init__(self, config: ReplicaConfig, *, state: Callable[[], Any], load: Callable[[Any], None]) -> None:
        """Join the others.

        Args:
            config: who and where.
            state: gives what a group that comes back needs: weights, moments, the data's position.
            load: takes it; called in `commit`, before the optimiser's step.

        Raises:
            ConfigError: torchft is not installed.
        """
        torchft = _torchft()
        timeout = timedelta(seconds=config.timeout_s)
        # Of the group's own processes, of which there is one.
        self._store = TCPStore("127.0.0.1", 0, None, True, timeout, wait_for_workers=False)
        self._manager: Any = torchft.Manager(
            pg=torchft.ProcessGroupGloo(timeout=timeout),
            state_dict=state,
            load_state_dict=load,
            min_replica_size=config.min_replicas,
            timeout=timeout,
            quorum_timeout=timeout,
            connect_timeout=timeout,
            rank=0,
            world_size=1,
            store_addr="127.0.0.1",
            store_port=self._store.port,
            lighthouse_addr=config.lighthouse,
            replica_id=config.name,
            hostname=config.address,
        )

    @property
    def step(self) -> int:
        """Steps that were committed, by all groups alike."""
        return int(self._manager.current_step())

    @property
    def num_groups(self) -> int:
        """Groups that take part in this step."""
        return int(self._manager.num_participants())

    def begin(self) -> None:
        """Begin a step: find out who is there, while the forward pass runs."""
        self._manager.start_quorum()

    def average(self, gradients: Iterable[torch.Tensor]) -> None:
        """Average gradients over the groups, in place.

        Args:
            gradients: the same shapes in the same order on every group.
        """
        for work in [self._manager.allreduce(gradient) for gradient in gradients]:
            work.wait()

    def commit(self) -> bool:
        """Tell whether the step counts: nobody was lost in it. A group that comes back is healed here."""
        return bool(self._manager.should_commit())

    def close(self) -> None:
        """Leave the others."""
        self._manager.shutdown(wait=False)


def lighthouse(min_replicas: int = 1, bind: str = "127.0.0.1:0", silent_s: float = 1.0) -> Any:
    """Start a lighthouse in this process.

    Args:
        min_replicas: groups without which there is no step.
        bind: HOST:PORT, port 0 for a free one.
        silent_s: a group that says nothing for so long is not waited for.

    Returns:
        It: `address()`, `shutdown()`.

    Raises:
        ConfigError: torchft is not installed.
    """
    _torchft()
    coordination = importlib.import_module("torchft.coordination")
    return coordination.LighthouseServer(
        bind=bind, min_replicas=min_replicas, join_timeout_ms=100, heartbeat_timeout_ms=int(1000 * silent_s)
    )


def _torchft() -> ModuleType:
    try:
        return importlib.import_module("torchft")
    except ImportError as error:
        raise ConfigError(
            f"continuous training needs torchft ({error})", remedy="pip install 'dseek[continuous]'"
        ) from None
