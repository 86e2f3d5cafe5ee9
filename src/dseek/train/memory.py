"""Memory of this process and its device, as the system counts it; and what a training is allowed to take of it."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import torch

from dseek.core.errors import ConfigError, MemoryLimitError
from dseek.core.logs import get_logger
from dseek.plan.training import TrainingChoice, TrainingWork, choose_training
from dseek.train.config import TrainConfig
from dseek.train.model_source import ModelSource
from dseek.train.preparation import MemoryChoice
from dseek.train.processes import Processes

_log = get_logger(__name__)
FREE_SHARE = 0.9
"""Share of the free memory that a training takes where no limit is set."""
MAPPED_BYTES = 1 << 20
"""Tensors from this size on get pages of their own."""
_M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)
_SCALES = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def give_freed_memory_back() -> None:
    """Let memory of tensors go back to the system as soon as they are freed, for the rest of the process.

    With every large block that is freed, glibc raises the size from which blocks get pages of their own, up to 32 MiB;
    what is smaller then lies in heaps that hardly shrink, and a training, whose activations come and go in that size,
    holds a quarter more than lives. A bound that is set stays. Does nothing with another C library, or where the
    environment has set a bound.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ and "CS_GNU_LIBC_VERSION" in os.confstr_names:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)


def choose(
    config: TrainConfig, source: ModelSource, processes: Processes, before: MemoryChoice | None = None
) -> TrainingChoice:
    """Choose how memory is saved. All ranks call this together and choose alike.

    Args:
        config: the training.
        source: the model.
        processes: who shares it.
        before: what was chosen when the training began, which is chosen again where it fits, so that sums are rounded
            as they were then.

    Returns:
        The choice with its prediction.

    Raises:
        MemoryLimitError: nothing stays below the limit.
        ConfigError: the limit is no size, or more blocks are to be computed twice than there are.
    """
    memory = config.memory
    own = process_bytes() if processes.device.type == "cpu" else 0
    limit = free_bytes(processes.device) + own if memory.limit is None else read_size(memory.limit)
    figures = processes.gather(float(own), float(limit))
    wanted = memory.gradient_checkpointing
    num_layers = source.shape.num_layers
    layers: int | None
    if isinstance(wanted, bool):
        layers = num_layers if wanted else 0
    else:
        layers = None if isinstance(wanted, str) else wanted
    if layers is not None and layers > num_layers:
        raise ConfigError(
            f"memory.gradient_checkpointing is {layers}", needed=f"at most {num_layers}, the blocks there are"
        )
    chunk = memory.logits_chunk_tokens
    work = work_of(config, source, processes.world_size)
    process, least = int(figures[:, 0].max()), int(figures[:, 1].min())
    if before is not None:
        try:
            return choose_training(
                work,
                process_bytes=process,
                limit_bytes=least,
                shard_strategy=before.shard_strategy,
                checkpointed_layers=before.checkpointed_layers,
                logits_chunk_tokens=before.logits_chunk_tokens,
            )
        except MemoryLimitError as error:
            _log.warning("%s: memory is saved otherwise than before, so the last bits may differ", error.found)
    return choose_training(
        work,
        process_bytes=process,
        limit_bytes=least,
        shard_strategy=memory.shard_strategy,
        checkpointed_layers=layers,
        logits_chunk_tokens=None if isinstance(chunk, str) else chunk,
    )


def work_of(config: TrainConfig, source: ModelSource, world_size: int) -> TrainingWork:
    """Say what a rank does, for the prediction.

    Args:
        config: the training.
        source: the model.
        world_size: ranks.
    """
    lora = config.method == "lora"
    return TrainingWork(
        shape=source.shape,
        batch_rows=config.per_device_train_batch_size,
        row_tokens=config.data.max_length,
        num_batches=config.gradient_accumulation_steps,
        world_size=world_size,
        low_precision=config.bf16,
        masked=config.data.document_boundaries == "attention",
        lora_rank=config.lora.r if lora else 0,
        lora_targets=config.lora.target_modules if lora else (),
        optimizer=config.optim,
        offload=config.memory.offload_optimizer,
        mlp_chunk_tokens=config.memory.mlp_chunk_tokens,
        snapshots=bool(config.checkpoints.snapshot_steps),
    )


def read_size(text: str) -> int:
    """Read a size such as 8GB, 512MiB or 1000000.

    Args:
        text: the size.

    Returns:
        Bytes.

    Raises:
        ConfigError: it is none.
    """
    match = _SIZE.fullmatch(text.strip())
    value = float(match[1]) * _SCALES.get((match[2] or "").lower(), 1) if match else 0.0
    if not 1 <= value < 2**60:
        raise ConfigError(f"memory.limit is {text!r}", needed="a size such as 8GB or 900MB")
    return int(value)


def free_bytes(device: torch.device) -> int:
    """Tell how much memory a process may take: a share of what is free, and of that its part among local processes.

    Args:
        device: where.
    """
    if device.type == "cuda":
        return int(FREE_SHARE * torch.cuda.mem_get_info(device)[0])
    free = _kilobytes("/proc/meminfo", "MemAvailable")
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, used = _number(limit_file), _number(used_file)
        if limit is not None and used is not None and limit < 1 << 60:
            free = min(free, max(0, limit - used)) if free else max(0, limit - used)
    peers = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1))
    return int(FREE_SHARE * (free or (64 << 30)) / peers)


def process_bytes() -> int:
    """Tell how much memory this process holds now."""
    return _kilobytes("/proc/self/status", "VmRSS")


def peak_bytes(device: torch.device) -> int:
    """Tell how much memory this process, or what it has on its device, held at most since `reset_peak`.

    Args:
        device: where it computes.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _kilobytes("/proc/self/status", "VmHWM")


def reset_peak(device: torch.device) -> None:
    """Begin to measure the peak anew, where the system lets us.

    Args:
        device: where it computes.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak is then that of the whole process, which begins lower than it ends


def _kilobytes(path: str, name: str) -> int:
    """A line such as `VmRSS:  123 kB`, in bytes; 0 where there is none."""
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None
