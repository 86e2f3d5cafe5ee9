"""What saving costs a training, and how long it stands still when a process is lost."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError, IncorrectError
from benchmarks.ranks import on_ranks
from benchmarks.result import Outcome
from benchmarks.rows import Settings

NUM_TENSORS = 16
CHANGED = 4
"""Tensors that differ between two saves: a fine-tuning that trains some layers."""


def snapshot(settings: Settings) -> Outcome:
    """The stall of a save of 256 MiB in 16 tensors, beside `torch.distributed.checkpoint.async_save`.

    Between saves four of the sixteen change; the bytes that dseek then writes are in the details. Both are waited for
    between rounds, so that neither save meets the one before. What was saved is read back and compared.
    """
    num_bytes = 256 << 20 if not settings.smoke else 1 << 20
    with tempfile.TemporaryDirectory() as folder:
        answer = on_ranks(1, _time_saves, folder, num_bytes, settings.rounds)
    ours, theirs = (statistics.median(answer[name]) for name in ("dseek", "dcp"))
    return Outcome(value=ours, unit="s", ratio=theirs / ours, peer="torch DCP async_save", details=answer)


def _time_saves(folder: str, num_bytes: int, rounds: int) -> dict[str, Any]:
    import torch
    from torch.distributed import checkpoint

    from dseek.train.checkpoints import Checkpoint, CheckpointConfig, CheckpointWriter

    state = {f"tensor.{index}": torch.randn(num_bytes // NUM_TENSORS // 4) for index in range(NUM_TENSORS)}
    writer = CheckpointWriter(CheckpointConfig(folder=Path(folder) / "dseek", keep_last=2))
    found: dict[str, list[float]] = {"dseek": [], "dcp": [], "new_bytes": [], "write_s": []}
    for step in range(rounds + 2):  # the first two fill the buffers
        for index in range(CHANGED):
            state[f"tensor.{index}"] += 1
        start_s = time.perf_counter()
        pending = writer.save(step, state)
        ours_s = time.perf_counter() - start_s
        pending.wait()
        write_s = time.perf_counter() - start_s
        start_s = time.perf_counter()
        future = checkpoint.async_save(state, checkpoint_id=Path(folder) / f"dcp-{step % 2}")
        theirs_s = time.perf_counter() - start_s
        future.result()
        if step >= 2:
            for name, value in (
                ("dseek", ours_s),
                ("dcp", theirs_s),
                ("new_bytes", pending.new_bytes),
                ("write_s", write_s),
            ):
                found[name].append(float(value))
    writer.close()
    back = Checkpoint(Path(folder) / "dseek", rounds + 1).state()
    if not all(torch.equal(back[name], tensor) for name, tensor in state.items()):
        raise IncorrectError("what was saved is not what is read")
    return {**found, "num_bytes": num_bytes}


def recovery(settings: Settings) -> Outcome:
    """From the kill of one of two ranks to the next step of both: dseek's supervisor beside torchrun.

    Both run the same training, which saves each step with dseek's checkpoints, so the difference is in noticing,
    stopping and starting. The final weights must have the bits of a run without the kill.
    """
    rounds = settings.rounds
    times: dict[str, list[float]] = {"dseek": [], "torchrun": []}
    with tempfile.TemporaryDirectory() as folder:
        wanted = _train("dseek", Path(folder) / "whole", kill=False)[1]
        for round_idx in range(rounds):
            for name in times:
                recovery_s, weights = _train(name, Path(folder) / f"{name}-{round_idx}", kill=True)
                if weights != wanted:
                    raise IncorrectError(f"after a recovery by {name} the weights are not those of the run without one")
                times[name].append(recovery_s)
    ours, theirs = (statistics.median(times[name]) for name in ("dseek", "torchrun"))
    return Outcome(value=ours, unit="s", ratio=theirs / ours, peer="torchrun --max-restarts", details=times)


def _train(launcher: str, folder: Path, *, kill: bool) -> tuple[float, str]:
    """Run the training under a launcher; seconds from kill to next step, and the digest of the weights."""
    folder.mkdir()
    worker = [str(Path(__file__).parents[1] / "peers/recovery_worker.py"), str(folder), "kill" if kill else "whole"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if launcher == "dseek":
        code = "import sys; from dseek.train.supervisor import supervise; supervise(sys.argv[1:], 2)"
        command = [sys.executable, "-c", code, sys.executable, *worker]
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", *worker]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise BenchmarkError(f"{launcher} ended with status {run.returncode}:\n{run.stderr[-2000:]}")
    digest = json.loads((folder / "digest.json").read_text())
    if not kill:
        return 0.0, digest
    killed_s = float((folder / "killed").read_text())
    return max(float(path.read_text()) for path in folder.glob("again-*")) - killed_s, digest
