"""Where the harness keeps things: the cache, the repository, the stored results."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
"""Root of the repository: the folder that holds `benchmarks`."""

RESULTS_DIR = Path(__file__).resolve().parent / "results"
"""Dated results that are kept with the source."""


def cache_dir() -> Path:
    """dseek's cache folder: `DSEEK_CACHE_DIR`, else `dseek` in the user's cache (as `dseek.core.environment` says)."""
    chosen = os.environ.get("DSEEK_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "dseek"


def work_dir() -> Path:
    """Folder for models prepared for the peers and for the last results; made if missing."""
    folder = cache_dir() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
