"""Continuous training: one of two groups is killed, the other goes on, and who comes back has its weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.continuous import lose_a_group
from dseek.core.errors import ConfigError
from dseek.train.continuous import ReplicaConfig, lighthouse


@pytest.mark.cluster
def test_the_survivor_goes_on_and_the_lost_group_heals(tmp_path: Path) -> None:
    pytest.importorskip("torchft")
    # That the weights of both groups are equal at the end, and that the survivor made steps alone, is held in there.
    found = lose_a_group(tmp_path)
    assert 0 < found["gap_s"] < found["back_s"]


def test_wrong_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"lighthouse": "host:1"}, {"name": ""}, {"min_replicas": 0}, {"timeout_s": 0}):
        with pytest.raises(ConfigError):
            ReplicaConfig(**{"lighthouse": "http://host:1", "name": "a", **wrong})  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "torchft", None)
    with pytest.raises(ConfigError, match=r"dseek\[continuous\]"):
        lighthouse()
