"""`dseek checkpoint ls|verify|restore|gc FOLDER`: what a training saved, whether it is whole, and getting it out."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dseek.cli.options import add_json
from dseek.core.errors import ConfigError, DseekError, FileFormatError

if TYPE_CHECKING:
    from dseek.train.checkpoints import Checkpoint

HELP = "list, verify, restore or clean up a training's checkpoints"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments.

    Args:
        parser: the verb's parser.
    """
    parser.add_argument(
        "action",
        choices=("ls", "verify", "restore", "gc"),
        help="ls: what is there; verify: read every byte of it; restore: write a checkpoint's tensors as safetensors; "
        "gc: delete what no checkpoint needs",
    )
    parser.add_argument("folder", type=Path, help="folder that the training writes its checkpoints to")
    parser.add_argument("--step", type=int, help="which checkpoint (verify: all, restore: the newest that is whole)")
    parser.add_argument("--remote", type=Path, help="second folder with the same checkpoints, for what is lost here")
    parser.add_argument("--out", type=Path, help="restore: the safetensors file to write")
    parser.add_argument(
        "--prefix", default="model", help="restore: the part of the state to write, keys joined by dots (%(default)s)"
    )
    parser.add_argument("--keep-last", type=int, help="gc: delete all complete checkpoints but the newest so many, too")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Do what `action` says; results go to stdout.

    Args:
        args: parsed arguments.

    Returns:
        The exit status: 1 where `verify` found damage.

    Raises:
        ConfigError: there is no such folder, or an argument is missing.
        FileFormatError: what is to be restored is damaged.
    """
    if not args.folder.is_dir():
        raise ConfigError(f"{args.folder} is no folder", needed="the folder of a training's checkpoints")
    actions = {"ls": _list, "verify": _verify, "restore": _restore, "gc": _collect}
    result, status = actions[args.action](args)
    if args.json:
        print(json.dumps(result))
    else:
        for line in result["lines"]:
            print(line)
    return status


def _list(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    from dseek.train.checkpoints import complete_steps, reading
    from dseek.train.checkpoints.manifest import MANIFEST, read_manifest

    found: list[dict[str, Any]] = []
    lines = []
    for step in complete_steps(args.folder):
        try:
            manifest = read_manifest(reading.step_folder(args.folder, step) / MANIFEST)
        except FileFormatError as error:
            found.append({"step": step, "error": str(error)})
            lines.append(f"step {step:>10}  damaged: {error}")
            continue
        stamp = datetime.fromtimestamp(manifest.created_s, UTC).isoformat(timespec="seconds")
        found.append(
            {
                "step": step,
                "created": stamp,
                "ranks": len(manifest.parts),
                "num_bytes": manifest.num_bytes,
                "new_bytes": manifest.new_bytes,
            }
        )
        lines.append(
            f"step {step:>10}  {stamp}  {len(manifest.parts)} ranks  {manifest.num_bytes / 1e6:,.1f} MB"
            f"  ({manifest.new_bytes / 1e6:,.1f} MB new on rank 0)"
        )
    return {"checkpoints": found, "lines": lines or [f"no complete checkpoint in {args.folder}"]}, 0


def _verify(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    from dseek.train.checkpoints import Checkpoint, complete_steps

    steps = complete_steps(args.folder) if args.step is None else [args.step]
    found, lines = [], []
    for step in steps:
        error = ""
        try:
            checkpoint = Checkpoint(args.folder, step, args.remote)
            with _Progress(f"step {step}", checkpoint.manifest.num_bytes) as progress:
                checkpoint.verify(progress.advance)
        except DseekError as failure:
            error = str(failure)
        found.append({"step": step, "is_whole": not error, "error": error})
        lines.append(f"step {step:>10}  {'whole' if not error else 'damaged: ' + error}")
    is_whole = all(one["is_whole"] for one in found)
    return {"checkpoints": found, "lines": lines or [f"no complete checkpoint in {args.folder}"]}, 0 if is_whole else 1


def _restore(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    from dseek.train.checkpoints import Checkpoint, newest

    if args.out is None:
        raise ConfigError("restore needs --out", needed="the safetensors file to write")
    checkpoint = Checkpoint(args.folder, args.step, args.remote) if args.step is not None else None
    checkpoint = checkpoint or newest(args.folder, args.remote)
    if checkpoint is None:
        raise FileFormatError(f"{args.folder} holds no whole checkpoint", remedy="try --remote, or look with `verify`")
    num_tensors = _write_tensors(checkpoint, args.prefix, args.out)
    result = {"step": checkpoint.step, "out": str(args.out), "num_tensors": num_tensors}
    return {**result, "lines": [f"step {checkpoint.step}: {num_tensors} tensors in {args.out}"]}, 0


def _write_tensors(checkpoint: Checkpoint, prefix: str, out: Path) -> int:
    """Write the tensors whose path starts with the prefix, whole or not at all; their number."""
    from safetensors.torch import save

    from dseek.core.files import atomic_write_bytes

    tensors = {}
    for name in checkpoint.names:
        joined = ".".join(map(str, json.loads(name)))
        if not prefix:
            tensors[joined] = checkpoint.tensor(name)
        elif joined == prefix or joined.startswith(prefix + "."):
            tensors[joined.removeprefix(prefix).removeprefix(".") or prefix] = checkpoint.tensor(name)
    if not tensors:
        heads = sorted({str(json.loads(name)[0]) for name in checkpoint.names if json.loads(name)})
        raise ConfigError(f"no tensor's path starts with {prefix!r}", needed="one of " + ", ".join(heads))
    atomic_write_bytes(out, save(tensors, metadata={"format": "pt", "step": str(checkpoint.step)}))
    return len(tensors)


def _collect(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    from dseek.train.checkpoints import collecting
    from dseek.train.checkpoints.files import Files

    if args.keep_last is not None and args.keep_last < 1:
        raise ConfigError(f"--keep-last is {args.keep_last}", needed="at least 1")
    if args.keep_last is None:
        freed = collecting.collect(args.folder, Files())
    else:
        freed = collecting.retire(args.folder, Files(), args.keep_last, 0, run="")
    return {"freed_bytes": freed, "lines": [f"{freed / 1e6:,.1f} MB freed"]}, 0


class _Progress:
    """Bytes read so far on stderr, where that is a terminal."""

    def __init__(self, label: str, num_bytes: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(label), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(file=sys.stderr), transient=True)
        self._task = self._progress.add_task(label, total=num_bytes)

    def __enter__(self) -> _Progress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, num_bytes: int) -> None:
        self._progress.advance(self._task, num_bytes)
