"""The cost model: time and memory of a run, from the model's shape and the machine's measured rates.

    step   = layers x (fusion x (four linear layers + small operations) + attention) + head + bookkeeping
    decode = one step of `batch` rows; prefill = steps of at most a chunk of rows

Every linear layer is read off its format's measured curve for the number of rows (`rates`); attention off the curve of
its cache dtype, but never faster than its cache can be read (`parts`); the sum is corrected by what whole blocks took
(`fusion`). What it does not know: other load on the machine, the
time a sampler with many filters takes, and the order in which an engine mixes prefill with decode.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

from dseek.core.shape import ModelShape
from dseek.hardware.machine import Machine
from dseek.plan.formats import cache_bytes_per_token, packed_bytes
from dseek.plan.fusion import Fusion
from dseek.plan.layout import PAGE_TOKENS, Layout
from dseek.plan.parts import attention_s
from dseek.plan.rates import Rates
from dseek.plan.selection import pyramid_page_bytes

__all__ = [
    "PAGE_TOKENS",
    "Layout",
    "Prediction",
    "Speeds",
    "decode_s",
    "predict",
    "prefill_s",
    "speeds",
    "weight_bytes",
]

MAX_CHUNKS_COSTED = 32
"""A long prompt's attention is added up from so many of its chunks, evenly spread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a plan is expected to reach and to take."""

    prefill_tokens_s: float
    """Prompt tokens a second, all sequences together."""
    decode_tokens_s: float
    """New tokens a second, all sequences together."""
    weights_bytes: int
    """Packed weights, tables and norms."""
    streamed_bytes: int
    """Weights that a decode step reads: all but an embedding that is not the head."""
    cache_bytes: int
    """Key/value cache, with the pyramid beside it where a layer does not attend to everything."""
    workspace_bytes: int
    """The process itself, activations and logits."""
    peak_bytes: int
    """Sum of weights, cache and workspace."""
    load_s: float
    """Time to pack the weights at load."""


def predict(
    shape: ModelShape, machine: Machine, layout: Layout, *, prompt_tokens: int, context_tokens: int, batch: int
) -> Prediction:
    """Predict time and memory of a run.

    Args:
        shape: the model.
        machine: the measurements.
        layout: formats, threads, chunk and cache.
        prompt_tokens: length of each prompt, for the prefill rate.
        context_tokens: positions in each sequence's cache while decoding, for the decode rate.
        batch: sequences at a time.

    Returns:
        Rates in tokens a second over all sequences, sizes in bytes.

    Raises:
        ConfigError: the machine was not measured with these kernels.
    """
    here = speeds(machine, layout.kernels, layout.num_threads)
    weights, streamed = weight_bytes(shape, layout)
    page = PAGE_TOKENS * _cache_bytes_per_position(shape, layout)
    page += pyramid_page_bytes(shape, layout.attention_patterns, layout.num_pages)
    cache = layout.num_pages * page
    workspace = workspace_bytes(shape, machine, layout)
    return Prediction(
        prefill_tokens_s=batch * prompt_tokens / prefill_s(shape, here, layout, prompt_tokens, batch),
        decode_tokens_s=batch / decode_s(shape, here, layout, context_tokens, batch),
        weights_bytes=weights,
        streamed_bytes=streamed,
        cache_bytes=cache,
        workspace_bytes=workspace,
        peak_bytes=weights + cache + workspace,
        load_s=_load_s(shape, machine, layout, weights),
    )


@dataclass(frozen=True, slots=True)
class Speeds:
    """The machine's times for one set of kernels and number of threads."""

    rates: Rates
    """Times of parts."""
    fusion: Fusion
    """What whole blocks make of their sum."""


class _ByIdentity:
    """Lets a machine be a cache key without hashing all its curves."""

    __slots__ = ("machine",)

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def __hash__(self) -> int:
        return id(self.machine)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and other.machine is self.machine


@functools.lru_cache(maxsize=64)
def _speeds(key: _ByIdentity, kernels: str, num_threads: int) -> Speeds:
    machine = key.machine
    if num_threads >= machine.num_threads:
        rates = Rates(machine, kernels, num_threads)
        return Speeds(rates, Fusion(machine, kernels, rates))
    # Blocks were timed with all threads, so that their correction is that of all threads too.
    return Speeds(Rates(machine, kernels, num_threads), _speeds(key, kernels, machine.num_threads).fusion)


def speeds(machine: Machine, kernels: str, num_threads: int) -> Speeds:
    """Return the machine's times, made ready once for each set of kernels and number of threads.

    Args:
        machine: the measurements.
        kernels: native or torch.
        num_threads: threads of the run.

    Raises:
        ConfigError: the machine was not measured with these kernels.
    """
    return _speeds(_ByIdentity(machine), kernels, num_threads)


def decode_s(shape: ModelShape, here: Speeds, layout: Layout, context_tokens: int, batch: int) -> float:
    """Time of one decode step: one new token for each sequence.

    Args:
        shape: the model.
        here: the machine's times.
        layout: formats and cache.
        context_tokens: positions in each sequence's cache, the new one included.
        batch: sequences.

    Returns:
        Seconds.
    """
    _, streamed = weight_bytes(shape, layout)
    working_set = streamed + batch * _seen_cache_bytes(shape, layout, context_tokens)
    seconds = _blocks_s(shape, here, layout, batch, working_set)
    seconds += attention_s(shape, here.rates, layout, [(1, context_tokens)], working_set, repeat=batch)
    return seconds + _head_s(shape, here, layout, batch, working_set) + _step_s(shape, here.rates, batch, batch)


