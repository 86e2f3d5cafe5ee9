"""Fine-tuning beside transformers' Trainer, on the very same rows: memory, speed, and how well memory is predicted.

Every training is a process of its own. A row reports only where the losses of all steps agree with the peer's, so that
what is compared is the same training. The texts are the standard library's, of its training part.
"""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

from benchmarks import models, standard_library
from benchmarks.contest import alternate, median_of, spread_of
from benchmarks.errors import IncorrectError
from benchmarks.peers.client import PeerProcess
from benchmarks.ranks import on_ranks
from benchmarks.result import Outcome, ratio_to_bar
from benchmarks.rows import Settings

OWN, PEER = "dseek", "transformers"
MAX_LOSS_ERROR = 2e-3
"""Largest relative difference of a step's loss."""
MEMORY_BAR = 0.10
"""Largest error of a predicted peak."""
ONE_PROCESS_BAR, SHARE_BAR, NUM_RANKS = 1.8, 0.35, 4
"""Least ratio of the peaks on one process; most that a rank of so many may hold of weights, gradients and state."""


def finetune_memory(settings: Settings) -> Outcome:
    """Peak memory of one sequence a step, in dseek with blocks computed twice and the head in chunks, in plain PyTorch
    without either; and what a rank of four holds with ZeRO 3.
    """
    config = _config(settings, rows=1, tokens=settings.pick(4096, 64), steps=2)
    memories = {OWN: {"gradient_checkpointing": True}, PEER: {"gradient_checkpointing": False}}
    answers = _in_turn(settings, config, memories, rounds=settings.pick(2, 1))
    own, peer = (median_of(answers[name], "peak_bytes") for name in (OWN, PEER))
    sharded = _config(settings, rows=1, tokens=settings.pick(256, 64), steps=2)
    shares = on_ranks(NUM_RANKS, _zero_3_shares, sharded)
    return Outcome(
        value=own / peer,
        unit="fraction",
        ratio=min(peer / own / ONE_PROCESS_BAR, ratio_to_bar(SHARE_BAR, max(shares.values()))),
        peer="transformers Trainer, nothing computed twice",
        details={
            "ratio_of_peaks": peer / own,
            "zero_3_shares_of_4": shares,
            **{name: spread_of(given, "peak_bytes") for name, given in answers.items()},
        },
    )


