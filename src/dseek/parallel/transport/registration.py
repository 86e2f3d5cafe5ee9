"""Makes the backend known to `torch.distributed`."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from dseek.parallel.transport.group import TransportGroup
from dseek.parallel.transport.meeting import meet
from dseek.parallel.transport.staging import BACKEND_NAME


def _create(store: Store, rank: int, world_size: int, timeout: timedelta) -> TransportGroup:
    return TransportGroup(meet(store, rank, world_size, timeout), timeout)


def register() -> None:
    """Make `torch.distributed.init_process_group("dseek")` work; calling it again does nothing."""
    if BACKEND_NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(BACKEND_NAME, _create, devices=["cpu"])
