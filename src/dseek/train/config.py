"""`TrainConfig`: everything that `dseek train` is told, read from one TOML file.

Names are those of transformers' `TrainingArguments` (and of TRL's `SFTConfig` for data) wherever the thing is the same;
what is dseek's own lies in the tables `data`, `memory`, `checkpoints`, `lora`, `shape` and `gate`. Ranges are checked
here, whether a file or a model exists is found out by who opens it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dseek.core.config import from_mapping, read_toml
from dseek.core.errors import ConfigError

ScheduleName = Literal["linear", "cosine", "constant", "constant_with_warmup", "warmup_stable_decay"]
"""Schedules of the learning rate, as transformers calls them."""

OptimizerName = Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit"]
"""Optimisers, as transformers calls them."""

ShardStrategyName = Literal["auto", "none", "zero1", "zero2", "zero3"]
"""How ranks share the state of a training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is learned from, and how it is cut into rows."""

    train: tuple[str, ...]
    """Files to learn from, in this order; a name may hold `*`."""
    eval: tuple[str, ...] = ()
    """Files to evaluate on."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """What the files are; `auto` goes by the ending (.jsonl, .json, .ndjson; .parquet; all else is text)."""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """What one document is in a text file: the file, what stands between blank lines, or a line."""
    text_column: str = "text"
    """Key of a document's text in JSONL and parquet."""
    messages_column: str = "messages"
    """Key of a conversation, which is taken where a record has it; written by the model's chat template."""
    max_length: int = 1024
    """Tokens of a row, T."""
    packing: Literal["auto", "wrapped", "whole"] = "auto"
    """`wrapped`: rows are filled to the last token and documents go on in the next row. `whole`: a document that does
    not fit begins the next row, the rest of the row is padding, and a document longer than a row loses its end. `auto`
    is `whole` for conversations and `wrapped` for texts."""
    document_boundaries: Literal["attention", "none"] = "attention"
    """`attention`: positions begin anew with each document, attention does not cross its beginning, and its first token
    is not predicted. `none`: documents of a row are one text."""
    assistant_only_loss: bool = True
    """In conversations, only what the assistant says is learned."""
    shuffle: bool = False
    """Documents in another order in each epoch, drawn from the seed; needs one pass over the files to find them."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value out of its range.
        """
        if not self.train:
            raise ConfigError("data.train is empty", needed="at least one file")
        _check_range("data.max_length", self.max_length, 2, 1 << 24)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleOptions:
    """Options of a schedule that not every schedule has."""

    num_decay_steps: int | None = None
    """`warmup_stable_decay`: steps of the fall at the end; None is a tenth of all steps."""
    min_lr_ratio: float = 0.0
    """`cosine` and `warmup_stable_decay`: share of the rate that the fall ends at."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value out of its range.
        """
        _check_range("lr_scheduler_kwargs.min_lr_ratio", self.min_lr_ratio, 0.0, 1.0)
        if self.num_decay_steps is not None:
            _check_range("lr_scheduler_kwargs.num_decay_steps", self.num_decay_steps, 0, 1 << 40)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraOptions:
    """Low-rank adapters; names as in PEFT's `LoraConfig`."""

    r: int = 8
    """Rank."""
    lora_alpha: float = 16.0
    """The adapter's output is multiplied by lora_alpha / r (by lora_alpha / sqrt(r) with `use_rslora`)."""
    lora_dropout: float = 0.0
    """Share of an adapter's inputs that a step leaves out."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Projections that get an adapter."""
    use_rslora: bool = False
    """Scale by the root of the rank (Kalajdzievski 2023)."""
    merge: bool = False
    """At the end, write the whole model with the adapters added to its weights, beside the adapter."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value out of its range.
        """
        _check_range("lora.r", self.r, 1, 1 << 16)
        _check_range("lora.lora_dropout", self.lora_dropout, 0.0, 0.99)
        if not self.target_modules:
            raise ConfigError("lora.target_modules is empty", needed="at least one projection, such as q_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """How the memory of a training is kept within bounds; `auto` is decided by a prediction (`dseek.plan.training`)."""

    limit: str | None = None
    """Memory a process may take, such as `"8GB"`; None is what is free on the device."""
    shard_strategy: ShardStrategyName = "auto"
    """What ranks share: nothing, the optimiser's state (zero1), gradients too (zero2), weights too (zero3)."""
    gradient_checkpointing: Literal["auto"] | bool | int = "auto"
    """Blocks whose activations are computed again in the backward pass: all, none, or so many."""
    logits_chunk_tokens: Literal["auto"] | int = "auto"
    """Rows of the head that are computed at a time; 0 makes all logits at once."""
    mlp_chunk_tokens: int = 0
    """Tokens that an MLP computes at a time, and again in the backward pass; 0 is all of them, once."""
    offload_optimizer: Literal["none", "cpu", "disk"] = "none"
    """Where the optimiser keeps its state: on the device, in pinned memory of the host (CUDA), or in a file."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value out of its range.
        """
        if not isinstance(self.logits_chunk_tokens, str):
            _check_range("memory.logits_chunk_tokens", self.logits_chunk_tokens, 0, 1 << 24)
        _check_range("memory.mlp_chunk_tokens", self.mlp_chunk_tokens, 0, 1 << 24)
        if not isinstance(self.gradient_checkpointing, (str, bool)):
            _check_range("memory.gradient_checkpointing", self.gradient_checkpointing, 0, 1 << 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointOptions:
    """Snapshots: the whole state, written while the training goes on (`dseek.train.checkpoints`)."""

    snapshot_steps: int = 0
    """Steps from one snapshot to the next; 0 makes none."""
    remote: str | None = None
    """A second folder that gets a copy of each snapshot, such as a mounted network disk."""
    keep_last: int = 2
    """Newest snapshots that are kept."""
    compress: bool = True
    """Compress tensors where that saves enough; needs the extra `zstd`."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value out of its range.
        """
        _check_range("checkpoints.snapshot_steps", self.snapshot_steps, 0, 1 << 40)
        _check_range("checkpoints.keep_last", self.keep_last, 1, 1 << 20)
        if self.remote is not None and not self.remote.strip():
            raise ConfigError("checkpoints.remote is empty", needed="a folder, or no such key")


@dataclass(frozen=True, kw_only=True, slots=True)
class GateOptions:
    """`method = "gate"`: the options of `dseek train-gate`, under the same names."""

    tokens: tuple[int, ...] = (8192,)
    """Tokens of a sample; several lengths take turns."""
    max_position_embeddings: int | None = None
    """Positions that longer samples are run with."""
    samples: int = 24
    """Texts that are sampled."""
    passes: int = 16
    """Passes over the samples."""
    gate_dim: int = 32
    """Width of the gate."""
    mean_window: int = 512
    """Most tokens of the heads' windows in the mean."""
    density: float = 0.2
    """Share of all pairs that heads may look at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeOptions:
    """`from_scratch`: sizes that differ from the model's, under the names of config.json."""

    hidden_size: int | None = None
    """Width of the residual stream."""
    intermediate_size: int | None = None
    """Width of the MLP."""
    num_hidden_layers: int | None = None
    """Blocks."""
    num_attention_heads: int | None = None
    """Query heads."""
    num_key_value_heads: int | None = None
    """Key and value heads."""
    head_dim: int | None = None
    """Width of a head."""
    max_position_embeddings: int | None = None
    """Longest context."""
    rope_theta: float | None = None
    """Base of the rotary frequencies."""
    tie_word_embeddings: bool | None = None
    """The head is the embedding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training."""

    model: str
    """Folder in Hugging Face layout, `.gguf` file, alias or hub id."""
    output_dir: str
    """Folder for checkpoints and the result; a training that was stopped goes on in it."""
    data: DataConfig
    """What is learned from."""
    method: Literal["full", "lora", "gate"] = "full"
    """Learn all weights, adapters, or the gate of dynamic attention."""
    from_scratch: bool = False
    """Draw new weights; of `model` only the sizes and the tokenizer are taken."""
    shape: ShapeOptions | None = None
    """With `from_scratch`: other sizes."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    """With `method = "lora"`: the adapters."""
    gate: GateOptions = field(default_factory=GateOptions)
    """With `method = "gate"`: the gate."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """How memory is kept within bounds."""
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
    """Snapshots to go on from, beside the folders of `save_steps`."""

    max_steps: int = -1
    """Steps of the optimiser; -1 counts the rows and makes `num_train_epochs` passes over them."""
    num_train_epochs: float = 1.0
    """Passes over the data, where `max_steps` does not say otherwise."""
    per_device_train_batch_size: int = 8
    """Rows that a rank computes at a time, B."""
    per_device_eval_batch_size: int = 8
    """The same for evaluation."""
    gradient_accumulation_steps: int = 1
    """Batches of each rank whose gradients make one step."""
    learning_rate: float = 5e-5
    """Largest step of AdamW."""
    lr_scheduler_type: ScheduleName = "linear"
    """How the rate rises and falls."""
    lr_scheduler_kwargs: ScheduleOptions = field(default_factory=ScheduleOptions)
    """Options of the schedule."""
    warmup_steps: int = 0
    """Steps over which the rate rises from nothing."""
    warmup_ratio: float = 0.0
    """The same as a share of all steps, where `warmup_steps` is 0."""
    optim: OptimizerName = "adamw_torch_fused"
    """The optimiser; `adamw_8bit` keeps its moments in 8 bits."""
    weight_decay: float = 0.0
    """Of AdamW, on matrices alone."""
    adam_beta1: float = 0.9
    """Share of the first moment that a step keeps."""
    adam_beta2: float = 0.999
    """Share of the second moment that a step keeps."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Longest gradient; a longer one is shortened to it. 0 leaves all as they are."""
    bf16: bool = False
    """Compute products in bfloat16 (weights, moments and sums stay float32)."""
    seed: int = 42
    """Of new weights, dropout and order."""
    logging_steps: int = 10
    """Steps from one report to the next."""
    eval_steps: int = 0
    """Steps from one evaluation to the next; 0 evaluates at the end alone."""
    save_steps: int = 500
    """Steps from one checkpoint to the next; 0 saves at the end alone."""
    save_total_limit: int = 2
    """Checkpoints that are kept; older ones are removed. 0 keeps all."""
    report_to: Literal["none", "tensorboard"] = "none"
    """Write curves for TensorBoard into `output_dir/runs`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` is CUDA where there is a device."""
    ddp_backend: Literal["auto", "gloo", "nccl", "dseek"] = "auto"
    """Process group of several ranks; `auto` is nccl on CUDA, else gloo."""
    num_threads: int = 0
    """Threads of each process; 0 is PyTorch's own choice."""

    def __post_init__(self) -> None:
        """Check ranges and combinations.

        Raises:
            ConfigError: a value out of its range, or two that do not go together.
        """
        if self.max_steps == 0 or self.max_steps < -1:
            raise ConfigError(f"max_steps is {self.max_steps}", needed="-1, or at least 1")
        if not 0.0 < self.num_train_epochs <= 1e6:
            raise ConfigError(f"num_train_epochs is {self.num_train_epochs}", needed="above 0, at most 1000000")
        if not 0.0 < self.learning_rate < 10.0:
            raise ConfigError(f"learning_rate is {self.learning_rate}", needed="above 0 and below 10")
        for name, value, low, high in (
            ("per_device_train_batch_size", self.per_device_train_batch_size, 1, 1 << 20),
            ("per_device_eval_batch_size", self.per_device_eval_batch_size, 1, 1 << 20),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps, 1, 1 << 20),
            ("warmup_steps", self.warmup_steps, 0, 1 << 40),
            ("warmup_ratio", self.warmup_ratio, 0.0, 1.0),
            ("weight_decay", self.weight_decay, 0.0, 10.0),
            ("adam_beta1", self.adam_beta1, 0.0, 0.9999999),
            ("adam_beta2", self.adam_beta2, 0.0, 0.9999999),
            ("adam_epsilon", self.adam_epsilon, 0.0, 1.0),
            ("max_grad_norm", self.max_grad_norm, 0.0, 1e30),
            ("seed", self.seed, 0, (1 << 31) - 1),
            ("logging_steps", self.logging_steps, 1, 1 << 40),
            ("eval_steps", self.eval_steps, 0, 1 << 40),
            ("save_steps", self.save_steps, 0, 1 << 40),
            ("save_total_limit", self.save_total_limit, 0, 1 << 20),
            ("num_threads", self.num_threads, 0, 4096),
        ):
            _check_range(name, value, low, high)
        if self.shape is not None and not self.from_scratch:
            raise ConfigError("the table shape is given, but from_scratch is false", remedy="leave one of them out")
        if self.from_scratch and self.method != "full":
            raise ConfigError(f"method is {self.method!r} with from_scratch", needed='method = "full"')
        if self.eval_steps and not self.data.eval:
            raise ConfigError(f"eval_steps is {self.eval_steps}, but data.eval names no file")
        if self.optim == "adamw_8bit" and self.memory.offload_optimizer != "none":
            raise ConfigError(
                f"optim is adamw_8bit and memory.offload_optimizer is {self.memory.offload_optimizer}",
                needed="one of the two: the 8-bit state stays on the device",
            )


def load_config(path: str | Path, changes: Sequence[str] = ()) -> TrainConfig:
    """Read a training's TOML file.

    Args:
        path: the file.
        changes: `KEY=VALUE` each, which replace what the file says; a key inside a table is `TABLE.KEY`, and a value
            that is no TOML is a text.

    Returns:
        The configuration, checked. Relative paths in it are relative to the working folder.

    Raises:
        ConfigError: the file cannot be read, a key is unknown (the nearest one is named), or a value is wrong.
    """
    data = read_toml(path)
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"the change {change!r} has no key and value", needed="KEY=VALUE, such as max_steps=100")
        *tables, last = key.strip().split(".")
        table: Any = data
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ConfigError(f"the change {change!r} names {name!r}, which is no table")
        table[last] = _value(value.strip())
    return from_mapping(TrainConfig, data, where=str(path))


def _value(text: str) -> Any:
    import tomllib

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value}", needed=f"{low} to {high}")
