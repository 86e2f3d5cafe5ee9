"""One rank of the training that the row `fault-soak` lets faults happen to; the supervisor starts it as a fork.

It saves every step to two folders and does not wait for a save before the step after it, so that faults strike while
files are written. In its folder it leaves, besides the checkpoints:
`acknowledged`, the last step whose save was waited for; `starts`, a line for every start with the step it began from;
`digest-RANK`, what the state was at the end; `struck`, the faults' ledger.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dseek.parallel.transport  # noqa: F401  (registers the backend)
from dseek.train.checkpoints import CheckpointConfig, CheckpointError, CheckpointWriter, Pending, newest
from dseek.train.checkpoints.chunks import digest_of
from dseek.train.faults import Fault
from dseek.train.injection import Injector
from dseek.train.lease import Lease
from dseek.train.supervisor import run_id

WIDTH = 64


def train(folder: Path, num_steps: int, given: Sequence[Fault]) -> None:
    """Train one rank, named by its environment, from the newest checkpoint to the end.

    Args:
        folder: of the run.
        num_steps: of the training.
        given: the faults of all ranks.
    """
    lease = Lease()
    torch.set_num_threads(1)
    dist.init_process_group("dseek")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    checkpoints, remote = folder / "checkpoints", folder / "remote"
    injector = Injector(given, rank=rank, ledger=folder / "struck", checkpoints=checkpoints)
    state = _first_state()
    noise = torch.Generator().manual_seed(100 + rank)
    checkpoint = newest(checkpoints, remote)
    if checkpoint is not None:
        state = checkpoint.state()
        noise.set_state(checkpoint.private(rank)["noise"])
    _enter_start(folder, rank, world_size, int(state["step"]))
    config = CheckpointConfig(folder=checkpoints, remote=remote, keep_last=3, peers_timeout_s=2.0)
    writer = CheckpointWriter(config, rank=rank, world_size=world_size, run=run_id(), files=injector.files)
    pending: Pending | None = None
    for step in range(state["step"], num_steps):
        lease.renew(step)
        injector.strike(step)
        state = _next_state(state, noise, rank, world_size)
        _await(pending, folder, rank)
        pending = writer.save(step + 1, state, private={"noise": noise.get_state()})
    _await(pending, folder, rank)
    writer.close()
    lease.renew(num_steps)
    (folder / f"digest-{rank}").write_text(digest_state(state))
    dist.barrier()
    dist.destroy_process_group()


def _first_state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    table, weight = torch.randn(WIDTH, WIDTH, generator=generator), torch.randn(WIDTH, WIDTH, generator=generator)
    return {"table": table, "weight": weight, "momentum": torch.zeros(WIDTH, WIDTH), "step": 0}


def _next_state(state: dict[str, Any], noise: torch.Generator, rank: int, world_size: int) -> dict[str, Any]:
    """One step: rows of the frozen table as data, dropout from the rank's own numbers, momentum."""
    chosen = torch.Generator().manual_seed(state["step"] * world_size + rank)
    x = state["table"][torch.randint(WIDTH, (16,), generator=chosen)]
    x = x * (torch.rand(x.shape, generator=noise) > 0.1)
    gradient = x.t() @ torch.tanh(x @ state["weight"]) / x.numel()
    dist.all_reduce(gradient, dist.ReduceOp.AVG)
    momentum = 0.9 * state["momentum"] + gradient
    weight = state["weight"] - 0.1 * momentum
    return {"table": state["table"], "weight": weight, "momentum": momentum, "step": state["step"] + 1}


def digest_state(state: dict[str, Any]) -> str:
    """Name a state by its bits."""
    tensors = b"".join(state[name].numpy().tobytes() for name in ("table", "weight", "momentum"))
    return digest_of(tensors + str(state["step"]).encode())


def _await(pending: Pending | None, folder: Path, rank: int) -> None:
    """Wait for a save; only what was waited for in vain may be lost."""
    if pending is None:
        return
    try:
        pending.wait()
    except CheckpointError:
        return
    if rank == 0:
        part = folder / "acknowledged.part"
        part.write_text(str(pending.step))
        part.rename(folder / "acknowledged")


def _enter_start(folder: Path, rank: int, world_size: int, first: int) -> None:
    """Enter from where every rank begins, and what had been promised."""
    steps = torch.zeros(world_size)
    steps[rank] = first
    dist.all_reduce(steps)
    if rank == 0:
        path = folder / "acknowledged"
        line = {
            "start": int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
            "first": [int(step) for step in steps.tolist()],
            "acknowledged": int(path.read_text()) if path.exists() else 0,
        }
        with (folder / "starts").open("a") as file:
            file.write(json.dumps(line) + "\n")
