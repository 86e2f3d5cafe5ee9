"""What a model would do on a machine that is described, not measured: splits over devices, batches, latency.

    step     = stages x layers of one x (max(bytes / bandwidth, operations / peak) + starts + collectives) + transfers
    tensor   = two all-reduces of the rows a layer: 2 (n - 1) / n x bytes / bandwidth + 2 ceil(log2 n) x latency
    expert   = two all-to-alls of the rows that leave: (n - 1) / n x bytes / bandwidth + ceil(log2 n) x latency
    pipeline = rows handed on between stages; as many micro-batches as stages are in flight

Every layer of a device reads its share of the weights once, of routed experts those that the batch's tokens meet:
E (1 - (1 - k / E)^T) of E experts for T tokens that pass k each, if the router is even.

Sources: Shoeybi et al. 2019 (Megatron-LM, tensor parallelism), Pope et al. 2022 ("Efficiently Scaling Transformer
Inference", section 3), Thakur et al. 2005 (cost of collectives).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dseek.core.errors import ConfigError, MemoryLimitError
from dseek.plan.devices import DeviceMachine
from dseek.plan.explain import size_text
from dseek.plan.outline import Outline

WEIGHT_BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "int8": 8.25, "int4": 4.5}
"""Bits of a weight with its scales."""

CACHE_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
QUALITY_LOSS = {"fp32": 0.0, "bf16": 0.0005, "fp16": 0.0001, "int8": 0.004, "int4": 0.2}
"""Expected rise of perplexity, as `plan.quality` has it for weights of a wider file."""

CACHE_LOSS = {"fp32": 0.0, "bf16": 0.0, "int8": 0.001}
MEMORY_SHARE = 0.9
"""Of a device's memory that may be planned for."""

