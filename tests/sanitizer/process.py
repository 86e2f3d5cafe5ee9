"""Processes that run the kernels under AddressSanitizer: how they are started, and how they find the sanitized module.

The interpreter itself is not sanitized, so the sanitizer's library is loaded before it; the C++ library comes along
because the sanitizer looks for its exceptions at the start. A finding ends the process with a report on stderr.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

REPO = Path(__file__).resolve().parents[2]
BUILD = REPO / "build" / "sanitize"
OPTIONS = {
    # A size that no machine has gives MemoryError, as it does without the sanitizer.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:exitcode=99",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def library(name: str) -> str:
    """Find one of the compiler's libraries.

    Args:
        name: its file name.

    Returns:
        The path.

    Raises:
        FileNotFoundError: there is no g++, or it has no such library.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("g++ is missing; the sanitizer's library is its own")
    command = [compiler, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        raise FileNotFoundError(f"g++ has no {name}; install the sanitizer that belongs to this compiler")
    return path


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS` with the sanitizer loaded.

    Args:
        module: one of `tests.sanitizer` that calls `load`.
        arguments: for it.

    Returns:
        The finished process; anything but status 0 is a finding.
    """
    preload = ":".join(library(name) for name in ("libasan.so", "libstdc++.so.6"))
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": preload, "DSEEK_KERNELS": "auto", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)


def load() -> ModuleType:
    """Import `dseek._native` from the sanitized build; everything that asks for it later gets the same module.

    Returns:
        The module.

    Raises:
        ImportError: it is not built.
    """
    import dseek

    dseek.__path__.insert(0, str(BUILD))
    compiled = importlib.import_module("dseek._native")
    if Path(str(compiled.__file__)).parent != BUILD:
        raise ImportError(f"the kernels are not built with the sanitizer in {BUILD}: `make sanitize`")
    return compiled
