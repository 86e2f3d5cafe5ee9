"""Loses one of two replica groups of a continuous training, starts it again, and looks at what the other one did."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path

from benchmarks.errors import BenchmarkError, IncorrectError
from benchmarks.forked import Forked

KILLED_AT = 10
_LONGEST_S = 120.0


def lose_a_group(folder: Path) -> dict[str, float]:
    """Run the training.

    Args:
        folder: an empty one, for what the groups leave.

    Returns:
        `gap_s`, the longest time between two steps of the survivor around the kill; `back_s`, from the kill of the
        other to its next step.

    Raises:
        IncorrectError: the groups end with different weights, or the survivor stopped.
        BenchmarkError: a group failed.
    """
    from benchmarks.peers import continuous_worker

    started: list[Forked] = []

    def fork(name: str, function: functools.partial[None]) -> Forked:
        started.append(Forked(function, {}, folder / f"log-{name}"))
        return started[-1]

    def group(number: int, killed_at: int | None) -> Forked:
        return fork(str(number), functools.partial(continuous_worker.train, folder, number, killed_at))

    try:
        fork("lighthouse", functools.partial(continuous_worker.light, folder))
        _await(folder / "lighthouse", folder)
        survivor, victim = group(0, None), group(1, KILLED_AT)
        if victim.wait(_LONGEST_S) != -signal.SIGKILL:
            raise BenchmarkError(f"a group failed before it was killed:\n{_logs(folder)}")
        again = group(1, None)
        statuses = [one.wait(_LONGEST_S) for one in (survivor, again)]
    finally:
        for one in started:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)
                one.wait()
    if statuses != [0, 0]:
        raise BenchmarkError(f"the groups ended with statuses {statuses}:\n{_logs(folder)}")
    if (folder / "digest-0").read_text() != (folder / "digest-1").read_text():
        raise IncorrectError("the groups end with different weights")
    killed_s = float((folder / "killed").read_text())
    steps = [_steps(folder / f"steps-{number}") for number in range(2)]
    times = [at for at, _, _ in steps[0]]
    back = next((at for at, _, groups in steps[1] if at > killed_s and groups == 2), None)
    alone = [at for at, _, groups in steps[0] if at > killed_s and groups == 1]
    if back is None or not alone:
        raise IncorrectError("the lost group did not come back, or the survivor did not go on alone")
    # From the last step with both to the first one alone.
    before = max((at for at in times if at < min(alone)), default=killed_s)
    return {"gap_s": min(alone) - before, "back_s": back - killed_s}


def _steps(path: Path) -> list[tuple[float, int, int]]:
    """Time, number and groups of every committed step."""
    found = []
    for line in path.read_text().splitlines():
        at, step, groups = line.split()
        found.append((float(at), int(step), int(groups)))
    return found


def _await(path: Path, folder: Path) -> None:
    deadline = time.monotonic() + _LONGEST_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"there is no lighthouse:\n{_logs(folder)}")
        time.sleep(0.02)


def _logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-1500:] for path in sorted(folder.glob("log-*")))
