"""Whole files or none, and event hooks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dseek.core import events
from dseek.core.files import atomic_write_bytes, atomic_write_text


def test_write_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a/b/c.txt"
    atomic_write_text(path, "ä")
    assert path.read_bytes() == "ä".encode()
    path.chmod(0o600)
    atomic_write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["c.txt"]


def test_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_text("old")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_events_reach_listeners_in_order_until_they_leave() -> None:
    seen: list[tuple[str, int]] = []
    events.emit("test.event", value=0)
    leave_first = events.subscribe("test.event", lambda value: seen.append(("first", value)))
    leave_second = events.subscribe("test.event", lambda value: seen.append(("second", value)))
    assert events.has_listeners("test.event")
    events.emit("test.event", value=1)
    leave_first()
    leave_first()
    events.emit("test.event", value=2)
    leave_second()
    assert not events.has_listeners("test.event")
    events.emit("test.event", value=3)
    assert seen == [("first", 1), ("second", 1), ("second", 2)]
