"""What share of the time a training makes steps that last, when nodes fail and it goes on from its last snapshot.

An estimate by simulation: failures are a Poisson process, as often for every node; each stops all nodes, throws away
what was computed since the last snapshot, and costs a recovery whose time is drawn from measured ones. A failure during
a recovery begins a new recovery.

What it does not know: failures that come together (a rack, a power line), nodes that fail again after they came back,
the time without a spare, and what saving itself costs.
"""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dseek.core.errors import ConfigError

DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AvailabilityConfig:
    """A training and how its nodes fail."""

    recovery_s: tuple[float, ...]
    """Measured times from a failure to the next step; one is drawn for each failure."""
    step_s: float
    """Time of a step."""
    snapshot_steps: int = 1
    """Steps from one snapshot to the next."""
    num_nodes: int = 2
    """Nodes, each of which stops all when it fails."""
    failures_per_node_day: float = 1.0
    """How often a node fails, on the average."""
    days: float = 365.0
    """Simulated time of a run."""
    num_runs: int = 20
    """Runs, each with random numbers of its own."""
    seed: int = 0
    """Of the random numbers."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not self.recovery_s or not all(math.isfinite(one) and one >= 0 for one in self.recovery_s):
            raise ConfigError(f"the recovery times are {self.recovery_s}", needed="measured seconds, at least one")
        positive = (self.step_s, self.failures_per_node_day, self.days)
        if not all(math.isfinite(one) and one > 0 for one in positive):
            raise ConfigError(
                f"step_s, failures_per_node_day and days are {', '.join(map(str, positive))}", needed="more than 0"
            )
        if min(self.snapshot_steps, self.num_nodes, self.num_runs) < 1:
            raise ConfigError(
                f"snapshot_steps, num_nodes and num_runs are {self.snapshot_steps}, {self.num_nodes}, {self.num_runs}",
                needed="at least 1",
            )

    @property
    def failures_per_s(self) -> float:
        """Of all nodes together."""
        return self.num_nodes * self.failures_per_node_day / DAY_S

    @property
    def snapshot_s(self) -> float:
        """Undisturbed time from one snapshot to the next."""
        return self.snapshot_steps * self.step_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Availability:
    """What came out, shares of the whole time."""

    available: float
    """Steps that last: the mean of the runs."""
    recovering: float
    """Recoveries."""
    lost: float
    """Steps that a failure threw away."""
    lowest: float
    """Of the runs' `available`."""
    highest: float
    """Of the runs' `available`."""
    standard_error: float
    """Of the mean; 0 for a single run."""
    num_failures: int
    """In all runs."""
    lost_steps: float
    """Thrown away at a failure, on the average."""


def simulate(config: AvailabilityConfig) -> Availability:
    """Let nodes fail, and count.

    Args:
        config: the training and its failures.

    Returns:
        The shares and their spread.
    """
    runs = [_simulate_once(config, random.Random(f"{config.seed} {index}")) for index in range(config.num_runs)]
    total_s = config.days * DAY_S
    available = [1.0 - (recovering_s + lost_s) / total_s for recovering_s, lost_s, _ in runs]
    num_failures = sum(failures for _, _, failures in runs)
    lost_s = sum(lost for _, lost, _ in runs)
    spread = statistics.stdev(available) / math.sqrt(len(available)) if len(available) > 1 else 0.0
    return Availability(
        available=statistics.fmean(available),
        recovering=statistics.fmean(recovering_s for recovering_s, _, _ in runs) / total_s,
        lost=lost_s / len(runs) / total_s,
        lowest=min(available),
        highest=max(available),
        standard_error=spread,
        num_failures=num_failures,
        lost_steps=lost_s / config.step_s / max(num_failures, 1),
    )


