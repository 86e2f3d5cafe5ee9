"""The rows on fine-tuning run on their smallest sizes, and their checks can be red."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.errors import IncorrectError
from benchmarks.rows import Settings, finetune, row

SMOKE = Settings(threads=1, rounds=1, smoke=True)


@pytest.mark.rows
@pytest.mark.model
@pytest.mark.parametrize("name", ["finetune-memory", "finetune-speed", "plan-train-memory"])
def test_rows_run(name: str) -> None:
    outcome = row(name).measure(SMOKE)
    assert outcome.value > 0 and outcome.ratio is not None and outcome.ratio > 0


def test_another_loss_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(_: Settings, engine: str, config: dict[str, Any]) -> dict[str, Any]:
        return {"losses": [2.0, 1.9 if engine == "dseek" else 1.8], "peak_bytes": 1, "step_s": [1.0, 1.0]}

    monkeypatch.setattr(finetune, "_train", train)
    with pytest.raises(IncorrectError, match="dseek: losses"):
        finetune._in_turn(SMOKE, {}, {}, rounds=1)
    monkeypatch.setattr(finetune, "_train", lambda *_: {"losses": [float("nan")]})
    with pytest.raises(IncorrectError):
        finetune._in_turn(SMOKE, {}, {}, rounds=1)
