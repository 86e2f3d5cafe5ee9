"""The experiment on frequency splits: images in, splits of a kind, a picture; the network itself is not needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.experiments import frequency_split as experiment
from benchmarks.experiments import lite0
from dseek.compress.frequency_split import FrequencySplitConfig, convert
from dseek.core.errors import ConfigError


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for index, size in enumerate([(300, 240), (200, 500), (64, 64)]):
        pixels = random.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_images_are_cut_and_held_out(photographs: Path) -> None:
    calibration, held_out = lite0.load_images([photographs])
    assert calibration.shape == (6, 3, 224, 224) and held_out.shape == (3, 3, 224, 224)
    assert -1 <= float(calibration.min()) < float(calibration.max()) <= 1.01
    with pytest.raises(ConfigError, match="at least two"):
        lite0.load_images([photographs / "0.png"])
    (photographs / "0.png").write_bytes(b"broken")
    with pytest.raises(ConfigError, match="photograph"):
        lite0.load_images([photographs])


def test_kinds_are_taken_from_the_report_and_drawn(photographs: Path) -> None:
    images = lite0.load_images([photographs])[0][:, :, :24, :24]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)).requires_grad_(False)
    _, report = convert(network, images, FrequencySplitConfig(cost="operations", max_error=0.01))
    assert experiment.relative_operations(report, {}) == 1
    for kind in experiment.KINDS:
        splits = experiment.splits_of_kind(report, kind, 0.01)
        spent = experiment.relative_operations(report, splits)
        assert (kind == "terms") == (spent > 1) or not splits
    assert experiment.relative_operations(report, report.splits) < 0.6
    target = photographs / "spectrum.png"
    experiment.draw(report.layers[0], target)
    with Image.open(target) as picture:
        assert picture.format == "PNG" and not list(photographs.glob(".*"))
