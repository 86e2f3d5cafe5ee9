"""Several hosts on one machine: network namespaces on a bridge, whose links can be cut. Needs root and `ip`."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.errors import BenchmarkError

DEVICE = "eth0"
"""The interface of every namespace."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Namespaces:
    """Namespaces that see each other, and this machine as the bridge."""

    prefix: str
    """Their names are this and a number."""
    network: str
    """First three bytes of their addresses."""
    count: int
    """How many there are."""

    @property
    def bridge_address(self) -> str:
        """Address of this machine, as they see it."""
        return f"{self.network}.254"

    def name(self, index: int) -> str:
        """Name of a namespace."""
        return f"{self.prefix}-{index}"

    def address(self, index: int) -> str:
        """Address of a namespace's interface."""
        return f"{self.network}.{index + 1}"

    def set_link(self, index: int, state: str) -> None:
        """Turn a namespace's link `up` or `down`."""
        _ip("-n", self.name(index), "link", "set", "dev", DEVICE, state)


def why_not() -> str:
    """Why there can be no namespaces here; empty where there can."""
    if shutil.which("ip") is None:
        return "network namespaces need the program `ip` (Debian: iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"dsk{os.getpid()}-probe"
    run = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        return f"network namespaces cannot be made here: {run.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return ""


@contextmanager
def namespaces(count: int) -> Iterator[Namespaces]:
    """Make namespaces that see each other.

    Args:
        count: how many.

    Yields:
        The namespaces; removed on the way out.

    Raises:
        BenchmarkError: they cannot be made.
    """
    # A process has one set at a time, named by its number; 10.64.0.0/10 is not routed here by anyone else's tool.
    pid = os.getpid()
    made = Namespaces(prefix=f"dsk{pid}", network=f"10.{64 + (pid >> 8) % 64}.{pid % 256}", count=count)
    bridge = f"dsk{pid}"
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{made.bridge_address}/24", "dev", bridge)
        _ip("link", "set", "dev", bridge, "up")
        for index in range(count):
            name, outer = made.name(index), f"d{pid}v{index}"
            _ip("netns", "add", name)
            _ip("link", "add", outer, "type", "veth", "peer", "name", DEVICE, "netns", name)
            _ip("link", "set", "dev", outer, "master", bridge)
            _ip("link", "set", "dev", outer, "up")
            _ip("-n", name, "addr", "add", f"{made.address(index)}/24", "dev", DEVICE)
            _ip("-n", name, "link", "set", "dev", "lo", "up")
            _ip("-n", name, "link", "set", "dev", DEVICE, "up")
        yield made
    finally:
        for index in range(count):
            # The outer end of a link goes with its namespace, but only once nobody lives there; so it is removed first.
            for command in (["link", "del", f"d{pid}v{index}"], ["netns", "del", made.name(index)]):
                subprocess.run(["ip", *command], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    run = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise BenchmarkError(f"`ip {' '.join(arguments)}` failed: {run.stderr.strip()}")
