"""Text to measure with: the standard library's own source, which every Python has."""

from __future__ import annotations

import sysconfig
from pathlib import Path

MODULES = (
    "argparse",
    "ast",
    "asyncio/base_events",
    "calendar",
    "collections/__init__",
    "configparser",
    "csv",
    "dataclasses",
    "datetime",
    "difflib",
    "email/message",
    "enum",
    "fractions",
    "functools",
    "heapq",
    "http/client",
    "inspect",
    "json/decoder",
    "logging/__init__",
    "multiprocessing/pool",
    "pathlib",
    "pickle",
    "random",
    "shutil",
    "statistics",
    "subprocess",
    "tarfile",
    "textwrap",
    "threading",
    "typing",
    "unittest/case",
    "zipfile",
)
"""Modules whose source is read, in this order, the same for everybody."""


def standard_library_text(num_characters: int) -> str:
    """The beginning of the source of `MODULES`, one after another.

    Args:
        num_characters: how much; less where the modules have less.

    Returns:
        Source text.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    pieces: list[str] = []
    length = 0
    for name in MODULES:
        path = root / f"{name}.py"
        if path.exists() and length < num_characters:
            pieces.append(path.read_text(encoding="utf-8"))
            length += len(pieces[-1])
    return "".join(pieces)[:num_characters]
