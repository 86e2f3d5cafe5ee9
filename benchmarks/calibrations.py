"""Calibrations of the rows' models, made once and kept with the models in dseek's cache."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import standard_library
from benchmarks.paths import work_dir
from dseek.core.errors import FileFormatError

if TYPE_CHECKING:
    from dseek.models.files import ModelFiles

NUM_FILES = 8
"""Files of the standard library's training part that are read."""


def calibration_file(
    folder: str, *, max_tokens: int, sensitivity_tokens: int, threads: int, formats: tuple[str, ...]
) -> Path:
    """Calibrate a model on source it will not be judged by, with estimated losses.

    Args:
        folder: the model.
        max_tokens: tokens for the statistics.
        sensitivity_tokens: tokens for the losses.
        threads: threads of PyTorch.
        formats: whose losses are found; the plan's prior stands in for the others.

    Returns:
        The file.
    """
    import torch

    from dseek.compress.calibration import CalibrationSettings, calibrate, cut
    from dseek.models.calibration_file import weights_fingerprint
    from dseek.models.files import open_model

    torch.set_num_threads(threads)
    settings = CalibrationSettings(
        max_tokens=max_tokens, sensitivity="estimate", sensitivity_tokens=sensitivity_tokens, formats=formats
    )
    names = random.Random(0).sample(standard_library.training_files(), NUM_FILES)
    with open_model(folder) as files:
        name = f"{weights_fingerprint(files)}-{max_tokens}-{sensitivity_tokens}-{'-'.join(formats)}.json"
        path = work_dir() / "calibrations" / name
        print(f"benchmarks: calibrating {folder} into {path}", file=sys.stderr)
        texts = [(name, _token_ids(files, name, max_tokens)) for name in names]
        calibrate(files, cut(texts, settings), names, path, settings, lambda what, done, total: None)
    return path


def _token_ids(files: ModelFiles, name: str, num_tokens: int) -> list[int]:
    """Token ids of a file; random ones for a model with random weights, which has no tokenizer."""
    try:
        tokenizer = files.tokenizer()
    except FileFormatError:
        order = random.Random(name)
        return [order.randrange(files.shape.vocab_size) for _ in range(num_tokens)]
    text = (standard_library.root() / name).read_text(encoding="utf-8")
    return list(tokenizer.encode(text))


def held_out_ids(folder: str, num_tokens: int) -> list[int]:
    """Token ids of source that no calibration has read.

    Args:
        folder: the model.
        num_tokens: how many.
    """
    from dseek.models.files import open_model

    ids: list[int] = []
    names = standard_library.held_out_files()
    random.Random(1).shuffle(names)
    with open_model(folder) as files:
        for name in names:
            text = (standard_library.root() / name).read_text(encoding="utf-8")
            ids += files.tokenizer().encode(text, add_special_tokens=False)
            if len(ids) >= num_tokens:
                return ids[:num_tokens]
    return ids
