"""A tiny training of several ranks that saves each step: what the supervisor's test starts, restarts and compares."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import dseek.parallel.transport  # noqa: F401  (registers the backend)
from dseek.train import faults
from dseek.train.checkpoints import CheckpointConfig, CheckpointWriter, newest
from dseek.train.lease import Lease
from dseek.train.supervisor import run_id


def train(folder: Path, num_steps: int, given: list[faults.Fault], run: str, start: int = 0) -> None:
    """Train on this rank of the default group, from the newest checkpoint on; rank 0 writes the weights at the end."""
    rank, world_size, lease = dist.get_rank(), dist.get_world_size(), Lease()
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.1), nn.GELU(), nn.Linear(16, 3))
    # Momentum by hand: PyTorch's optimisers and DDP import a compiler first, which takes longer than all the rest.
    momentum = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    torch.manual_seed(100 + rank)
    first = 0
    checkpoint = newest(folder / "checkpoints")
    if checkpoint is not None:
        state = checkpoint.state()
        model.load_state_dict(state["model"])
        momentum = state["momentum"]
        torch.set_rng_state(checkpoint.private(rank)["rng"])
        first = state["step"]
    config = CheckpointConfig(folder=folder / "checkpoints", keep_last=2)
    writer = CheckpointWriter(config, rank=rank, world_size=world_size, run=run)
    for step in range(first, num_steps):
        lease.renew(step)
        faults.strike(given, rank=rank, step=step, start=start)
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step * world_size + rank))
        loss = model(x).square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, weight), gradient in zip(model.named_parameters(), gradients, strict=True):
                dist.all_reduce(gradient, dist.ReduceOp.AVG)
                momentum[name].mul_(0.9).add_(gradient)
                weight.sub_(0.1 * momentum[name])
        state = {"model": model.state_dict(), "momentum": momentum, "step": step + 1}
        writer.save(step + 1, state, private={"rng": torch.get_rng_state()}).wait()
    writer.close()
    dist.barrier()
    if rank == 0:
        torch.save(model.state_dict(), folder / "weights.pt")


def run(folder: Path, num_steps: int, given: Sequence[str]) -> None:
    """Run one rank, named by its environment, with the faults of all."""
    torch.set_num_threads(1)
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group("dseek")
    train(folder, num_steps, [faults.parse(text) for text in given], run_id(), start)
    dist.destroy_process_group()
