"""Which share of the processors each replica gets, so that all of them find a node."""

from __future__ import annotations

from collections.abc import Sequence


def share(node_cpus: Sequence[float], count: int) -> float:
    """Find the largest equal share with which all replicas have a place.

    Args:
        node_cpus: processors of each node; at least one node has one.
        count: replicas, at least 1.

    Returns:
        Whole processors, or where there are fewer processors than replicas, one part of one.
    """
    for cpus in range(int(max(node_cpus)), 0, -1):
        if sum(int(node // cpus) for node in node_cpus) >= count:
            return float(cpus)
    parts = 2
    while sum(int(node * parts) for node in node_cpus) < count:
        parts += 1
    # Ray counts in ten thousandths: rounded down, or the last replica would not fit.
    return int(10_000 / parts) / 10_000
