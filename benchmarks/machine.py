"""The machine that figures belong to, in a few words, from `dseek.hardware`."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def _probed() -> tuple[Any, str]:
    """What can be read off without measuring, and the native kernels' variant (torch where there are none)."""
    from dseek.hardware import native
    from dseek.hardware.probe import probe

    module = native.load()
    return probe(), "torch" if module is None else module.variant()


def describe(threads: int) -> dict[str, Any]:
    """Describe the machine.

    Args:
        threads: threads that every engine was given.

    Returns:
        Processor, cores, threads, instruction sets, last cache, memory and kernel variant: plain values for JSON.
    """
    found, variant = _probed()
    last_cache = max((cache.num_bytes for cache in found.caches if cache.level == 3), default=0)
    return {
        "cpu": found.cpu_name,
        "cores": found.num_cores,
        "threads": threads,
        "features": list(found.features),
        "last_cache_bytes": last_cache,
        "memory_bytes": found.memory_bytes,
        "kernels": variant,
    }


def sentence(machine: dict[str, Any]) -> str:
    """One line about a machine for people."""
    cache_mb = machine["last_cache_bytes"] / 2**20
    memory_gb = machine["memory_bytes"] / 2**30
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {cache_mb:.0f} MB last cache, "
        f"{memory_gb:.0f} GB, {machine['kernels']} kernels"
    )
