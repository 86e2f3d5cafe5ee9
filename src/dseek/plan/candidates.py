"""What the search chooses from: the values that the machine, the model and the user's wishes allow each decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dseek.core import environment
from dseek.core.errors import ConfigError
from dseek.core.shape import ModelShape
from dseek.hardware.machine import Machine
from dseek.plan.attention_wish import AttentionWish
from dseek.plan.formats import (
    CACHE_DTYPES,
    MEASURED_AS,
    PRECISIONS,
    VARIANTS,
    CacheDtype,
    Kernels,
    Variant,
    variants_for,
)
from dseek.plan.head_facts import HeadFacts
from dseek.plan.objective import Objective

DEFAULT_CONTEXT_TOKENS = 8192
CHUNKS = (64, 128, 256, 512, 1024, 2048)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What the user decided already; None leaves it to the search. Explained at `plan.make`."""

    model: str
    """Name, for messages."""
    precision: str | None
    """A precision or auto."""
    cache_dtype: str | None
    """A cache dtype."""
    num_threads: int | None
    """Threads."""
    prefill_chunk_tokens: int | None
    """Most rows of a step."""
    kernels: str | None
    """native or torch."""
    attention: AttentionWish
    """What layers attend to."""
    heads: HeadFacts
    """What is known of the heads."""


def context_of(shape: ModelShape, objective: Objective) -> int:
    """Return how many tokens a sequence may hold.

    Args:
        shape: the model.
        objective: may ask for a length.

    Raises:
        ConfigError: longer than the model was made for.
    """
    longest = shape.max_position_embeddings
    if objective.context_tokens is None:
        return min(longest, DEFAULT_CONTEXT_TOKENS)
    if objective.context_tokens > longest:
        raise ConfigError(
            f"a context of {objective.context_tokens} tokens was asked for",
            needed=f"at most {longest}, what the model was made for",
            remedy=f"take --context {longest} or less",
        )
    return objective.context_tokens


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{what} is {value!r}", needed="one of " + ", ".join(allowed))


def kernels(machine: Machine, wishes: Wishes) -> Kernels:
    """Return the kernels to plan for: those asked for, else native where they were measured.

    Args:
        machine: the measurements.
        wishes: may ask for kernels.

    Raises:
        ConfigError: unknown kernels, or not measured.
    """
    measured = {curve.kernels for curve in machine.linears}
    if wishes.kernels is not None:
        _one_of("kernels", wishes.kernels, ("native", "torch"))
        if wishes.kernels not in measured:
            raise ConfigError(
                f"{wishes.kernels} kernels were asked for, but not measured on this machine",
                remedy="run `dseek doctor --refresh`, which says what is missing",
            )
        return "torch" if wishes.kernels == "torch" else "native"
    return "native" if "native" in measured else "torch"


def precision(wishes: Wishes) -> str:
    """Return the precision asked for, by the caller or by DSEEK_PRECISION_MODE, or auto.

    Args:
        wishes: may ask for a precision.

    Raises:
        ConfigError: unknown.
    """
    wanted = wishes.precision or environment.get("DSEEK_PRECISION_MODE")
    _one_of("precision", wanted, ("auto", *PRECISIONS))
    return wanted


def threads(machine: Machine, wishes: Wishes) -> list[int]:
    """List the thread counts to consider, rising.

    Args:
        machine: has so many at most.
        wishes: may ask for a number.

    Raises:
        ConfigError: out of range.
    """
    wanted = wishes.num_threads or environment.get("DSEEK_NUM_THREADS")
    if wanted is not None:
        if not 1 <= wanted <= 1024:
            raise ConfigError(f"{wanted} threads were asked for", needed="1 to 1024")
        return [wanted]
    count = machine.num_threads
    if len(machine.scalings) < 2:
        # What fewer threads cost was not measured.
        return [count]
    if count <= 8:
        return list(range(1, count + 1))
    return sorted({1, 2, 4, 8, count // 2, 3 * count // 4, count})


def chunks(context: int, wishes: Wishes) -> list[int]:
    """List the prefill chunks to consider, rising.

    Args:
        context: tokens a sequence may hold.
        wishes: may ask for a chunk.

    Raises:
        ConfigError: out of range.
    """
    if wishes.prefill_chunk_tokens is not None:
        if not 1 <= wishes.prefill_chunk_tokens <= 65536:
            raise ConfigError(f"a chunk of {wishes.prefill_chunk_tokens} tokens was asked for", needed="1 to 65536")
        return [wishes.prefill_chunk_tokens]
    return [chunk for chunk in CHUNKS if chunk < 2 * context] or [CHUNKS[0]]


def format_pairs(
    machine: Machine, kernels: Kernels, precision: str, wishes: Wishes, encodings: Mapping[str, int]
) -> list[tuple[Variant, CacheDtype]]:
    """List the variants of the weights with the cache dtypes that go with them, as far as they were measured.

    Args:
        machine: the measurements.
        kernels: native or torch.
        precision: a precision or auto.
        wishes: may ask for a cache dtype.
        encodings: elements in the file, by encoding.

    Raises:
        ConfigError: there are none, or an unknown cache dtype.
    """
    if wishes.cache_dtype is not None:
        _one_of("the cache's dtype", wishes.cache_dtype, CACHE_DTYPES)
    formats = {curve.weight_format for curve in machine.linears if curve.kernels == kernels}
    formats |= {name for name, base in MEASURED_AS.items() if kernels == "native" and base in formats}
    caches = {curve.cache_dtype for curve in machine.attentions if curve.kernels == kernels}
    pairs: list[tuple[Variant, CacheDtype]] = []
    for variant in variants_for(encodings):
        if precision not in ("auto", variant.precision):
            continue
        if {variant.weight_format, variant.table_format} - formats:
            continue
        # Arithmetic in fp32 all the way; elsewhere a cache wider than bf16 would be the only wide thing.
        # And with weights in 16 bits, an int8 cache would be the least exact thing.
        narrow: tuple[CacheDtype, ...] = ("bf16",) if variant.precision in ("bf16", "fp16") else ("bf16", "int8")
        natural: tuple[CacheDtype, ...] = ("fp32",) if variant.precision == "fp32" else narrow
        for cache_dtype in CACHE_DTYPES:
            wanted = cache_dtype in natural if wishes.cache_dtype is None else cache_dtype == wishes.cache_dtype
            if wanted and cache_dtype in caches:
                pairs.append((variant, cache_dtype))
    if not pairs:
        raise ConfigError(
            f"precision {precision} with {'any' if wishes.cache_dtype is None else wishes.cache_dtype} cache does not "
            f"run on the {kernels} kernels here",
            needed="one of auto, " + ", ".join(sorted({v.precision for v in VARIANTS if v.weight_format in formats})),
            remedy="`dseek doctor` says which kernels there are" if kernels == "torch" else None,
        )
    return pairs
