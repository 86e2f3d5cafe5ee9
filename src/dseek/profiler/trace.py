"""A profile's timeline as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Source: "Trace Event Format", the Chromium project: complete events (`ph: X`) with times in microseconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dseek.core.errors import ConfigError
from dseek.core.files import atomic_write_text
from dseek.profiler.records import OperatorRecord, Profile


def trace_events(profile: Profile) -> dict[str, Any]:
    """Make the trace.

    Args:
        profile: with its stretches.

    Returns:
        The object that the file holds. Every bar has its operator's figures, the means over its calls, as arguments.
    """
    facts = {(record.name, record.place): _facts(record) for record in reversed(profile.operators)}
    tracks = sorted({stretch.track for stretch in profile.stretches})
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": profile.title or "dseek"}},
        *(
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": track, "args": {"name": f"thread {track}"}}
            for track in tracks
        ),
    ]
    for stretch in profile.stretches:
        events.append(
            {
                "ph": "X",
                "name": stretch.name,
                "cat": stretch.place or "run",
                "pid": 1,
                "tid": stretch.track,
                "ts": round(stretch.begin_s * 1e6, 3),
                "dur": round(stretch.seconds * 1e6, 3),
                "args": {"place": stretch.place, **facts.get((stretch.name, stretch.place), {})},
            }
        )
    other = {"machine": profile.machine, "lost_stretches": profile.num_lost_stretches}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}


def write_trace(profile: Profile, path: str | Path) -> None:
    """Write the trace to a file, whole or not at all.

    Args:
        profile: with its stretches.
        path: where to.

    Raises:
        ConfigError: it cannot be written.
    """
    write_file(path, json.dumps(trace_events(profile), separators=(",", ":")), "the trace")


def write_file(path: str | Path, text: str, what: str) -> None:
    """Write a report, whole or not at all.

    Args:
        path: where to.
        text: its contents.
        what: it is, for messages.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        atomic_write_text(path, text)
    except OSError as error:
        raise ConfigError(f"{what} cannot be written to {path}: {error.strerror or error}") from None


def _facts(record: OperatorRecord) -> dict[str, Any]:
    share = record.roof_share
    found: dict[str, Any] = {"format": record.dtype, "sizes": record.sizes}
    found |= {"flops": round(record.flops / record.calls), "bytes": round(record.num_bytes / record.calls)}
    if share is not None:
        found |= {"roof": record.roof, "share of roof": round(share, 3)}
    return {name: value for name, value in found.items() if value}