def _zero_3_shares(config: dict[str, Any]) -> dict[str, float]:
    """Train on this rank; the largest share of the whole that any rank holds when the optimiser steps."""
    import torch
    import torch.distributed as dist

    from dseek.core.config import from_mapping
    from dseek.train.config import TrainConfig
    from dseek.train.run import ready, train
    from dseek.train.shards import local

    own: dict[str, int] = {}

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Add up the bytes here and in all; the state exists from the first step on."""
        learned = [x for group in optimizer.param_groups for x in group["params"]]
        gradients = [x.grad for x in learned if x.grad is not None]
        state = [x for parts in optimizer.state.values() for x in parts.values() if x.dim()]
        for name, tensors in (("weights", learned), ("gradients", gradients), ("state", state)):
            own[name] = sum(local(x).nbytes for x in tensors)
            own[f"all {name}"] = sum(x.nbytes for x in tensors)

    with tempfile.TemporaryDirectory() as folder:
        memory = {"gradient_checkpointing": False, "shard_strategy": "zero3"}
        run = from_mapping(TrainConfig, config | {"output_dir": folder, "device": "cpu", "memory": memory})
        with ready(run) as training:
            train(training, lambda *_: None, on_ready=lambda it: it.optimizer.register_step_pre_hook(count))
    held: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(held, own)
    return {name: max(one[name] / one[f"all {name}"] for one in held) for name in ("weights", "gradients", "state")}


def finetune_speed(settings: Settings) -> Outcome:
    """A step without the first one, which pays for what is done once; no block is computed twice."""
    steps = settings.pick(4, 2)
    config = _config(settings, rows=settings.pick(4, 1), tokens=settings.pick(512, 64), steps=steps)
    config["memory"] = {"gradient_checkpointing": False}
    answers = _in_turn(settings, config, {}, rounds=settings.rounds)
    for given in answers.values():
        for answer in given:
            answer["steady_s"] = statistics.median(answer["step_s"][1:])
    own, peer = (median_of(answers[name], "steady_s") for name in (OWN, PEER))
    return Outcome(
        value=own,
        unit="s",
        ratio=peer / own,
        peer="transformers Trainer",
        details={name: spread_of(given, "steady_s") for name, given in answers.items()},
    )


def plan_train_memory(settings: Settings) -> Outcome:
    """The largest error over trainings that differ in what they hold."""
    changes: dict[str, dict[str, Any]] = {
        "full": {"memory": {"gradient_checkpointing": False}},
        "blocks computed twice": {"memory": {"gradient_checkpointing": True}},
        "8-bit moments": {"optim": "adamw_8bit", "memory": {"gradient_checkpointing": 15}},
        "moments on disk": {"memory": {"gradient_checkpointing": True, "offload_optimizer": "disk"}},
        "LoRA": {"method": "lora", "memory": {"gradient_checkpointing": False}},
        "four batches a step": {"gradient_accumulation_steps": 4, "memory": {"gradient_checkpointing": False}},
        "four batches a step, blocks computed twice": {
            "gradient_accumulation_steps": 4,
            "memory": {"gradient_checkpointing": True},
        },
    }
    plain = _config(settings, rows=2, tokens=settings.pick(512, 64), steps=2)
    found = {}
    for name, change in changes.items():
        answer = _train(settings, OWN, plain | change)
        _check_finite(name, answer["losses"])
        found[name] = {key: answer[key] for key in ("predicted_bytes", "peak_bytes")}
        found[name]["error"] = abs(answer["predicted_bytes"] / answer["peak_bytes"] - 1)
    worst = max(entry["error"] for entry in found.values())
    return Outcome(value=worst, unit="fraction", ratio=ratio_to_bar(MEMORY_BAR, worst), details=found)


def _config(settings: Settings, *, rows: int, tokens: int, steps: int) -> dict[str, Any]:
    folder = standard_library.root()
    texts = standard_library.shuffled(standard_library.training_files(), seed=5)[:20]
    return {
        "model": str(models.hf_folder(models.SMOLLM2)),
        "max_steps": steps,
        "per_device_train_batch_size": rows,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "save_steps": 0,
        "data": {"train": [str(folder / name) for name in texts], "max_length": tokens, "document_boundaries": "none"},
    }


def _in_turn(
    settings: Settings, config: dict[str, Any], memories: dict[str, dict[str, Any]], *, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Train with both engines in turn, where `memories` says so each with its own settings of memory."""
    configs = {name: config | ({"memory": memories[name]} if memories else {}) for name in (OWN, PEER)}
    calls = {name: (lambda _, name=name: _train(settings, name, configs[name])) for name in (OWN, PEER)}
    answers = alternate(calls, rounds=rounds, warm_ups=0)
    expected = answers[PEER][0]["losses"]
    for name, given in answers.items():
        for answer in given:
            _check_finite(name, answer["losses"])
            worst = max(abs(a / b - 1) for a, b in zip(answer["losses"], expected, strict=True))
            if worst > MAX_LOSS_ERROR:
                raise IncorrectError(f"{name}: losses {answer['losses']}, transformers {expected}")
    return answers


def _train(settings: Settings, engine: str, config: dict[str, Any]) -> dict[str, Any]:
    with PeerProcess("finetune", threads=settings.threads) as process:
        answer: dict[str, Any] = process.call("finetune", engine=engine, threads=settings.threads, config=config)
        return answer


def _check_finite(name: str, losses: list[float]) -> None:
    if not losses or not all(0.0 < loss < 20.0 for loss in losses):
        raise IncorrectError(f"{name}: losses {losses}")
