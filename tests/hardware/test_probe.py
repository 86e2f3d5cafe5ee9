"""Probing made-up machines, described by files as Linux has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dseek.hardware import probe as probing
from dseek.hardware.probe import probe

CPUINFO = """processor\t: 0
model name\t: Made-up 9000
flags\t\t: fpu avx2 avx512f avx512_vnni amx_int8

processor\t: 1
model name\t: Made-up 9000
flags\t\t: fpu avx2
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(probing, "_usable_processors", lambda: {0, 1, 2, 3})
    files = {"proc/cpuinfo": CPUINFO, "proc/meminfo": "MemFree: 1 kB\nMemTotal:       1000000 kB\n"}
    for number in range(4):
        core = number // 2
        siblings = f"{2 * core}-{2 * core + 1}\n"
        files[f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"] = siblings
    for index, (level, kind, size, shared) in enumerate(
        [(1, "Data", "48K", "0-1"), (1, "Instruction", "32K", "0-1"), (3, "Unified", "32M", "0-1,4-5")]
    ):
        folder = f"sys/devices/system/cpu/cpu0/cache/index{index}"
        files |= {f"{folder}/level": f"{level}\n", f"{folder}/type": f"{kind}\n"}
        files |= {f"{folder}/size": f"{size}\n", f"{folder}/shared_cpu_list": f"{shared}\n"}
    return write(tmp_path, files)


def test_cores_caches_memory(root: Path) -> None:
    found = probe(root)
    assert found.cpu_name == "Made-up 9000"
    assert found.features == ("avx2", "avx512f", "avx512_vnni", "amx_int8")
    assert (found.num_cores, found.num_threads) == (2, 2)
    assert [(c.level, c.num_bytes, c.num_sharing) for c in found.caches] == [(1, 48 * 1024, 2), (3, 32 * 2**20, 4)]
    assert found.memory_bytes == found.memory_limit_bytes == 1_024_000_000
    assert found.accelerators == ()


def test_limits_of_a_version_2_group_and_those_above(root: Path) -> None:
    write(
        root,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/memory.max": "500000000\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/cpu.max": "100000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        },
    )
    found = probe(root)
    assert found.memory_limit_bytes == 500_000_000
    assert (found.num_cores, found.num_threads) == (2, 1)


def test_limits_of_a_version_1_group(root: Path) -> None:
    write(
        root,
        {
            "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/\n",
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "400000000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    found = probe(root)
    assert found.memory_limit_bytes == 400_000_000
    assert found.num_threads == 2


def test_devices(root: Path) -> None:
    write(
        root,
        {
            "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t Made-up GPU\nIRQ: 3\n",
            "sys/class/kfd/kfd/topology/nodes/0/name": "\n",
            "sys/class/kfd/kfd/topology/nodes/1/name": "gfx9\n",
        },
    )
    assert [(device.kind, device.name) for device in probe(root).accelerators] == [
        ("cuda", "Made-up GPU"),
        ("rocm", "gfx9"),
    ]


def test_nothing_known_and_this_machine(tmp_path: Path) -> None:
    found = probe(tmp_path)
    assert found.caches == ()
    assert found.num_threads >= 1
    assert found.memory_bytes > 0
    here = probe()
    assert here.num_threads >= 1
    assert here.memory_limit_bytes <= here.memory_bytes
    assert probing.process_bytes() > 0


def test_load_of_others_is_what_is_not_ours(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    own = [5.0]
    monkeypatch.setattr(probing.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(probing, "_own_cpu_s", lambda: own[0])
    monkeypatch.setattr(probing.os, "sysconf", lambda name: 100)
    write(root, {"proc/stat": "cpu  1000 0 0 99 0 0 0 0 0 0\ncpu0 1 2 3\n"})
    others = probing.OtherLoad(root)
    assert others.share() == 0.0
    now[0], own[0] = 110.0, 15.0
    write(root, {"proc/stat": "cpu  2000 100 100 999 0 50 50 200 0 0\n"})
    assert others.share() == pytest.approx((15.0 - 10.0) / 10.0)
    write(root, {"proc/stat": ""})
    assert others.share() == 0.0
