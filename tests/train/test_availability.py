"""Availability by simulation, against what the formula says where there is one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dseek.core.errors import ConfigError
from dseek.train import availability
from dseek.train.availability import DAY_S, AvailabilityConfig, expected, most_nodes, simulate


def _config(**given: Any) -> AvailabilityConfig:
    return AvailabilityConfig(**{"recovery_s": (600.0,), "step_s": 60.0, "days": 400.0, "seed": 3, **given})


@pytest.mark.parametrize(
    ("num_nodes", "recovery_s", "snapshot_steps"), [(1, 600.0, 1), (8, 600.0, 20), (24, 1800.0, 60), (24, 0.0, 60)]
)
def test_the_simulation_meets_the_formula(num_nodes: int, recovery_s: float, snapshot_steps: int) -> None:
    config = _config(num_nodes=num_nodes, recovery_s=(recovery_s,), snapshot_steps=snapshot_steps)
    found = simulate(config)
    wanted = expected(config.failures_per_s, recovery_s, config.snapshot_s)
    # Five standard errors: one seed in two million is further off where the simulation is right.
    assert abs(found.available - wanted) <= 5 * found.standard_error
    assert found.standard_error < 0.2 * (1 - wanted)
    assert found.available + found.recovering + found.lost == pytest.approx(1)
    assert found.lowest <= found.available <= found.highest


def test_the_formula_at_its_ends() -> None:
    rate = 1 / DAY_S
    assert expected(rate, 0.0, 0.0) == 1.0
    assert expected(rate, 864.0, 0.0) == pytest.approx(math.exp(-0.01))
    # Half an interval is lost on the average, as long as failures are rare.
    assert 1 - expected(rate, 0.0, 100.0) == pytest.approx(50.0 * rate, rel=1e-3)


def test_steps_are_lost_in_between_snapshots() -> None:
    every, seldom = (simulate(_config(recovery_s=(0.0,), snapshot_steps=steps, num_nodes=4)) for steps in (1, 100))
    assert every.lost_steps == pytest.approx(0.5, rel=0.05) and seldom.lost_steps == pytest.approx(50, rel=0.05)
    assert every.num_failures == pytest.approx(20 * 400 * 4, rel=0.05)


def test_recoveries_are_drawn_from_what_was_measured() -> None:
    mixed = simulate(_config(recovery_s=(100.0, 500.0), step_s=1.0))
    assert mixed.recovering == pytest.approx(300 * mixed.num_failures / (20 * 400 * DAY_S), rel=0.02)


def test_the_seed_decides() -> None:
    assert simulate(_config()) == simulate(_config()) != simulate(_config(seed=4))
    assert simulate(_config(num_runs=1)).standard_error == 0


def test_most_nodes() -> None:
    config = _config(recovery_s=(3.0,), step_s=0.5)
    count = most_nodes(config, 0.9997)
    for nodes, is_met in ((count, True), (count + 1, False)):
        assert (expected(nodes / DAY_S, 3.0, config.snapshot_s) >= 0.9997) is is_met
    assert most_nodes(_config(recovery_s=(1e5,)), 0.9997) == 0
    with pytest.raises(ConfigError, match="share between 0 and 1"):
        most_nodes(config, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [{"recovery_s": ()}, {"recovery_s": (-1.0,)}, {"recovery_s": (math.nan,)}, {"step_s": 0}, {"days": math.inf}]
    + [{name: 0} for name in ("snapshot_steps", "num_nodes", "num_runs", "failures_per_node_day")],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        _config(**wrong)


def test_it_is_drawn(tmp_path: Path) -> None:
    config = _config(days=20.0, num_runs=2)
    points = {count: simulate(_config(days=20.0, num_runs=2, num_nodes=count)) for count in (1, 4)}
    availability.draw(points, config, 0.9997, tmp_path / "availability.png")
    assert (tmp_path / "availability.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["availability.png"]
