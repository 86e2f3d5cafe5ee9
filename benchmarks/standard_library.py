"""The standard library's source, parted once and for all into files to learn from and files to measure with.

What is trained on such text (a gate, `dseek train-gate`) takes `training_files`, and the rows that judge it take
`held_out_files`. A file's part depends on its path alone, so it is the same everywhere, whatever files a Python lacks
or has in addition.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.errors import BenchmarkError

HELD_OUT_SHARE = 0.15
"""Share of the files that nothing may be trained on."""

LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
"""Folders that are not the library's own, that some distributions leave out, or that hold tables and a manual."""


def root() -> Path:
    """Folder of the standard library of the running Python."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(name: str) -> bool:
    """Say whether a file is kept from training.

    Args:
        name: path below the library's folder, with forward slashes.
    """
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return number < HELD_OUT_SHARE * 2**64


def source_files(folder: Path | None = None) -> list[str]:
    """List the files that are parted.

    Args:
        folder: the library; None is the running Python's.

    Returns:
        Paths below the folder with forward slashes, sorted: every `.py` file that is not empty, without `LEFT_OUT`.
    """
    folder = root() if folder is None else folder
    paths = [path for path in folder.rglob("*.py") if path.is_file() and path.stat().st_size > 0]
    names = [path.relative_to(folder) for path in paths]
    return sorted(name.as_posix() for name in names if not LEFT_OUT.intersection(name.parts))


def training_files(folder: Path | None = None) -> list[str]:
    """The files to learn from, as `source_files` names them.

    Args:
        folder: the library; None is the running Python's.
    """
    return [name for name in source_files(folder) if not is_held_out(name)]


def held_out_files(folder: Path | None = None) -> list[str]:
    """The files to measure with, as `source_files` names them.

    Args:
        folder: the library; None is the running Python's.
    """
    return [name for name in source_files(folder) if is_held_out(name)]


def read(name: str, folder: Path | None = None) -> str:
    """Read a file; bytes that are no UTF-8 become replacement characters.

    Args:
        name: path below the folder.
        folder: the library; None is the running Python's.
    """
    return ((root() if folder is None else folder) / name).read_text(encoding="utf-8", errors="replace")


def shuffled(names: Iterable[str], seed: int) -> list[str]:
    """Put files in an order that depends on the seed alone.

    Args:
        names: the files.
        seed: of the order.
    """
    order = sorted(names)
    random.Random(seed).shuffle(order)
    return order


def joined(files: Sequence[list[int]], num_tokens: int, count: int) -> list[list[int]]:
    """Join whole files until a sequence is full; its last file is cut there, and no file serves two sequences.

    Args:
        files: token ids of each file, in their order.
        num_tokens: length of a sequence.
        count: sequences to make.

    Returns:
        So many lists of so many ids.

    Raises:
        BenchmarkError: the files do not suffice.
    """
    sequences: list[list[int]] = []
    ids: list[int] = []
    for file in files:
        if len(sequences) == count:
            break
        ids += file
        if len(ids) >= num_tokens:
            sequences.append(ids[:num_tokens])
            ids = []
    if len(sequences) < count:
        raise BenchmarkError(
            f"the files held out of the standard library fill {len(sequences)} sequences of {num_tokens} tokens, "
            f"{count} are needed"
        )
    return sequences
