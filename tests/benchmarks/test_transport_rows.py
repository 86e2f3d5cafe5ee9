"""The rows about transport and checkpoints run on their smallest sizes."""

from __future__ import annotations

import pytest

from benchmarks.rows import ROWS, Settings


@pytest.mark.rows
@pytest.mark.native
@pytest.mark.parametrize("name", ["sync", "handover", "snapshot", "recovery"])
def test_row_runs(name: str) -> None:
    outcome = ROWS[name].measure(Settings(smoke=True, rounds=2))
    assert outcome.value > 0 and outcome.ratio is not None and outcome.ratio > 0 and outcome.peer
