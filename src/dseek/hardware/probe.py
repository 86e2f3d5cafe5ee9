"""What the operating system says about the machine: cores, caches, memory and its limits, devices.

Reads `/proc` and `/sys` (Linux); where a file is missing the answer is the careful one (no cache known, the memory of
`sysconf`). A container's limits count, in both versions of the control groups.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dseek.hardware.machine import Accelerator, Cache

KERNEL_FEATURES = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)
"""Flags of `/proc/cpuinfo` worth showing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """The unmeasured part of a `Machine`; the fields are explained there."""

    cpu_name: str
    """Name of the processor."""
    features: tuple[str, ...]
    """Instruction sets."""
    num_cores: int
    """Physical cores usable."""
    num_threads: int
    """Threads to use: the cores, or fewer where the time of the process is limited."""
    caches: tuple[Cache, ...]
    """Data caches."""
    memory_bytes: int
    """Main memory."""
    memory_limit_bytes: int
    """Memory usable."""
    accelerators: tuple[Accelerator, ...]
    """Devices."""


def probe(root: Path = Path("/")) -> Probe:
    """Read what the operating system says.

    Args:
        root: where `proc`, `sys` and `dev` are; tests put a made-up machine here.
    """
    processors = _parse_cpuinfo(_read(root / "proc/cpuinfo"))
    first = processors[0] if processors else {}
    flags = set(first.get("flags", first.get("Features", "")).split())
    num_cores = _num_cores(root)
    quota = _cpu_quota(root)
    num_threads = num_cores if quota is None else max(1, min(num_cores, int(quota + 0.5)))
    memory_bytes = _memory_bytes(root)
    return Probe(
        cpu_name=first.get("model name") or platform.processor() or platform.machine(),
        features=tuple(flag for flag in KERNEL_FEATURES if flag in flags),
        num_cores=num_cores,
        num_threads=num_threads,
        caches=_caches(root),
        memory_bytes=memory_bytes,
        memory_limit_bytes=min([memory_bytes, *_memory_limits(root)]),
        accelerators=_accelerators(root),
    )


def process_bytes() -> int:
    """Memory this process occupies now (0 where the system does not tell)."""
    fields = _read(Path("/proc/self/statm")).split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0


class OtherLoad:
    """Watches how much of the processors' time others take (other programs, other guests of the same host).

    Args:
        root: where `proc` is; tests put a made-up machine here.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._busy_s, self._start_s, self._own_s = self._busy(), time.monotonic(), _own_cpu_s()

    def share(self) -> float:
        """Return the processors that others kept busy since the start, on average (0 where unknown)."""
        elapsed = time.monotonic() - self._start_s
        others = self._busy() - self._busy_s - (_own_cpu_s() - self._own_s)
        return max(0.0, others / elapsed) if elapsed > 0 else 0.0

    def _busy(self) -> float:
        """Seconds that all processors were not idle, since the machine started; time stolen from a guest counts."""
        fields = _read(self._root / "proc/stat").partition("\n")[0].split()[1:9]
        if len(fields) < 8:
            return 0.0
        user, nice, system, _, _, irq, softirq, steal = map(int, fields)
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_cpu_s() -> float:
    """Processor time of this process and of the finished ones it started."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isdecimal() else None


def _parse_cpuinfo(text: str) -> list[dict[str, str]]:
    processors = []
    for block in text.split("\n\n"):
        pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in pairs}
        if fields:
            processors.append(fields)
    return processors


def _usable_processors() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _num_cores(root: Path) -> int:
    """Count the distinct cores among the processors this process may run on (two hyperthreads are one core)."""
    cores = set()
    for processor in _usable_processors():
        topology = root / f"sys/devices/system/cpu/cpu{processor}/topology"
        siblings = _read(topology / "thread_siblings_list").strip() or _read(topology / "core_cpus_list").strip()
        cores.add(siblings or str(processor))
    return max(1, len(cores))


def _caches(root: Path) -> tuple[Cache, ...]:
    found = []
    for folder in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if _read(folder / "type").strip() not in ("Data", "Unified"):
            continue
        size = _read(folder / "size").strip().upper()
        unit = {"K": 1024, "M": 1024**2, "G": 1024**3}.get(size[-1:], 1)
        count = _number(size.rstrip("KMG"))
        level = _number(_read(folder / "level"))
        if count and level:
            sharing = _count_list(_read(folder / "shared_cpu_list"))
            found.append(Cache(level=level, num_bytes=count * unit, num_sharing=max(1, sharing)))
    return tuple(sorted(found, key=lambda cache: cache.level))


def _count_list(text: str) -> int:
    """Count the members of a list such as `0-3,8`."""
    total = 0
    for part in text.strip().split(","):
        low, _, high = part.partition("-")
        first, last = _number(low), _number(high or low)
        if first is not None and last is not None:
            total += last - first + 1
    return total


def _memory_bytes(root: Path) -> int:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group_folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of all above it: version 2 first, then version 1."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        folder = base / path.strip().lstrip("/")
        while True:
            yield folder
            if folder == base or base not in folder.parents:
                break
            folder = folder.parent


def _memory_limits(root: Path) -> list[int]:
    limits = []
    for folder in _group_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _number(_read(folder / name))
            if limit:
                limits.append(limit)
    return limits


def _cpu_quota(root: Path) -> float | None:
    """Processors' worth of time that the control groups allow, or None without a limit."""
    quotas = []
    for folder in _group_folders(root, "cpu"):
        fields = _read(folder / "cpu.max").split()
        if len(fields) != 2:
            fields = [_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()]
        quota, period = _number(fields[0]), _number(fields[1])
        if quota and period:
            quotas.append(quota / period)
    return min(quotas) if quotas else None


def _accelerators(root: Path) -> tuple[Accelerator, ...]:
    found = []
    for folder in sorted((root / "proc/driver/nvidia/gpus").glob("*")):
        lines = _read(folder / "information").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
        found.append(Accelerator(kind="cuda", name=names[0] if names else folder.name))
    for folder in sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*")):
        name = _read(folder / "name").strip()
        # A node without a device name is the processor itself.
        if name:
            found.append(Accelerator(kind="rocm", name=name))
    return tuple(found)
