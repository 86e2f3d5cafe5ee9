"""A replica group of a tiny training in continuous mode: what the row `recovery` and a test let lose a group."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from dseek.train.checkpoints.chunks import digest_of
from dseek.train.continuous import ReplicaConfig, ReplicaGroup, lighthouse


def light(folder: Path) -> None:
    """Run the lighthouse until this process is ended; its address is left in the folder."""
    server = lighthouse()
    address = server.address()
    port = address.rpartition(":")[2].strip("/")
    part = folder / "lighthouse.part"
    part.write_text(f"http://127.0.0.1:{port}")
    part.rename(folder / "lighthouse")
    signal.pause()


STEPS_TOGETHER = 20


def train(folder: Path, group: int, killed_at: int | None) -> None:
    """Train until both groups have made some steps together after one was killed.

    Args:
        folder: where every committed step is entered, with its time and groups, and the digest at the end.
        group: number of this one.
        killed_at: the step in which this group kills itself; None for never.
    """
    torch.set_num_threads(1)
    model = torch.nn.Linear(32, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    member = ReplicaGroup(
        ReplicaConfig(lighthouse=(folder / "lighthouse").read_text(), name=f"group-{group}", timeout_s=10.0),
        state=lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        load=load,
    )
    with (folder / f"steps-{group}").open("a", buffering=1) as log:
        last = folder / "last"
        # Groups step together, so that all of them see in time which step is to be the last.
        while (step := member.step) < (int(last.read_text()) if last.exists() else step + 1):
            if step == killed_at:
                (folder / "killed").write_text(repr(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            member.begin()
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(2 * step + group))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            member.average([weight.grad for weight in model.parameters() if weight.grad is not None])
            if member.commit():
                optimizer.step()
                log.write(f"{time.time()} {member.step} {member.num_groups}\n")
                if group == 1 and killed_at is None and member.num_groups == 2 and not last.exists():
                    part = folder / "last.part"
                    part.write_text(str(member.step + STEPS_TOGETHER))
                    part.rename(last)
            time.sleep(0.05)
    weights = b"".join(weight.detach().numpy().tobytes() for weight in model.parameters())
    (folder / f"digest-{group}").write_text(digest_of(weights))
    time.sleep(0.5)  # the other group may still be asking for the last step's commitment
    member.close()
