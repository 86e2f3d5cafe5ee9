"""`train`: a training from its configuration to its result, with everything that has to be decided before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from dseek.core.errors import ConfigError
from dseek.plan.training import TrainingChoice
from dseek.train.config import TrainConfig
from dseek.train.faults import Fault
from dseek.train.memory import choose, give_freed_memory_back, peak_bytes, reset_peak
from dseek.train.model_source import ModelSource
from dseek.train.preparation import MemoryChoice
from dseek.train.processes import Processes
from dseek.train.resuming import stored_choice
from dseek.train.trainer import Listener, Trainer, TrainResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """A training whose decisions are made and whose model is not there yet."""

    config: TrainConfig
    """All that was decided by the user."""
    processes: Processes
    """Who trains."""
    source: ModelSource
    """The model to begin with."""
    choice: TrainingChoice
    """How memory is saved, and what is expected of it."""


@contextmanager
def ready(config: TrainConfig) -> Iterator[Ready]:
    """Open the model, meet the other ranks, and decide how memory is saved.

    Args:
        config: all that the user decides.

    Yields:
        The training, for `train`.

    Raises:
        DseekError: the model cannot be opened, a peer did not come, or the memory does not suffice.
    """
    if config.method == "gate":
        raise ConfigError('method is "gate"', needed="full or lora", remedy="use `dseek train`, which trains gates too")
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    give_freed_memory_back()
    processes = Processes(config)
    source = ModelSource(config)
    try:
        choice = choose(config, source, processes, stored_choice(config, processes))
        yield Ready(config=config, processes=processes, source=source, choice=choice)
    finally:
        source.close()


def train(
    training: Ready,
    listener: Listener,
    *,
    on_ready: Callable[[Trainer], None] | None = None,
    faults: Sequence[Fault] = (),
) -> TrainResult:
    """Train.

    Args:
        training: of `ready`.
        listener: told what happens, on the first rank.
        on_ready: given the trainer before its first step, such as to call its `stop` from a signal handler.
        faults: what is to go wrong, for whoever wants to see a recovery.

    Returns:
        How it ended.

    Raises:
        DseekError: the data or a checkpoint is not what it should be, or a rank died.
    """
    device = training.processes.device
    reset_peak(device)
    work = training.choice.work
    trainer = Trainer(
        training.config,
        listener,
        source=training.source,
        processes=training.processes,
        choice=MemoryChoice(
            shard_strategy=work.shard_strategy,
            checkpointed_layers=work.checkpointed_layers,
            logits_chunk_tokens=work.logits_chunk_tokens,
        ),
        faults=faults,
    )
    if on_ready is not None:
        on_ready(trainer)
    result = trainer.run()
    peaks = training.processes.gather(float(peak_bytes(device)))
    return replace(result, peak_bytes=int(peaks.max()))