def prefill_s(shape: ModelShape, here: Speeds, layout: Layout, prompt_tokens: int, batch: int) -> float:
    """Time until the prompts of all sequences are in the cache and each has its first token.

    Args:
        shape: the model.
        here: the machine's times.
        layout: formats, cache and chunk.
        prompt_tokens: length of each prompt.
        batch: sequences.

    Returns:
        Seconds.
    """
    weights, _ = weight_bytes(shape, layout)
    chunk = layout.prefill_chunk_tokens
    full_steps, rest = divmod(batch * prompt_tokens, chunk)
    seconds = 0.0
    for num_rows, steps in ((chunk, full_steps), (rest, 1)):
        if num_rows and steps:
            seconds += steps * (_blocks_s(shape, here, layout, num_rows, weights) + _step_s(shape, here.rates, 1, 0))
    # Attention, sequence by sequence: a chunk sees what was before it.
    starts = range(0, prompt_tokens, chunk)
    spread = starts[:: max(1, -(-len(starts) // MAX_CHUNKS_COSTED))]
    pieces = [(min(chunk, prompt_tokens - start), min(start + chunk, prompt_tokens)) for start in spread]
    attention = attention_s(shape, here.rates, layout, pieces, weights, repeat=1) * len(starts) / len(spread)
    seconds += batch * attention
    # Only the last row of each prompt asks for logits; short prompts share a step.
    together = min(batch, max(1, chunk // prompt_tokens))
    return seconds + batch / together * _head_s(shape, here, layout, together, weights)


def _blocks_s(shape: ModelShape, here: Speeds, layout: Layout, num_rows: int, working_set: float) -> float:
    """All layers without attention; layers of equal formats are costed once."""
    return sum(
        count * here.fusion.block_s(shape, here.rates, formats, layout.kernels, num_rows, working_set)
        for formats, count in Counter(layout.layer_formats).items()
    )


def _head_s(shape: ModelShape, here: Speeds, layout: Layout, num_rows: int, working_set: float) -> float:
    return here.rates.linear_s(layout.head_format, num_rows, shape.vocab_size, shape.hidden_size, working_set)


def _step_s(shape: ModelShape, rates: Rates, num_sequences: int, num_sampled: int) -> float:
    costs = rates.overheads
    return costs.step_s + num_sequences * costs.row_s + num_sampled * shape.vocab_size * costs.logit_s


def weight_bytes(shape: ModelShape, layout: Layout) -> tuple[int, int]:
    """Size of the weights in memory.

    Args:
        shape: the model.
        layout: formats.

    Returns:
        Bytes of all weights, and bytes of those that a decode step reads from end to end.
    """
    sizes = shape.linear_sizes()
    total = 0
    for formats, count in Counter(layout.layer_formats).items():
        roles = formats.by_role().items()
        total += count * sum(packed_bytes(weight_format, *sizes[role]) for role, weight_format in roles)
    tables = 1 if shape.tie_word_embeddings else 2
    vectors = shape.num_parameters() - shape.num_layers * shape.num_block_parameters()
    vectors -= tables * shape.vocab_size * shape.hidden_size
    head = packed_bytes(layout.head_format, shape.vocab_size, shape.hidden_size)
    total += 4 * vectors + head
    streamed = total
    if not shape.tie_word_embeddings or layout.embedding_format != layout.head_format:
        total += packed_bytes(layout.embedding_format, shape.vocab_size, shape.hidden_size)
    return total, streamed


def workspace_bytes(shape: ModelShape, machine: Machine, layout: Layout) -> int:
    """Memory besides weights and cache: the process, activations of a step, logits, rotation tables.

    Args:
        shape: the model.
        machine: knows how large an empty process is.
        layout: chunk, batch and pages.

    Returns:
        Bytes.
    """
    rows = max(layout.prefill_chunk_tokens, layout.max_batch)
    widths = 3 * shape.hidden_size + 2 * shape.query_size + 2 * shape.kv_size + 3 * shape.intermediate_size
    positions = min(shape.max_position_embeddings, layout.num_pages * PAGE_TOKENS)
    process = machine.torch_process_bytes if layout.kernels == "torch" else machine.process_bytes
    return process + 4 * (rows * widths + layout.max_batch * shape.vocab_size + positions * shape.head_dim)


def _cache_bytes_per_position(shape: ModelShape, layout: Layout) -> int:
    """One position's keys and values in all layers."""
    return shape.num_layers * cache_bytes_per_token(layout.cache_dtype, shape.num_kv_heads, shape.head_dim)


def _seen_cache_bytes(shape: ModelShape, layout: Layout, context_tokens: int) -> float:
    """What one new token reads of its sequence's cache in all layers."""
    per_layer = cache_bytes_per_token(layout.cache_dtype, shape.num_kv_heads, shape.head_dim)
    seen = (
        count * pattern.visible_tokens(context_tokens, shape.num_kv_heads)
        for pattern, count in Counter(layout.attention_patterns).items()
    )
    return per_layer * sum(seen)


def _load_s(shape: ModelShape, machine: Machine, layout: Layout, weights_bytes: int) -> float:
    """Pack every weight at the measured pace; where packing was not measured, copy it through memory."""
    paces = {rate.weight_format: rate.weights_per_s for rate in machine.packing}
    if layout.kernels == "torch" or not paces:
        return 2e-9 * weights_bytes / machine.read_bandwidth_gbs
    slowest = min(paces.values())
    sizes = shape.linear_sizes()
    seconds = 0.0
    for formats, count in Counter(layout.layer_formats).items():
        for role, weight_format in formats.by_role().items():
            seconds += count * sizes[role][0] * sizes[role][1] / paces.get(weight_format, slowest)
    tables = {layout.head_format} if shape.tie_word_embeddings else [layout.head_format, layout.embedding_format]
    return seconds + sum(shape.vocab_size * shape.hidden_size / paces.get(name, slowest) for name in tables)
