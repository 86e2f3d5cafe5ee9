"""Many random faults over many small trainings: every one must end with the bits of a training without faults."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import namespaces
from benchmarks.errors import BenchmarkError, IncorrectError
from benchmarks.forked import Forked
from benchmarks.paths import work_dir
from benchmarks.result import Outcome
from benchmarks.rows import Settings

if TYPE_CHECKING:
    from dseek.train.faults import Fault

NUM_RANKS = 2
FAULTS_OF_A_RUN = 8
"""So that a run sees faults that meet, and recoveries of recoveries."""

SEED = 20261
"""Of the first run; the others count on from it."""

EVERY = 3
"""Every so many runs are over two network namespaces, where links can be cut."""

LEASE_S = 3.0
LONGEST_S = 6.0
"""Drawn faults last up to so long: about half are noticed, half pass."""


def fault_soak(settings: Settings) -> Outcome:
    """200 faults of all kinds, drawn by seed, over trainings of two ranks under the supervisor.

    A run is wrong where it does not end, ends with other bits than the training without faults, begins anew from an
    older step than one whose save it had waited for, leaves a newest checkpoint with other bits, or missed a fault.
    Finished runs are kept until all are; a row that was stopped goes on with the next.
    """
    num_faults, num_steps = settings.pick(200, 4), settings.pick(24, 6)
    num_of_a_run = min(FAULTS_OF_A_RUN, num_faults)
    reason = namespaces.why_not()
    if reason:
        print(f"benchmarks: no link is cut: {reason}", file=sys.stderr)
    # Restarts are what this row is about; each would be a warning.
    logging.getLogger("dseek.train.supervisor").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="dseek-soak-", dir=_memory()) as scratch:
        wanted = _without_faults(Path(scratch), num_steps)
        runs = _runs(settings, Path(scratch), wanted, num_faults // num_of_a_run, num_of_a_run, num_steps, bool(reason))
    wrong = [run for run in runs if run["wrong"]]
    if wrong:
        told = "; ".join(f"seed {run['seed']} ({' '.join(run['faults'])}): {run['wrong']}" for run in wrong)
        raise IncorrectError(f"{len(wrong)} of {len(runs)} runs end wrong: {told}")
    recoveries = [restart["recovery_s"] for run in runs for restart in run["restarts"]]
    return Outcome(
        value=len(wrong) / len(runs),
        unit="fraction",
        ratio=1.0,
        details={
            "faults": sum(len(run["faults"]) for run in runs),
            "kinds": dict(Counter(fault.split(":")[0] for run in runs for fault in run["faults"])),
            "runs": len(runs),
            "seeds": [runs[0]["seed"], runs[-1]["seed"]],
            "recoveries": len(recoveries),
            "recovery_s": {
                "median": statistics.median(recoveries) if recoveries else None,
                "longest": max(recoveries, default=None),
            },
            "steps_done_again": sum(run["steps_done_again"] for run in runs),
            "seconds": sum(run["seconds"] for run in runs),
            "not_drawn": reason and f"cut: {reason}",
        },
    )


def _memory() -> str | None:
    """A folder in memory, where there is one: what is waited for must be the faults, not the disk's flushing."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _runs(
    settings: Settings, scratch: Path, wanted: list[str], num_runs: int, num_faults: int, num_steps: int, uncut: bool
) -> list[dict[str, Any]]:
    """All runs, those that are kept read, the others made."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dseek import __version__

    path = work_dir() / "fault-soak" / f"{__version__}-{num_steps}-{num_faults}.jsonl"
    kept = {} if settings.smoke else _kept(path)
    found = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=settings.smoke) as progress:
        task = progress.add_task("runs with faults", total=num_runs)
        for number in range(num_runs):
            key = f"{SEED + number} {'uncut' if uncut else 'cut'}"
            if key not in kept:
                # A smoke run is of the kind that has links to cut, where it can.
                over_network = not uncut and number % EVERY == 0
                kept[key] = _run(scratch / str(number), SEED + number, wanted, num_faults, num_steps, over_network)
                if not settings.smoke:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("a") as file:
                        file.write("\n" + json.dumps({"key": key, "run": kept[key]}) + "\n")
            found.append(kept[key])
            progress.advance(task)
    if not settings.smoke:
        path.unlink(missing_ok=True)  # the next row is a new measurement
    return found


def _kept(path: Path) -> dict[str, dict[str, Any]]:
    kept = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the line in whose middle a row was stopped
            entry = json.loads(line)
            kept[entry["key"]] = entry["run"]
    return kept


def _without_faults(folder: Path, num_steps: int) -> list[str]:
    """Digests of both ranks' states after a training without faults."""
    whole = folder / "whole"
    restarts = _train(whole, num_steps, [], lease_s=60.0)
    if restarts:
        raise BenchmarkError(f"the training without faults was restarted: {restarts[0]['reason']}; {_log_of(whole)}")
    return _digests(whole)


