"""From a configuration to everything that a training needs: processes, model, rows, optimiser, each made once.

The order matters: blocks are told to save memory before they are shared out, and shared out before they have memory, so
that no rank ever holds a model it need not hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dseek.core.config import to_plain
from dseek.core.errors import ConfigError
from dseek.models.decoder import Decoder
from dseek.train.batches import StepData
from dseek.train.config import DataConfig, TrainConfig
from dseek.train.documents import Corpus
from dseek.train.encoding import Encoder
from dseek.train.language_model import LanguageModel, save_memory
from dseek.train.lora import attach
from dseek.train.model_source import ModelSource
from dseek.train.optimizers import make_optimizer
from dseek.train.packing import PackedRows, RowState
from dseek.train.processes import Processes
from dseek.train.shards import Shards, fill

MAY_CHANGE = frozenset(
    {
        "output_dir", "memory", "checkpoints", "max_steps", "num_train_epochs", "per_device_eval_batch_size",
        "logging_steps", "eval_steps", "save_steps", "save_total_limit", "report_to", "device", "ddp_backend",
        "num_threads",
    }
)  # fmt: skip
"""Keys that a training may go on with other values of; every other one decides what is learned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryChoice:
    """What was decided about memory."""

    shard_strategy: str
    """none, zero1, zero2 or zero3."""
    checkpointed_layers: int
    """Blocks that compute their activations twice."""
    logits_chunk_tokens: int
    """Rows of the head at a time; 0 is all."""


@dataclass(slots=True)
class Prepared:
    """A training that may begin."""

    source: ModelSource
    """Where the model came from."""
    model: LanguageModel
    """With its weights."""
    shards: Shards
    """How it is shared out."""
    optimizer: torch.optim.Optimizer
    """Without state."""


def make_model(config: TrainConfig, source: ModelSource, processes: Processes, choice: MemoryChoice) -> Prepared:
    """Make the model that is trained, with its first weights.

    Args:
        config: the training.
        source: gives weights.
        processes: who shares it.
        choice: how memory is saved.

    Raises:
        ConfigError: an adapter for a projection that is not there, or rows longer than the model's positions.
    """
    shape = source.shape
    if config.data.max_length > shape.max_position_embeddings:
        raise ConfigError(
            f"data.max_length is {config.data.max_length}, and the model has {shape.max_position_embeddings} positions",
            needed="shorter rows",
        )
    with torch.device("meta"):
        decoder = Decoder(shape)
    decoder.requires_grad_(True).train()
    if config.method == "lora":
        attach(decoder, config.lora)
    save_memory(
        decoder, checkpointed_layers=choice.checkpointed_layers, mlp_chunk_tokens=config.memory.mlp_chunk_tokens
    )
    model = LanguageModel(decoder, choice.logits_chunk_tokens)
    shards = Shards(model, choice.shard_strategy, processes.world_size, processes.device)

    def first_value(name: str, sizes: tuple[int, ...]) -> torch.Tensor:
        processes.lease.sign()
        return source.tensor(name.removeprefix("decoder."), sizes)

    fill(model, processes.device, first_value)
    return Prepared(source=source, model=model, shards=shards, optimizer=make_optimizer(model, config, processes))


def make_rows(config: TrainConfig, source: ModelSource, patterns: tuple[str, ...], *, learned: bool) -> PackedRows:
    """Make the stream of rows.

    Args:
        config: the training.
        source: has the tokenizer.
        patterns: files.
        learned: they are trained on, so their order may be drawn.

    Raises:
        ConfigError: a file cannot be read.
    """
    data: DataConfig = config.data
    corpus = Corpus(patterns, data, seed=config.seed, shuffle=learned and data.shuffle)
    encoder = Encoder(
        source.tokenizer, assistant_only_loss=data.assistant_only_loss, vocab_size=source.shape.vocab_size
    )
    return PackedRows(
        corpus,
        encoder,
        max_length=data.max_length,
        packing=data.packing,
        separate=data.document_boundaries == "attention",
    )


def make_data(config: TrainConfig, rows: PackedRows, state: RowState, processes: Processes) -> StepData:
    """Make the batches of all steps.

    Args:
        config: the training.
        rows: the stream.
        state: where the first step begins.
        processes: who shares the rows.
    """
    return StepData(
        rows,
        state,
        batch_size=config.per_device_train_batch_size,
        num_batches=config.gradient_accumulation_steps,
        rank=processes.rank,
        world_size=processes.world_size,
        separate=config.data.document_boundaries == "attention",
    )


def count_rows(rows: PackedRows, on_row: Callable[[], None] = lambda: None) -> int:
    """Count the rows of one pass over the data, by making them.

    Args:
        rows: the stream.
        on_row: called for each.

    Raises:
        ConfigError: there is none.
    """
    count = 0
    for _ in rows.rows(rows.start(), repeat=False):
        on_row()
        count += 1
    if not count:
        raise ConfigError("the files of data.train hold no text", needed="at least one document that is not empty")
    return count


def written_config(config: TrainConfig) -> str:
    """Write a configuration as JSON, for a checkpoint.

    Args:
        config: the training.
    """
    return json.dumps(to_plain(config), sort_keys=True)


def check_same(config: TrainConfig, stored: str, folder: Path) -> None:
    """Make sure that a checkpoint is of this training.

    Args:
        config: the training.
        stored: the checkpoint's configuration.
        folder: the checkpoint, for the message.

    Raises:
        ConfigError: a value that decides what is learned is another one.
    """
    try:
        before: Any = json.loads(stored)
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise ConfigError(f"{folder} has no readable configuration", remedy="train into another folder")
    now = to_plain(config)
    for key in sorted(now.keys() | before.keys()):
        if key not in MAY_CHANGE and now.get(key) != before.get(key):
            what, was, wanted = _difference(key, before.get(key), now.get(key))
            raise ConfigError(
                f"{folder} is of a training with {what} = {was}",
                needed=f"{wanted}, as the configuration says now",
                remedy="train into another output_dir, or with the settings it was begun with",
            )


def _difference(key: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """Name the first value inside two tables that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for inner in sorted(now.keys() | before.keys()):
            if before.get(inner) != now.get(inner):
                return _difference(f"{key}.{inner}", before.get(inner), now.get(inner))
    return key, before, now