def _simulate_once(config: AvailabilityConfig, chance: random.Random) -> tuple[float, float, int]:
    """One run: seconds of recoveries, seconds of work thrown away, failures."""
    now_s, end_s = 0.0, config.days * DAY_S
    recovering_s = lost_s = 0.0
    num_failures = 0
    while True:
        # 1. Work until the next failure or the end; what lies after the last snapshot is lost with a failure.
        worked_s = chance.expovariate(config.failures_per_s)
        if now_s + worked_s >= end_s:
            return recovering_s, lost_s, num_failures
        now_s += worked_s
        num_failures += 1
        lost_s += math.fmod(worked_s, config.snapshot_s)
        # 2. Recover; a failure in the middle begins it anew.
        while True:
            needed_s = chance.choice(config.recovery_s)
            next_s = chance.expovariate(config.failures_per_s)
            spent_s = min(needed_s, next_s, end_s - now_s)
            recovering_s += spent_s
            now_s += spent_s
            if now_s >= end_s:
                return recovering_s, lost_s, num_failures
            if spent_s == needed_s:
                break
            num_failures += 1


def expected(failures_per_s: float, recovery_s: float, snapshot_s: float) -> float:
    """Share of the time in steps that last, where every recovery takes equally long.

    Args:
        failures_per_s: of all nodes together, exponentially distributed in between.
        recovery_s: of each recovery; failures happen in it too.
        snapshot_s: undisturbed time from one snapshot to the next; 0 where nothing is ever lost.

    Returns:
        The share, in the limit of a long time.

    Source:
        J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation
        Computer Systems 22 (2006), equation 20, for a checkpoint that takes no time: exp(-r R) r t / (exp(r t) - 1).
    """
    exponent = failures_per_s * snapshot_s
    kept = exponent / math.expm1(exponent) if exponent else 1.0
    return math.exp(-failures_per_s * recovery_s) * kept


def most_nodes(config: AvailabilityConfig, bar: float) -> int:
    """Count the nodes up to which a training stays available, by the mean recovery and `expected`.

    Args:
        config: the training; its number of nodes is not looked at.
        bar: least share of the time.

    Returns:
        Nodes; 0 where one already is too many.
    """
    recovery_s, per_node_s = statistics.fmean(config.recovery_s), config.failures_per_node_day / DAY_S

    def is_met(num_nodes: int) -> bool:
        return expected(num_nodes * per_node_s, recovery_s, config.snapshot_s) >= bar

    if not 0 < bar < 1:
        raise ConfigError(f"the bar is {bar}", needed="a share between 0 and 1")
    high = 1
    while is_met(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_met(middle) else (low, middle)
    return low


def draw(points: dict[int, Availability], config: AvailabilityConfig, bar: float, path: Path) -> None:
    """Draw availability against the number of nodes.

    Args:
        points: simulated, by number of nodes.
        config: what they share.
        bar: drawn as a line.
        path: of the picture; its ending says which format.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure, axes = _axes()
    nodes = sorted(points)
    for share, label, style in _curves(points, config, nodes):
        axes.plot(nodes, [100 * (1 - one) for one in share], style, label=label)
    low, high = ([100 * (1 - getattr(points[one], name)) for one in nodes] for name in ("highest", "lowest"))
    axes.fill_between(nodes, low, high, alpha=0.25, label=f"{config.num_runs} runs of {config.days:g} days")
    axes.axhline(100 * (1 - bar), color="grey", linestyle=":", label=f"{100 * bar:g} % available")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="nodes",
        ylabel="time without lasting steps, %",
        title=f"{config.failures_per_node_day:g} failures a node and day, a snapshot every {config.snapshot_s:.3g} s",
    )
    axes.legend()
    part = path.with_name(f".{path.name}.part{path.suffix}")
    figure.savefig(part, dpi=120)
    part.replace(path)


def _curves(
    points: dict[int, Availability], config: AvailabilityConfig, nodes: list[int]
) -> list[tuple[list[float], str, str]]:
    mean_s, per_node_s = statistics.fmean(config.recovery_s), config.failures_per_node_day / DAY_S
    formula = [expected(count * per_node_s, mean_s, config.snapshot_s) for count in nodes]
    return [
        ([points[one].available for one in nodes], "simulated, mean", "o-"),
        (formula, "formula, mean recovery", "k--"),
    ]


def _axes() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a picture needs matplotlib", remedy="pip install 'dseek[plot]'") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    return figure, figure.add_subplot()
