"""`Outcome`, what a row measured, and the JSON object that is printed of it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.paths import work_dir

FIELDS = ("name", "value", "unit", "ratio", "limit_share", "peer", "correct", "machine")
"""Fields of the printed object, in this order."""

MAX_RATIO = 100.0
"""Ratios to a bar are cut here: an error of nothing at all would be infinitely better than its bar."""


@dataclass(kw_only=True, slots=True)
class Outcome:
    """The figures of one row. `ratio` is always better when larger; 1 is level with the peer or on the bar."""

    value: float
    """The claim's own figure: seconds, or a fraction where `unit` says so."""
    unit: str
    """s, s/token or fraction."""
    ratio: float | None = None
    """Peer's time over ours, or how many times the bar is met."""
    limit_share: float | None = None
    """Fraction of what the measured machine could do at best, or what the row's `share_of` says; None where there is
    no physical limit."""
    peer: str | None = None
    """Who was measured beside; None for a bar."""
    details: dict[str, Any] = field(default_factory=dict)
    """Samples, the peers' figures, what the check saw: kept with the result, not part of the printed object."""


def ratio_to_bar(bar: float, error: float) -> float:
    """How many times an error fits into its bar, at most `MAX_RATIO`."""
    return min(bar / error, MAX_RATIO) if error > 0 else MAX_RATIO


def printed(name: str, outcome: Outcome | None, machine: dict[str, Any]) -> dict[str, Any]:
    """The object that `run NAME --json` prints.

    Args:
        name: the row.
        outcome: what it measured; None where its correctness check was red: then there is no figure in it.
        machine: description of the machine.

    Returns:
        The fields of `FIELDS`.
    """
    return {
        "name": name,
        "value": None if outcome is None else _plain(outcome.value),
        "unit": None if outcome is None else outcome.unit,
        "ratio": None if outcome is None else _plain(outcome.ratio),
        "limit_share": None if outcome is None else _plain(outcome.limit_share),
        "peer": None if outcome is None else outcome.peer,
        "correct": outcome is not None,
        "machine": machine,
    }


def _plain(number: float | None) -> float | None:
    """Six significant digits; JSON knows no infinities."""
    if number is None:
        return None
    assert math.isfinite(number), number
    return float(f"{number:.6g}")


def keep(record: dict[str, Any], details: dict[str, Any]) -> Path:
    """Keep the newest result of a row on this machine, for the table.

    Args:
        record: the printed object.
        details: what else was seen.

    Returns:
        Path of the file.
    """
    folder = kept_dir(record["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['name']}.json"
    stamp = datetime.now(UTC).isoformat(timespec="seconds")
    part = path.with_suffix(".part")
    part.write_text(json.dumps({**record, "measured_at": stamp, "details": details}, indent=1) + "\n")
    part.rename(path)
    return path


def kept(machine: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The newest kept result of each row on this machine, by name."""
    records = {}
    for path in sorted(kept_dir(machine).glob("*.json")):
        record = json.loads(path.read_text())
        records[record["name"]] = record
    return records


def kept_dir(machine: dict[str, Any]) -> Path:
    """Folder of the kept results of a machine."""
    return work_dir() / "results" / slug(machine)


def slug(machine: dict[str, Any]) -> str:
    """Short name of a machine for file names: processor, best instruction set, threads."""
    text = f"{machine['cpu']} {machine['kernels']} {machine['threads']}t".lower()
    for noise in ("(r)", "(tm)", "processor", "cpu"):
        text = text.replace(noise, " ")
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")
