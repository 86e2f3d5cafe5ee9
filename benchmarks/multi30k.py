"""Multi30k, English to German: the pairs in a folder that the user gives.

The files are those of the task's own release (Elliott et al. 2016, Multi30K: Multilingual English-German Image
Descriptions): `train.en`, `val.en`, `test_2016_flickr.en` and their `.de`, under gzip or not, a sentence a line.
"""

from __future__ import annotations

import gzip
from pathlib import Path

from benchmarks.errors import BenchmarkError

PARTS = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
"""What a part is for, to its files' name."""
_MAX_BYTES = 256 << 20


def read_part(folder: Path, part: str) -> tuple[list[str], list[str]]:
    """Read the pairs of a part.

    Args:
        folder: with the files.
        part: a key of `PARTS`.

    Returns:
        English sentences and their German translations.

    Raises:
        BenchmarkError: a file is missing, or the two have different numbers of lines.
    """
    english, german = (_lines(folder, f"{PARTS[part]}.{language}") for language in ("en", "de"))
    if len(english) != len(german):
        raise BenchmarkError(f"{folder} has {len(english)} English and {len(german)} German lines for {part}")
    return english, german


def _lines(folder: Path, name: str) -> list[str]:
    packed, plain = folder / f"{name}.gz", folder / name
    if packed.is_file():
        with gzip.open(packed) as file:
            data = file.read(_MAX_BYTES)
    elif plain.is_file():
        data = plain.read_bytes()[:_MAX_BYTES]
    else:
        raise BenchmarkError(f"{folder} has neither {packed.name} nor {name}: give the folder of Multi30k")
    return [line.strip() for line in data.decode("utf-8").splitlines()]
