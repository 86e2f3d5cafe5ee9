"""One rank of the training that the row `recovery` lets lose a process; started by the supervisor or by torchrun.

`recovery_worker.py FOLDER kill|whole`: rank 1 of the first start kills itself in the middle.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import dseek.parallel.transport  # noqa: F401  (registers the backend)
from dseek.train.checkpoints import CheckpointConfig, CheckpointWriter, newest
from dseek.train.checkpoints.chunks import digest_of
from dseek.train.lease import Lease
from dseek.train.supervisor import run_id

NUM_STEPS, KILLED_AT, WIDTH = 12, 6, 256


def main() -> None:
    """Train."""
    folder, kills = Path(sys.argv[1]), sys.argv[2] == "kill"
    start, lease = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), Lease()
    torch.set_num_threads(1)
    dist.init_process_group("dseek")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    first = 0
    checkpoint = newest(folder / "checkpoints")
    if checkpoint is not None:
        state = checkpoint.state()
        weight, first = state["weight"], state["step"]
    config = CheckpointConfig(folder=folder / "checkpoints")
    writer = CheckpointWriter(config, rank=rank, world_size=world_size, run=run_id())
    for step in range(first, NUM_STEPS):
        lease.renew(step)
        if kills and start == 0 and rank == 1 and step == KILLED_AT:
            (folder / "killed").write_text(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(step * world_size + rank))
        gradient = x.t() @ (x @ weight) / x.numel()
        dist.all_reduce(gradient, dist.ReduceOp.AVG)
        weight = weight - 0.1 * gradient
        if start and step == first:
            (folder / f"again-{rank}").write_text(repr(time.time()))
        writer.save(step + 1, {"weight": weight, "step": step + 1}).wait()
    writer.close()
    dist.barrier()
    if rank == 0:
        digest = digest_of(weight.numpy().tobytes())
        (folder / "digest.json").write_text(json.dumps(digest))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
