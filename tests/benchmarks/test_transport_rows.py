"""The rows about transport and checkpoints run on their smallest sizes."""

from __future__ import annotations

import pytest

from benchmarks.errors import IncorrectError
from benchmarks.rows import ROWS, Settings
from benchmarks.rows.checkpoints import recovery_seconds


@pytest.mark.rows
@pytest.mark.native
@pytest.mark.parametrize("name", ["sync", "handover", "snapshot"])
def test_row_runs(name: str) -> None:
    outcome = ROWS[name].measure(Settings(smoke=True, rounds=2))
    assert outcome.value > 0 and outcome.ratio is not None and outcome.ratio > 0 and outcome.peer


@pytest.mark.rows
@pytest.mark.model
def test_a_recovery_is_measured() -> None:
    outcome = ROWS["recovery"].measure(Settings(smoke=True, rounds=2))
    assert outcome.value > 0 and outcome.ratio is not None and outcome.ratio > 0


def test_a_standstill_is_read_from_what_a_training_wrote() -> None:
    lines = [
        (1.0, "step 1 of 3: loss 2"),
        (2.0, "step 2 of 3: loss 2"),
        (2.5, "lost"),
        (6.0, "going on after step 1 of 3"),
    ]
    assert recovery_seconds([*lines, (7.0, "step 2 of 3: loss 2"), (7.5, "step 3 of 3: loss 2")]) == 5.0
    for wrong in (lines, lines[:2], [*lines, *lines]):
        with pytest.raises(IncorrectError):
            recovery_seconds(wrong)
