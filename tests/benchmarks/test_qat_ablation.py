"""The ablation of estimators: its files are checked, runs are kept and not repeated, gains are taken seed by seed."""

from __future__ import annotations

import argparse
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress

from benchmarks.experiments import fashion_mnist, qat_ablation
from dseek.core.errors import ConfigError


def write_data(folder: Path) -> None:
    """Ten classes that a bright row tells apart, 256 images of training and 100 of test."""
    for part, count in (("train", 256), ("t10k", 100)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = np.random.default_rng(0).integers(0, 60, (count, 28, 28), np.uint8)
        images[np.arange(count), 2 * labels + 3] = 255
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">{values.ndim + 1}I", 0x800 + values.ndim, *values.shape)
            with gzip.open(folder / f"{part}-{name}-ubyte.gz", "wb") as file:
                file.write(head + values.tobytes())


def run(folder: Path, arms: list[str]) -> list[dict[str, object]]:
    arguments = argparse.Namespace(
        data=folder,
        models=["mlp"],
        bits=[4],
        seeds=[0, 1],
        arms=arms,
        images=256,
        passes=4,
        qat_passes=2,
        qat_rate=None,
        out=folder / "runs.jsonl",
    )
    with Progress(disable=True) as progress:
        return qat_ablation.experiment(arguments, progress)


def test_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path)
    first = run(tmp_path, ["ptq", "ste"])
    assert len(first) == 6 and all(0 <= float(str(found["accuracy"])) <= 1 for found in first)
    assert max(float(str(found["accuracy"])) for found in first) > 0.5
    monkeypatch.setattr(qat_ablation, "run_arm", lambda *arguments: {"accuracy": 2.0})
    again = run(tmp_path, ["ptq", "ste", "lsq"])
    assert again[:6] == first and [found["accuracy"] for found in again[6:]] == [2.0, 2.0]


def test_gains_are_by_seed() -> None:
    accuracies = {"ste": (0.5, 0.8), "lsq": (0.6, 0.88)}
    runs: list[dict[str, object]] = [
        {"model": "mlp", "bits": 2, "arm": arm, "seed": seed, "accuracy": value}
        for arm, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    straight, learned = qat_ablation.summary(runs)
    assert straight.gain_over_ste is None and straight.num_seeds == 2
    assert learned.gain_over_ste == pytest.approx(0.09) and learned.gain_error == pytest.approx(0.01)


def test_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no"):
        fashion_mnist.read_data(tmp_path, "train")
    write_data(tmp_path)
    data = fashion_mnist.read_data(tmp_path, "train", 100)
    assert data.images.shape == (100, 1, 28, 28) and data.labels.dtype == torch.int64
    for content in (b"", b"\0" * 40, struct.pack(">4I", 0x803, 7, 28, 28) + b"\0" * 100):
        with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
            file.write(content)
        with pytest.raises(ConfigError, match="IDX"):
            fashion_mnist.read_data(tmp_path, "train")