TIE = 1.03
OPERATORS_PER_LAYER = 8
"""Operators that are started in a fused decoder layer."""

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """How a model lies on devices: tensor x pipeline x data of them."""

    tensor: int = 1
    """Devices that share every layer's matrices."""
    pipeline: int = 1
    """Stages, each with a run of layers."""
    data: int = 1
    """Copies of what is no expert, each with a part of the batch."""
    expert: int = 1
    """Devices of a stage that share the experts: 1 (each splits every expert as other matrices), or tensor x data."""

    @property
    def num_devices(self) -> int:
        """Devices in use."""
        return self.tensor * self.pipeline * self.data

    def text(self) -> str:
        """Write it for people, such as `tensor 4 x pipeline 2`."""
        parts = [("tensor", self.tensor), ("pipeline", self.pipeline), ("data", self.data), ("expert", self.expert)]
        return " x ".join(f"{name} {count}" for name, count in parts if count > 1) or "one device"


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One way to run, with what is predicted of it."""

    split: Split
    """Over devices."""
    precision: str
    """Of the weights."""
    cache_dtype: str
    """Of the cache."""
    batch: int
    """Sequences at a time, all together."""
    context_tokens: int
    """Positions of each sequence."""
    step_s: float
    """Time until every sequence has its next token: what a reader waits for."""
    token_s: float
    """Time a token, over all sequences: step / sequences in flight."""
    prompt_s: float
    """Time of one prompt as long as the context, alone."""
    communication_s: float
    """Of a step, time in collectives and transfers."""
    weights_bytes: float
    """On each device."""
    cache_bytes: float
    """On each device."""
    workspace_bytes: float
    """On each device."""
    quality_loss: float
    """Expected rise of perplexity, a fraction."""

    @property
    def memory_bytes(self) -> float:
        """Of one device."""
        return self.weights_bytes + self.cache_bytes + self.workspace_bytes

    @property
    def tokens_s(self) -> float:
        """New tokens a second, over all sequences."""
        return 1 / self.token_s


def splits(outline: Outline, machine: DeviceMachine) -> list[Split]:
    """List the ways to lie on a machine's devices that divide heads, layers and experts evenly enough.

    Args:
        outline: the model.
        machine: the devices.
    """
    found = []
    counts = [count for count in range(1, machine.num_devices + 1) if machine.num_devices % count == 0]
    for tensor in counts:
        if outline.num_heads % tensor:
            continue
        for pipeline in counts:
            if pipeline > outline.num_layers or machine.num_devices % (tensor * pipeline):
                continue
            for data in (1, machine.num_devices // (tensor * pipeline)):
                shared = tensor * data
                experts = {1, shared} if outline.num_experts and outline.num_experts % shared == 0 else {1}
                found += [
                    Split(tensor=tensor, pipeline=pipeline, data=data, expert=expert) for expert in sorted(experts)
                ]
    return list(dict.fromkeys(found))


def predict(
    outline: Outline,
    machine: DeviceMachine,
    split: Split,
    *,
    precision: str = "bf16",
    cache_dtype: str = "bf16",
    batch: int,
    context_tokens: int,
) -> Point:
    """Predict one way to run.

    Args:
        outline: the model.
        machine: the devices.
        split: over them.
        precision: of the weights.
        cache_dtype: of the cache.
        batch: sequences, all together.
        context_tokens: positions of each.

    Returns:
        Times in seconds, sizes in bytes on each device.

    Raises:
        ConfigError: a precision that is not known.
    """
    if precision not in WEIGHT_BITS or cache_dtype not in CACHE_BYTES:
        raise ConfigError(f"{precision} with a cache in {cache_dtype}", needed="one of " + ", ".join(WEIGHT_BITS))
    rows = max(1, math.ceil(batch / split.data / split.pipeline))
    stage = _stage(outline, machine, split, precision, cache_dtype, rows, context_tokens, rows)
    head_s = _head_s(outline, machine, split, precision, rows)
    hand_on_s = _hand_on_s(outline, machine, split, rows)
    step_s = split.pipeline * stage.seconds + head_s + hand_on_s
    in_flight = min(batch, rows * split.data * split.pipeline)
    prompt = _stage(outline, machine, split, precision, cache_dtype, context_tokens, context_tokens, 1)
    prompt_s = split.pipeline * prompt.seconds + _hand_on_s(outline, machine, split, context_tokens)
    cache = batch / split.data * context_tokens * outline.cache_elements_per_token() * CACHE_BYTES[cache_dtype]
    # Keys and values go with their heads; what latent attention keeps belongs to all heads, and every device has it.
    share = 1 if outline.kv_rank else min(split.tensor, outline.num_kv_heads)
    return Point(
        split=split,
        precision=precision,
        cache_dtype=cache_dtype,
        batch=batch,
        context_tokens=context_tokens,
        step_s=step_s,
        token_s=step_s / in_flight,
        prompt_s=prompt_s,
        communication_s=split.pipeline * stage.communication_s + hand_on_s,
        weights_bytes=weights_per_device(outline, split, precision),
        cache_bytes=cache / split.pipeline / share,
        workspace_bytes=_workspace_bytes(outline, split, rows),
        quality_loss=QUALITY_LOSS[precision] + CACHE_LOSS[cache_dtype],
    )


def weights_per_device(outline: Outline, split: Split, precision: str) -> float:
    """Bytes of weights on the fullest device.

    Args:
        outline: the model.
        split: over devices.
        precision: of the weights.
    """
    bytes_each = WEIGHT_BITS[precision] / 8
    dense, experts = _layer_bytes(outline, bytes_each)
    layers = math.ceil(outline.num_layers / split.pipeline)
    tables = outline.vocab_size * outline.hidden_size * bytes_each / split.tensor
    count = 1 if outline.tie_word_embeddings or split.pipeline > 1 else 2
    expert_share = split.expert if split.expert > 1 else split.tensor
    return layers * (dense / split.tensor + experts / expert_share) + count * tables


@dataclass(frozen=True, slots=True)
class _Stage:
    seconds: float
    communication_s: float


def _layer_bytes(outline: Outline, bytes_each: float) -> tuple[float, float]:
    """Bytes of an average layer: what every token passes, and its routed experts."""
    total = outline.num_parameters(with_embedding=False)
    experts = outline.num_expert_layers * outline.num_experts * outline.expert_parameters()
    return (total - experts) * bytes_each / outline.num_layers, experts * bytes_each / outline.num_layers


def _stage(
    outline: Outline,
    machine: DeviceMachine,
    split: Split,
    precision: str,
    cache_dtype: str,
    rows: int,
    context: int,
    sequences: int,
) -> _Stage:
    """Time of one stage's layers for the rows of one copy: a decode step, or a prompt where there is one sequence."""
    device, bytes_each = machine.device, WEIGHT_BITS[precision] / 8
    dense, experts = _layer_bytes(outline, bytes_each)
    tokens = rows * split.data
    met = 1.0
    if outline.num_experts:
        met = 1 - (1 - outline.experts_per_token / outline.num_experts) ** tokens
    expert_share = split.expert if split.expert > 1 else split.tensor
    read = dense / split.tensor + experts * met / expert_share
    per_token = outline.cache_elements_per_token() * CACHE_BYTES[cache_dtype] / outline.num_layers
    cache_share = 1 if outline.kv_rank else min(split.tensor, outline.num_kv_heads)
    read += sequences * context * per_token / cache_share
    width = (outline.num_parameters(active=True) - outline.vocab_size * outline.hidden_size) / outline.num_layers
    pairs = rows * context if sequences == rows else rows * (rows + 1) / 2
    # Latent attention decodes in the compressed space: a wider product, over what the cache holds (DeepSeek-V2, 2.1).
    channels = outline.key_dim + outline.value_dim
    if outline.kv_rank and sequences == rows:
        channels = 2 * outline.kv_rank + outline.rope_dim
    flops = (2.0 * rows * width + 2.0 * pairs * outline.num_heads * channels) / split.tensor
    compute = device.peak_flops("int8" if precision == "int8" else precision)
    seconds = max(read / device.bytes_s, flops / compute) + OPERATORS_PER_LAYER * device.operator_s
    communication = 2 * _all_reduce_s(machine, split.tensor, 2.0 * rows * outline.hidden_size)
    if split.expert > 1 and outline.num_expert_layers:
        share = outline.num_expert_layers / outline.num_layers
        leaving = 2.0 * rows / split.tensor * outline.experts_per_token * outline.hidden_size
        communication += 2 * share * _all_to_all_s(machine, split.expert, leaving)
    layers = math.ceil(outline.num_layers / split.pipeline)
    return _Stage(layers * (seconds + communication), layers * communication)


