"""Runs a function on the ranks of a process group, one process each; brings back results or the first traceback."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

HANG_S = 240.0
"""After so long a rank is taken to hang. Far above what any case here needs on a busy machine."""


class RankError(AssertionError):
    """A rank raised, died or hung; the message holds its traceback."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    hang_s: float = HANG_S,
    backend: str = "gloo",
    may_die: tuple[int, ...] = (),
) -> list[Any]:
    """Call a function on every rank of a group.

    Args:
        world_size: processes.
        function: importable by name; called with rank, world_size and the arguments while the default process group
            exists. What it returns must pickle (NumPy arrays, not tensors).
        arguments: further arguments.
        hang_s: seconds after which missing ranks are taken to hang.
        backend: of the group; "dseek" is registered first, "dseek:tcp" is the same over TCP, "dseek:mooncake" with
            Mooncake's transfer engine, "dseek:double" with what stands for it in tests.
        may_die: ranks whose death is no failure; they return None.

    Returns:
        What each rank returned.

    Raises:
        RankError: a rank raised (the first to report counts, since its peers then fail too), died or hung.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch", "torch.distributed.tensor", "dseek.parallel.transport"])
    with tempfile.TemporaryDirectory() as folder:
        readers: dict[Connection, int] = {}
        processes = []
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_run,
                args=(writer, rank, world_size, str(Path(folder) / "store"), hang_s, backend, function, arguments),
            )
            process.start()
            writer.close()
            readers[reader] = rank
            processes.append(process)
        try:
            return _collect(readers, world_size, hang_s, may_die)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(readers: dict[Connection, int], world_size: int, hang_s: float, may_die: tuple[int, ...]) -> list[Any]:
    """Wait for every rank's report; see `run_ranks`."""
    results: dict[int, Any] = {}
    end = time.monotonic() + hang_s
    while readers:
        ready = wait(list(readers), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(readers.values())} of {world_size} hang")
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = readers.pop(reader)
            try:
                is_result, payload = reader.recv()
            except EOFError:
                if rank in may_die:
                    results[rank] = None
                    continue
                raise RankError(f"rank {rank} of {world_size} died") from None
            if not is_result:
                raise RankError(f"rank {rank} of {world_size} raised\n{payload}")
            results[rank] = payload
    return [results[rank] for rank in range(world_size)]


def _run(
    writer: Connection,
    rank: int,
    world_size: int,
    store: str,
    hang_s: float,
    backend: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """The life of one rank."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    backend, _, transport = backend.partition(":")
    if transport == "double":
        os.environ["ENGINE_DOUBLE"], transport = str(Path(store).parent), "mooncake"
        sys.path.insert(0, str(Path(__file__).parent / "engine_double"))
    if backend == "dseek":
        os.environ["DSEEK_TRANSPORT"] = transport or "auto"
    from dseek.parallel.transport import shared_memory  # which registers the backend, too

    shared_memory.MAX_SLOT_BYTES = 64 << 10  # several blocks without large tensors

    try:
        # A file, not a port: two runs at a time cannot meet. The parent gives up before the group does.
        dist.init_process_group(
            backend,
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=2 * hang_s),
        )
        report = (True, function(rank, world_size, *arguments))
        if dist.is_initialized():  # a function that breaks its group on purpose ends it
            dist.barrier()
    except BaseException:
        report = (False, traceback.format_exc())
    # The report goes out before the process ends, hence before its peers see a closed connection.
    writer.send(report)
    writer.close()
