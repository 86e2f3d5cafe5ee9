"""How much of the time a training makes lasting steps: failures simulated, recoveries measured."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from typing import Any

from benchmarks import result
from benchmarks.errors import BenchmarkError
from benchmarks.machine import describe
from benchmarks.paths import work_dir
from benchmarks.result import Outcome, ratio_to_bar
from benchmarks.rows import Settings

BAR = 0.9997
NUM_NODES = 2
"""What `recovery` measures with: two ranks, here one a node."""

FAILURES_A_DAY = 1.0
"""Of any node."""
STEP_S = 1.0
SNAPSHOT_STEPS = 10
NOTICE_S = 5.0
"""A node without power says nothing: it is noticed when its lease is over. `recovery` kills a process, which its
supervisor sees at once, so this is added to every recovery it measured."""

SEED = 0
DRAWN_NODES = (1, 2, 4, 8, 16, 32, 64)


def availability(settings: Settings) -> Outcome:
    """An estimate: two nodes of which one fails a day, steps of a second, a snapshot every ten.

    Recovery times are those that the row `recovery` measured on this machine, and, where it has not been run, measures
    now. What a failure throws away since the last snapshot counts as not available. What it comes to with up to 64
    nodes, each of which fails as often, is drawn beside the formula for the mean recovery; a failure a node and day is
    in the details.
    """
    from dseek.train.availability import AvailabilityConfig, draw, expected, most_nodes, simulate

    measured_s, whence = _recoveries(settings)
    config = AvailabilityConfig(
        recovery_s=tuple(NOTICE_S + one for one in measured_s),
        step_s=STEP_S,
        snapshot_steps=SNAPSHOT_STEPS,
        num_nodes=NUM_NODES,
        failures_per_node_day=FAILURES_A_DAY / NUM_NODES,
        days=365.0 if not settings.smoke else 10.0,
        num_runs=settings.pick(20, 2),
        seed=SEED,
    )
    points = {count: simulate(dataclasses.replace(config, num_nodes=count)) for count in DRAWN_NODES}
    found = points[NUM_NODES]
    picture = work_dir() / ("availability-smoke.png" if settings.smoke else "availability.png")
    draw(points, config, BAR, picture)
    print(f"benchmarks: drew {picture}", file=sys.stderr)
    return Outcome(
        value=found.available,
        unit="fraction",
        ratio=ratio_to_bar(1 - BAR, 1 - found.available),
        details={
            "assumed": {
                "nodes": NUM_NODES,
                "failures_a_day": FAILURES_A_DAY,
                "step_s": STEP_S,
                "snapshot_steps": SNAPSHOT_STEPS,
                "notice_s": NOTICE_S,
                "days": config.days,
                "runs": config.num_runs,
                "seed": SEED,
            },
            "recovery_s": list(measured_s),
            "recoveries_from": whence,
            "simulated": dataclasses.asdict(found),
            "by_formula": expected(config.failures_per_s, statistics.fmean(config.recovery_s), config.snapshot_s),
            "most_nodes": most_nodes(config, BAR),
            "by_nodes": {count: point.available for count, point in points.items()},
            "with_a_failure_a_node_and_day": simulate(dataclasses.replace(config, failures_per_node_day=1.0)).available,
        },
    )


def _recoveries(settings: Settings) -> tuple[tuple[float, ...], str]:
    """Measured recovery times, and where they are from."""
    from benchmarks.rows.checkpoints import recovery

    record: dict[str, Any] = {} if settings.smoke else result.kept(describe(settings.threads)).get("recovery", {})
    if record.get("correct"):
        times, whence = record["details"].get("dseek"), f"recovery, measured at {record['measured_at']}"
    else:
        times, whence = recovery(settings).details["dseek"], "recovery, measured for this row"
    if not times or not all(isinstance(one, (int, float)) for one in times):
        raise BenchmarkError("the kept result of `recovery` has no times; run `python -m benchmarks run recovery`")
    return tuple(map(float, times)), whence
