"""A profile as one JSON object, for machines."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dseek.profiler.records import OperatorRecord, Profile

VERSION = 1
"""Of the object; raised when a field changes its meaning."""


def as_plain(profile: Profile) -> dict[str, Any]:
    """Turn a profile into dictionaries and lists; the timeline is left to the trace.

    Args:
        profile: the profile.

    Returns:
        An object for `json.dumps`.
    """
    return {
        "version": VERSION,
        "title": profile.title,
        "machine": profile.machine,
        "num_threads": profile.num_threads,
        "wall_s": profile.wall_s,
        "flops": profile.flops,
        "num_bytes": profile.num_bytes,
        "roofs": None if profile.roofs is None else asdict(profile.roofs),
        "operators": [_plain(record) for record in profile.operators],
        "by_name": [_plain(record) for record in profile.by_name()],
        "by_layer": [_plain(record) for record in profile.by_layer()],
        "advice": [asdict(advice) for advice in profile.advice],
        "num_lost_stretches": profile.num_lost_stretches,
        "notes": list(profile.notes),
    }


def _plain(record: OperatorRecord) -> dict[str, Any]:
    return {**asdict(record), "roof_share": record.roof_share}
