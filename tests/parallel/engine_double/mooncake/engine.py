"""A transfer engine of one host, with the calls of Mooncake's and the rules of RDMA.

It writes into the memory of other processes by `process_vm_writev`. What is written from and to must be registered,
and regions must not overlap; Mooncake's own TCP is more forgiving. Each process says in a file of the folder
`ENGINE_DOUBLE` what it has registered.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class TransferEngine:
    """The calls that `dseek.parallel.transport.mooncake` makes."""

    def __init__(self) -> None:
        self._regions: dict[int, int] = {}
        self._under_way: dict[int, int] = {}
        self._asked: set[int] = set()
        self._tickets = itertools.count(1)

    def initialize(self, address: str, metadata: str, protocol: str, devices: str) -> int:
        _libc.prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)
        self._say()
        return 0 if metadata == "P2PHANDSHAKE" and protocol in ("rdma", "tcp") else -1

    def get_rpc_port(self) -> int:
        return os.getpid()

    def register_memory(self, address: int, num_bytes: int) -> int:
        if any(start < address + num_bytes and address < start + size for start, size in self._regions.items()):
            return -7
        self._regions[address] = num_bytes
        self._say()
        return 0

    def unregister_memory(self, address: int) -> int:
        del self._regions[address]
        self._say()
        return 0

    def transfer_submit_write(self, session: str, source: int, target: int, num_bytes: int) -> int:
        pid = int(session.rpartition(":")[2])
        theirs = {int(start): size for start, size in json.loads(_file(pid).read_text()).items()}
        is_allowed = _within(self._regions, source, num_bytes) and _within(theirs, target, num_bytes)
        ticket, written = next(self._tickets), -1
        if is_allowed:
            own, other = _Vector(source, num_bytes), _Vector(target, num_bytes)
            written = _libc.process_vm_writev(pid, ctypes.byref(own), 1, ctypes.byref(other), 1, 0)
        self._under_way[ticket] = 1 if written == num_bytes else -1
        return ticket

    def transfer_check_status(self, ticket: int) -> int:
        """What became of a write; asked for the first time it is still under way, as over a network."""
        if ticket not in self._asked:
            self._asked.add(ticket)
            return 0
        return self._under_way[ticket]

    def _say(self) -> None:
        temporary = _file(os.getpid()).with_suffix(".new")
        temporary.write_text(json.dumps(self._regions))
        temporary.replace(_file(os.getpid()))


def _file(pid: int) -> Path:
    return Path(os.environ["ENGINE_DOUBLE"]) / f"{pid}.json"


def _within(regions: dict[int, int], address: int, num_bytes: int) -> bool:
    return any(start <= address and address + num_bytes <= start + size for start, size in regions.items())