def _head_s(outline: Outline, machine: DeviceMachine, split: Split, precision: str, rows: int) -> float:
    size = outline.vocab_size * outline.hidden_size / split.tensor
    device = machine.device
    read_s = size * WEIGHT_BITS[precision] / 8 / device.bytes_s
    return max(read_s, 2.0 * rows * size / device.peak_flops(precision)) + device.operator_s


def _all_reduce_s(machine: DeviceMachine, count: int, num_bytes: float) -> float:
    if count == 1 or machine.link is None:
        return 0.0
    steps = 2 * math.ceil(math.log2(count)) * machine.link.latency_s
    return 2 * (count - 1) / count * num_bytes / (machine.link.bandwidth_gbs * 1e9) + steps


def _all_to_all_s(machine: DeviceMachine, count: int, num_bytes: float) -> float:
    if count == 1 or machine.link is None:
        return 0.0
    steps = math.ceil(math.log2(count)) * machine.link.latency_s
    return (count - 1) / count * num_bytes / (machine.link.bandwidth_gbs * 1e9) + steps


def _hand_on_s(outline: Outline, machine: DeviceMachine, split: Split, rows: int) -> float:
    if split.pipeline == 1 or machine.link is None:
        return 0.0
    one = 2.0 * rows * outline.hidden_size / (machine.link.bandwidth_gbs * 1e9) + machine.link.latency_s
    return split.pipeline * one


def _workspace_bytes(outline: Outline, split: Split, rows: int) -> float:
    """Activations of a layer in 16 bits, logits in 32, and half a gigabyte of the runtime itself."""
    widest = 4 * outline.hidden_size + 3 * max(
        outline.intermediate_size, outline.experts_per_token * outline.expert_size
    )
    return rows * (2 * widest / split.tensor + 4 * outline.vocab_size / split.tensor) + 5e8


def search(
    outline: Outline,
    machine: DeviceMachine,
    *,
    context_tokens: int,
    batches: Sequence[int] = BATCHES,
    precisions: Sequence[str] = ("bf16",),
    cache_dtypes: Sequence[str] = ("bf16",),
) -> list[Point]:
    """Predict every split, batch, precision and cache.

    Args:
        outline: the model.
        machine: the devices.
        context_tokens: positions of each sequence.
        batches: sequences, all together.
        precisions: of the weights.
        cache_dtypes: of the cache.

    Returns:
        Those that fit into the memory.

    Raises:
        MemoryLimitError: nothing fits; says what the least needs.
    """
    limit = MEMORY_SHARE * machine.device.memory_bytes
    points = [
        predict(
            outline,
            machine,
            split,
            precision=precision,
            cache_dtype=cache_dtype,
            batch=batch,
            context_tokens=context_tokens,
        )
        for split in splits(outline, machine)
        for precision in precisions
        for cache_dtype in cache_dtypes
        for batch in batches
    ]
    fitting = [point for point in points if point.memory_bytes <= limit]
    if not fitting:
        least = min(points, key=lambda point: point.memory_bytes)
        raise MemoryLimitError(
            f"{outline.name} needs {size_text(least.memory_bytes)} on each of {machine.num_devices} x "
            f"{machine.device.name} in {least.precision} with {least.split.text()}",
            needed=f"at most {size_text(limit)}",
            remedy="take more devices, a narrower --precision, a smaller --batch or a shorter --context",
        )
    return fitting


def best(points: Sequence[Point]) -> Point:
    """Take the point with the least time a token; of those within 3 % the one that a reader waits least for.

    Args:
        points: at least one.
    """
    least = min(point.token_s for point in points)
    return min((point for point in points if point.token_s <= TIE * least), key=lambda point: point.step_s)


def best_by_batch(points: Sequence[Point]) -> list[Point]:
    """Take the best point of each batch.

    Args:
        points: at least one.

    Returns:
        One for each batch, in the order of the batches.
    """
    return [
        best([point for point in points if point.batch == batch]) for batch in sorted({point.batch for point in points})
    ]
