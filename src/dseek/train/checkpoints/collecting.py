"""Which checkpoints go, and which chunks nothing names any more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dseek.core.errors import FileFormatError
from dseek.train.checkpoints.chunks import ChunkStore
from dseek.train.checkpoints.files import TEMPORARY_SUFFIX, Files, locked
from dseek.train.checkpoints.manifest import MANIFEST, read_part
from dseek.train.checkpoints.reading import complete_steps, step_folder


def retire(folder: Path, files: Files, keep_last: int, keep_every: int, run: str) -> int:
    """Delete checkpoints that are no longer wanted, attempts of earlier starts, and chunks that nothing names.

    Args:
        folder: that holds the checkpoints.
        files: deletes.
        keep_last: newest ones to keep.
        keep_every: keep steps divisible by this; 0 keeps none besides.
        run: the training that goes on, whose incomplete steps are being written.

    Returns:
        Bytes freed.
    """
    complete = complete_steps(folder)
    unwanted = [step for step in complete[:-keep_last] if not keep_every or step % keep_every]
    for step in unwanted:
        # The manifest first: without it the rest is an attempt.
        files.remove(step_folder(folder, step) / MANIFEST)
    newest = complete[-1] if complete else -1
    abandoned = [step for step in _attempts(folder) if step < newest and _run_of(step_folder(folder, step)) != run]
    for step in {*unwanted, *abandoned}:
        files.remove_folder(step_folder(folder, step))
    return collect(folder, files) if unwanted or abandoned else 0


def forget_after(folder: Path, files: Files, step: int) -> list[int]:
    """Take the manifests from checkpoints of later steps, which a training that goes on from `step` could not use.

    They would count among the newest that are kept, although they are damaged.

    Args:
        folder: that holds the checkpoints.
        files: deletes.
        step: the last one that stays.

    Returns:
        The steps that are complete no longer.
    """
    later = [found for found in complete_steps(folder) if found > step]
    for found in later:
        files.remove(step_folder(folder, found) / MANIFEST)
    return later


def collect(folder: Path, files: Files) -> int:
    """Delete chunks that no part names, and files that were never finished; nothing where somebody is writing.

    Args:
        folder: that holds the checkpoints.
        files: deletes.

    Returns:
        Bytes freed.

    Raises:
        FileFormatError: a complete checkpoint's part cannot be read, so what it names is not known.
    """
    with locked(folder, alone=True) as is_held:
        if not is_held:
            return 0
        named: set[str] = set()
        complete = set(complete_steps(folder))
        for path in _parts(folder):
            try:
                named |= set(read_part(path).chunks)
            except FileFormatError:
                if int(path.parent.name) in complete:
                    raise
        store = ChunkStore(folder / "chunks", files)
        freed = 0
        for digest in store.digests() - named:
            freed += store.path(digest).stat().st_size
            files.remove(store.path(digest))
        for path in folder.glob(f"*/*/.*{TEMPORARY_SUFFIX}"):
            freed += path.stat().st_size
            files.remove(path)
        return freed


def _parts(folder: Path) -> Iterator[Path]:
    return (folder / "steps").glob("[0-9]*/part-*.json")


def _attempts(folder: Path) -> list[int]:
    """Steps without a manifest."""
    steps = folder / "steps"
    found = [int(entry.name) for entry in steps.iterdir() if entry.name.isdigit()] if steps.is_dir() else []
    return sorted(set(found) - set(complete_steps(folder)))


def _run_of(folder: Path) -> str:
    for path in folder.glob("part-*.json"):
        try:
            return read_part(path).run
        except FileFormatError:
            continue
    return ""
