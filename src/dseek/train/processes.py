"""The processes of one training: who they are, where they compute, and the few sums they agree on.

Processes are what torchrun started, or this one alone. Sums are made in float64, in order of rank, so that all ranks
decide alike: how much a step weighs, whether somebody asked to stop.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore
from torch.distributed.rendezvous import rendezvous

from dseek.core.errors import ConfigError, PeerError
from dseek.parallel.meeting import LAUNCHER_VARIABLES
from dseek.train.config import TrainConfig
from dseek.train.lease import Lease
from dseek.train.supervisor import restart_count

_OF_PEERS = re.compile(r"gloo|nccl|connection (closed|reset)|rank \d+ ", re.IGNORECASE)
"""What a message of PyTorch's process groups has that is about a peer."""
TIMEOUT_S = 600.0
"""How long a rank waits for one that is alive and silent, such as one that writes a checkpoint to a slow disk."""


class Processes:
    """This process among its peers.

    Args:
        config: device and backend.

    Raises:
        ConfigError: the device or the backend is not there.
        PeerError: the peers did not come together.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.device = _device(config)
        if not dist.is_initialized() and all(os.environ.get(name) for name in LAUNCHER_VARIABLES):
            _meet(config, self.device)
        self.lease = Lease()
        """What a supervisor watches."""
        alone = not dist.is_initialized()
        self.rank, self.world_size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """This process speaks for all."""
        return self.rank == 0

    def gather(self, *values: float) -> torch.Tensor:
        """Bring together values of all ranks. All ranks call this together.

        Args:
            values: this rank's.

        Returns:
            float64 [ranks, values], the same on every rank.

        Raises:
            PeerError: a peer died or does not answer.
        """
        own = torch.tensor(values, dtype=torch.float64)
        if self.world_size == 1:
            return own[None]
        own = own.to(self.device)
        every = [torch.empty_like(own) for _ in range(self.world_size)]
        try:
            dist.all_gather(every, own)
        except RuntimeError as error:
            raise _lost(error) from error
        return torch.stack(every).cpu()

    def sum(self, *values: float) -> list[float]:
        """Add up values of all ranks. All ranks call this together.

        Args:
            values: this rank's.

        Returns:
            The sums, the same on every rank.

        Raises:
            PeerError: a peer died or does not answer.
        """
        total: list[float] = self.gather(*values).sum(dim=0).tolist()
        return total

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.sum(0.0)

    @contextmanager
    def among_peers(self) -> Iterator[None]:
        """Tell the death of a peer from other errors, wherever PyTorch was when it noticed.

        Raises:
            PeerError: a peer died or does not answer.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world_size > 1 and (isinstance(error, dist.DistError) or _OF_PEERS.search(str(error))):
                raise _lost(error) from error
            raise


def _lost(error: RuntimeError) -> PeerError:
    lines = str(error).strip().splitlines() or ["no message"]
    return PeerError(
        f"a peer died or does not answer ({lines[0]})",
        remedy="look at the first rank that failed, and start all of them again",
    )


def _device(config: TrainConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device is "cuda", and PyTorch finds none', remedy='set device = "auto" or "cpu"')
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _meet(config: TrainConfig, device: torch.device) -> None:
    backend = config.ddp_backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "dseek":
        import importlib

        try:
            importlib.import_module("dseek.parallel.transport")
        except ImportError:
            raise ConfigError('ddp_backend is "dseek", which this installation lacks', needed="gloo or nccl") from None
    timeout = timedelta(seconds=TIMEOUT_S)
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun keeps this store over its restarts. In there are the addresses of ranks that have ended, and
            # who looks for those waits in vain; so each start has names of its own.
            store = PrefixStore(f"start-{restart_count()}", store)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    except ValueError as error:
        raise ConfigError(f"the ranks' environment variables are wrong ({error})") from error
    except RuntimeError as error:
        raise PeerError(f"the ranks did not come together ({str(error).strip().splitlines()[0]})") from error
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
