"""Runs a function on several processes that share two groups, gloo and dseek, and brings back what rank 0 returns."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError, IncorrectError

_TIMEOUT_S = 600


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on every rank.

    Args:
        world_size: processes, of one thread each.
        function: importable by name; called with the arguments while the default group is gloo. `dseek_group` makes
            the other.
        arguments: of the function.

    Returns:
        What it returned on rank 0.

    Raises:
        BenchmarkError: a rank failed or hangs.
        IncorrectError: a rank's check is red.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        links, processes = [], []
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            target = (writer, rank, world_size, str(Path(folder) / "store"), function, arguments)
            process = context.Process(target=_run, args=target)
            process.start()
            writer.close()
            links.append(reader)
            processes.append(process)
        try:
            answers = []
            for rank, reader in enumerate(links):
                if not reader.poll(_TIMEOUT_S):
                    raise BenchmarkError(f"rank {rank} of {world_size} hangs")
                try:
                    answers.append(reader.recv())
                except EOFError:
                    raise BenchmarkError(f"rank {rank} of {world_size} died") from None
        finally:
            for process in processes:
                process.kill()
                process.join()
    for kind, content in answers:
        if kind == "incorrect":
            raise IncorrectError(content)
        if kind == "failed":
            raise BenchmarkError(content)
    return answers[0][1]


def _run(
    writer: Any, rank: int, world_size: int, store: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        timeout = timedelta(seconds=_TIMEOUT_S)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout
        )
        answer = ("ok", function(*arguments))
        dist.barrier()
    except IncorrectError as error:
        answer = ("incorrect", str(error))
    except BaseException:
        answer = ("failed", f"rank {rank} of {world_size} failed\n{traceback.format_exc()}")
    writer.send(answer)
    writer.close()


def dseek_group() -> Any:
    """Make a group of all ranks on the transport `dseek`; all of them call this."""
    import torch.distributed as dist

    import dseek.parallel.transport  # noqa: F401  (registers the backend)

    return dist.new_group(backend="dseek")