def _run(
    folder: Path, seed: int, wanted: list[str], num_faults: int, num_steps: int, over_network: bool
) -> dict[str, Any]:
    """One training with faults, and what is wrong with how it ended."""
    from dseek.core.errors import PeerError
    from dseek.train import faults

    kinds = faults.KINDS if over_network else tuple(kind for kind in faults.KINDS if kind != "cut")
    given = faults.draw(
        seed,
        num_faults,
        num_ranks=NUM_RANKS,
        num_steps=num_steps,
        kinds=kinds,
        device=namespaces.DEVICE,
        longest_s=LONGEST_S,
    )
    started_s = time.monotonic()
    restarts: list[dict[str, Any]] = []
    again = 0
    try:
        restarts = _train(folder, num_steps, given, over_network=over_network)
        wrong = _judge(folder, wanted, [str(fault) for fault in given], num_steps)
        reached = {start: restart["step"] for start, restart in enumerate(restarts, start=1)}
        for start in _starts(folder):
            again += max(reached.get(start["start"], 0) - start["first"][0], 0)
    except PeerError as error:
        wrong = f"it did not end: {error}"
    if wrong:
        left = work_dir() / "fault-soak" / f"wrong-{seed}"
        shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(folder, left)
        wrong += f" (its files are in {left})"
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "seed": seed,
        "faults": [str(fault) for fault in given],
        "over_network": over_network,
        "wrong": wrong,
        "restarts": restarts,
        "steps_done_again": again,
        "seconds": time.monotonic() - started_s,
    }


def _train(
    folder: Path, num_steps: int, given: Sequence[Fault], *, over_network: bool = False, lease_s: float = LEASE_S
) -> list[dict[str, Any]]:
    """Run the training to its end; its restarts."""
    from benchmarks.peers.soak_worker import train
    from dseek.train.supervisor import SupervisorConfig, supervise

    folder.mkdir(parents=True)
    with namespaces.namespaces(NUM_RANKS) if over_network else contextlib.nullcontext() as made:

        def launch(variables: Mapping[str, str]) -> Forked:
            rank = int(variables["RANK"])
            # Where ranks have networks of their own, they meet at the first one's address.
            known = dict(variables) if made is None else {**variables, "MASTER_ADDR": made.address(0)}
            return Forked(
                lambda: train(folder, num_steps, given),
                known,
                folder / f"log-{rank}",
                "" if made is None else made.name(rank),
            )

        config = SupervisorConfig(
            command=("soak_worker",),
            world_size=NUM_RANKS,
            lease_s=lease_s,
            start_s=60.0,
            grace_s=0.2,
            max_restarts=2 * len(given) + 2,
        )
        restarts = supervise(config, launch=launch)
    return [
        {"rank": one.rank, "reason": one.reason, "step": one.step, "recovery_s": one.recovery_s} for one in restarts
    ]


def _judge(folder: Path, wanted: list[str], given: list[str], num_steps: int) -> str:
    """What is wrong with a run that ended; empty where nothing is."""
    from benchmarks.peers.soak_worker import digest_state
    from dseek.train.checkpoints import newest
    from dseek.train.injection import struck

    if sorted(struck(folder / "struck")) != sorted(given):
        return "a fault did not strike"
    for start in _starts(folder):
        if len(set(start["first"])) > 1:
            return f"start {start['start']}: the ranks began from steps {start['first']}"
        if start["first"][0] < start["acknowledged"]:
            return f"start {start['start']} lost step {start['acknowledged']}: it began from {start['first'][0]}"
    if _digests(folder) != wanted:
        return "the final state has other bits"
    checkpoint = newest(folder / "checkpoints", folder / "remote")
    acknowledged = int((folder / "acknowledged").read_text())
    if checkpoint is None or checkpoint.step < acknowledged:
        return f"the checkpoint of step {acknowledged} is lost"
    if checkpoint.step == num_steps and digest_state(checkpoint.state()) != wanted[0]:
        return "the last checkpoint has other bits"
    return ""


def _starts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "starts").read_text().splitlines()]


def _digests(folder: Path) -> list[str]:
    return [(folder / f"digest-{rank}").read_text() for rank in range(NUM_RANKS)]


def _log_of(folder: Path) -> str:
    """The last of what the ranks said."""
    return "\n".join(path.read_text()[-1000:] for path in sorted(folder.glob("log-*")) if os.path.getsize(path))
