"""`train`: a training from its configuration to its result, with everything that has to be decided before."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dseek.core.errors import ConfigError
from dseek.train.config import TrainConfig
from dseek.train.model_source import ModelSource
from dseek.train.preparation import MemoryChoice
from dseek.train.processes import Processes
from dseek.train.trainer import Listener, Trainer, TrainResult


def train(
    config: TrainConfig, listener: Listener, *, on_ready: Callable[[Trainer], None] | None = None
) -> TrainResult:
    """Train.

    Args:
        config: all that is decided.
        listener: told what happens, on the first rank.
        on_ready: given the trainer before its first step, such as to call its `stop` from a signal handler.

    Returns:
        How it ended.

    Raises:
        DseekError: the model, the data, a checkpoint or the configuration is not what it should be.
    """
    if config.method == "gate":
        raise ConfigError('method is "gate"', needed="full or lora", remedy="use `dseek train`, which trains gates too")
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    processes = Processes(config)
    source = ModelSource(config)
    try:
        choice = MemoryChoice(shard_strategy="none", checkpointed_layers=0, logits_chunk_tokens=0)
        trainer = Trainer(config, listener, source=source, processes=processes, choice=choice)
        if on_ready is not None:
            on_ready(trainer)
        return trainer.run()
    finally:
        source.close()
