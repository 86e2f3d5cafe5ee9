"""What saving costs a training, and how long it stands still when a process is lost."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import models, standard_library
from benchmarks.continuous import lose_a_group
from benchmarks.errors import BenchmarkError, IncorrectError
from benchmarks.ranks import on_ranks
from benchmarks.result import Outcome, ratio_to_bar
from benchmarks.rows import Settings

RECOVERY_BAR_S = 15.0
"""Longest time from a kill to the next step."""
NUM_STEPS, KILL_SEED = 12, 0
"""Steps of a training, and the seed of who is killed when."""
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
    """From the kill of one of two ranks of `dseek train` to its next completed step, the longest of 20.

    Which rank is killed after which step is drawn by a seed. Under dseek's supervisor, and for comparison (in the
    details) a few times under torchrun with the same snapshots. The clock runs from the report of the step before the
    kill. The final weights must have the bits of a run without the kill.
    """
    draw = random.Random(KILL_SEED)
    kills = [(draw.randrange(2), draw.randrange(3, NUM_STEPS)) for _ in range(settings.pick(20, 1))]
    counts = {"dseek": len(kills)} if settings.smoke else {"dseek": len(kills), "torchrun": 3}
    times: dict[str, list[float]] = {name: [] for name in counts}
    with tempfile.TemporaryDirectory() as folder:
        wanted = _train("dseek", Path(folder) / "whole", None)[1]
        for index, kill in enumerate(kills):
            for name in (name for name, count in counts.items() if index < count):
                recovery_s, weights = _train(name, Path(folder) / f"{name}-{index}", kill)
                if weights != wanted:
                    raise IncorrectError(
                        f"rank {kill[0]} was killed after step {kill[1]}; after the recovery by {name} the weights are "
                        "not those of the run without it"
                    )
                times[name].append(recovery_s)
    ours = max(times["dseek"])
    details: dict[str, Any] = {
        "kills": kills,
        "seed": KILL_SEED,
        "median_s": statistics.median(times["dseek"]),
        **times,
    }
    if not settings.smoke and importlib.util.find_spec("torchft") is not None:
        with tempfile.TemporaryDirectory() as folder:
            details["continuous"] = lose_a_group(Path(folder))
    return Outcome(value=ours, unit="s", ratio=ratio_to_bar(RECOVERY_BAR_S, ours), details=details)


def _train(launcher: str, folder: Path, kill: tuple[int, int] | None) -> tuple[float, str]:
    """Run `dseek train` on two ranks, kill a rank after a step; seconds to the next step, digest of the weights."""
    folder.mkdir()
    config = {
        "model": str(models.hf_folder(models.SMOLLM2)),
        "output_dir": str(folder / "out"),
        "from_scratch": True,
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
        "device": "cpu",
        "num_threads": 1,
        "shape": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "num_key_value_heads": 1},
        "checkpoints": {"snapshot_steps": 1},
        "data": {"train": [str(standard_library.root() / "argparse.py")], "max_length": 64},
    }
    recipe = folder / "run.toml"
    recipe.write_text("\n".join(f"{key} = {_toml(value)}" for key, value in config.items()))
    arguments = ["train", str(recipe), *(["--inject-fault", "kill:{}@{}".format(*kill)] if kill else [])]
    if launcher == "dseek":
        command = [sys.executable, "-m", "dseek.cli.main", *arguments, "--nproc-per-node", "2"]
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "dseek.cli.main", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as run:
        assert run.stderr is not None
        lines = [(time.monotonic(), line.rstrip()) for line in run.stderr]
    if run.returncode != 0:
        shown = "\n".join(line for _, line in lines[-30:])
        raise BenchmarkError(f"{launcher} ended with status {run.returncode}:\n{shown}")
    digest = hashlib.sha256((folder / "out/model.safetensors").read_bytes()).hexdigest()
    return recovery_seconds(lines) if kill else 0.0, digest


def recovery_seconds(lines: list[tuple[float, str]]) -> float:
    """Tell how long a training stood still, from what it wrote.

    Args:
        lines: when each was read, in seconds, and the line.

    Raises:
        IncorrectError: nothing was recovered, or not from a snapshot.
    """
    again = [index for index, (_, line) in enumerate(lines) if line.startswith("going on after step ")]
    steps = [(index, at_s) for index, (at_s, line) in enumerate(lines) if line.startswith("step ")]
    if len(again) != 1 or not steps or not steps[0][0] < again[0] < steps[-1][0]:
        raise IncorrectError("the training did not go on from a snapshot once")
    stood = max(at_s for index, at_s in steps if index < again[0])
    return min(at_s for index, at_s in steps if index > again[0]) - stood


def _toml(value: Any) -> str:
    """A value as TOML has it; tables inline."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    return json.dumps(value)
