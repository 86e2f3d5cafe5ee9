"""Small trainings for tests: models, texts, conversations, and a training from a few words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dseek.core.config import from_mapping
from dseek.train.config import TrainConfig
from dseek.train.run import ready, train
from dseek.train.trainer import TrainResult

Told = list[tuple[str, dict[str, Any]]]


def write_texts(path: Path, count: int = 40) -> Path:
    """Write JSONL with short texts of different lengths."""
    sentences = [f"the quick brown fox {idx} jumps over the lazy dog. " * (1 + idx % 5) for idx in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences))
    return path


def config_of(model: Path, data: Path, output_dir: Path, **changes: Any) -> TrainConfig:
    """A training of six steps of two rows of 32 tokens; `data__max_length` changes a key of the table `data`."""
    plain: dict[str, Any] = {
        "model": str(model),
        "output_dir": str(output_dir),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "save_steps": 0,
        "logging_steps": 1,
        "device": "cpu",
        "data": {"train": [str(data)], "max_length": 32},
    }
    for key, value in changes.items():
        table, _, inner = key.partition("__")
        if inner:
            plain.setdefault(table, {})[inner] = value
        else:
            plain[key] = value
    return from_mapping(TrainConfig, plain)


def run(config: TrainConfig, stop_after: int | None = None) -> tuple[TrainResult, Told]:
    """Train; says how it ended and what was told meanwhile."""
    told: Told = []
    trainers: list[Any] = []

    def listen(what: str, figures: dict[str, Any]) -> None:
        told.append((what, figures))
        if what == "step" and figures["global_step"] == stop_after:
            trainers[0].stop()

    with ready(config) as training:
        return train(training, listen, on_ready=trainers.append), told


def losses(told: Told) -> list[float]:
    """Loss of every step."""
    return [figures["loss"] for what, figures in told if what == "step"]
