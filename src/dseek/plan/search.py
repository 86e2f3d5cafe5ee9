"""The search: which formats, cache, threads and chunk serve an objective best, within the quality and memory allowed.

Decisions are taken one after the other, each with everything else at its best so far, so that each can be told in one
sentence: 1. kernels, 2. batch (only if it is free), 3. formats of the weights and the cache together, mixtures of
formats among them (`mixing`), 4. what the layers attend to (`attention`), 5. threads, 6. the prefill chunk. Among
values whose predicted cost is within 3 % of the best, which is less than the prediction can tell apart, the one with
the least quality loss, then the least memory or disturbance, is taken (`chooser`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dseek.core.attention_pattern import DENSE
from dseek.core.shape import ModelShape
from dseek.hardware.machine import Machine
from dseek.plan import attention, candidates, mixing, quality
from dseek.plan.candidates import BATCHES, Wishes
from dseek.plan.chooser import TIE, Candidate, Chooser
from dseek.plan.cost import Prediction
from dseek.plan.explain import Alternative, Choice, loss_text, score_text
from dseek.plan.formats import CacheDtype, Kernels, Precision
from dseek.plan.layout import PAGE_TOKENS, Layout
from dseek.plan.objective import Objective
from dseek.plan.quality import LossTable, MeasuredLosses
from dseek.plan.weights import Weights, formats_text, uniform


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What came out."""

    precision: Precision
    """Precision of the weights."""
    layout: Layout
    """Everything time and memory depend on."""
    context_tokens: int
    """Tokens a sequence may hold."""
    predicted: Prediction
    """For the typical request."""
    choices: tuple[Choice, ...]
    """How it was decided."""


def decide(
    shape: ModelShape,
    machine: Machine,
    objective: Objective,
    encodings: Mapping[str, int],
    wishes: Wishes,
    measured: MeasuredLosses | None = None,
) -> Decision:
    """Search for the best layout.

    Args:
        shape: the model.
        machine: the measurements.
        objective: what for.
        encodings: elements in the file, by encoding.
        wishes: what is decided already.
        measured: what formats lose, where that was measured; the others are estimated.

    Returns:
        The layout with its prediction and the reasons.

    Raises:
        ConfigError: a wish that cannot be granted.
        MemoryLimitError: nothing allowed fits into the memory.
    """
    measured = measured or MeasuredLosses()
    search = Chooser(shape, machine, objective, wishes, measured.caches)
    losses = quality.completed_losses(shape, encodings, measured.projections)
    kernels = candidates.kernels(machine, wishes)
    precision = candidates.precision(wishes)
    threads = candidates.threads(machine, wishes)
    chunks = candidates.chunks(search.context, wishes)

    # 1. A start: all threads, a chunk in the middle.
    start_threads = threads[-1]
    start_chunk = min(chunks, key=lambda chunk: abs(chunk - 512))

    def layout_of(weights: Weights, cache_dtype: CacheDtype, batch: int) -> Layout:
        return Layout(
            kernels=kernels,
            layer_formats=weights.layer_formats,
            embedding_format=weights.table_format,
            head_format=weights.table_format,
            cache_dtype=cache_dtype,
            attention_patterns=(DENSE,) * shape.num_layers,
            num_pages=batch * -(-search.context // PAGE_TOKENS),
            max_batch=batch,
            prefill_chunk_tokens=start_chunk,
            num_threads=start_threads,
        )

    # 2. Formats of weights and cache, for a given batch.
    pairs = [
        (uniform(variant, shape, losses, measured.tables), cache_dtype)
        for variant, cache_dtype in candidates.format_pairs(machine, kernels, precision, wishes, encodings)
    ]
    forced = precision != "auto" or wishes.cache_dtype is not None
    accepted = objective.max_quality_loss
    if forced:
        # The most accurate way of what was asked for is allowed whatever it loses.
        accepted = max(accepted, min(weights.loss + search.cache_loss(cache) for weights, cache in pairs))

    def format_candidate(weights: Weights, cache_dtype: CacheDtype, batch: int) -> Candidate:
        keep = forced and weights.loss + search.cache_loss(cache_dtype) <= accepted + 1e-9
        value = f"{weights.name}; cache {cache_dtype}"
        return search.candidate(value, layout_of(weights, cache_dtype, batch), weights, batch=batch, keep=keep)

    def format_candidates(batch: int) -> list[Candidate]:
        found = [format_candidate(weights, cache_dtype, batch) for weights, cache_dtype in pairs]
        if kernels == "torch" or precision != "auto":
            return found
        mixtures = [
            format_candidate(weights, cache_dtype, batch)
            for weights, cache_dtype in _mixtures(
                found, losses, accepted, search, lambda cache, weights: format_candidate(weights, cache, batch).score
            )
        ]
        return found + [entry for entry in mixtures if _is_worth_it(entry, found)]

    # 3. The batch, where it is free: more sequences share one reading of the weights.
    batch = objective.batch or 1
    if objective.batch is None and objective.kind == "throughput":
        best_each = [_best_or_least(format_candidates(count)) for count in BATCHES]
        renamed = [dataclasses.replace(entry, value=str(entry.layout.max_batch)) for entry in best_each]
        why = "most tokens a second over all sequences; their cache must fit"
        batch = search.choose("batch", renamed, lambda entry: (entry.layout.max_batch,), why).layout.max_batch
    chosen = search.choose(
        "precision and cache",
        format_candidates(batch),
        lambda entry: (entry.loss, entry.predicted.peak_bytes),
        f"{_BEST[objective.kind]} with a quality loss within {loss_text(objective.max_quality_loss)}"
        if not forced
        else f"{_BEST[objective.kind]} of what was asked for",
    )
    weights = chosen.weights
    if weights.precision == "mixed":
        told = search.choices[-1]
        search.choices[-1] = dataclasses.replace(told, why=f"{told.why}: {formats_text(weights.layer_formats)}")

    # 4. What the layers attend to, with the formats as chosen.
    chosen = attention.decide(search, chosen, wishes.attention, wishes.heads, batch)

    # 5. Threads, then the chunk, with all that as chosen.
    def vary(name: str, layouts: Mapping[int, Layout], why: str, *, prefill_only: bool = False) -> Candidate:
        found = [
            search.candidate(str(value), layout, weights, batch=batch, keep=True) for value, layout in layouts.items()
        ]
        if prefill_only and objective.kind != "memory":
            # Decoding does not see the chunk, and would drown the difference.
            found = [dataclasses.replace(entry, score=1 / entry.predicted.prefill_tokens_s) for entry in found]
        return search.choose(name, found, lambda entry: (float(entry.value),), why)

    by_threads = {count: dataclasses.replace(chosen.layout, num_threads=count) for count in threads}
    chosen = vary("threads", by_threads, f"{_BEST[objective.kind]}; no more of them than help")
    by_chunk = {chunk: dataclasses.replace(chosen.layout, prefill_chunk_tokens=chunk) for chunk in chunks}
    chosen = vary("prefill chunk", by_chunk, "long enough for the prefill rate, no longer", prefill_only=True)
    _tell_kernels(search, kernels, chosen, batch)
    return Decision(
        precision=weights.precision,
        layout=chosen.layout,
        context_tokens=search.context,
        predicted=chosen.predicted,
        choices=tuple(search.choices),
    )


_BEST = {"latency": "the soonest answer", "throughput": "the most tokens a second", "memory": "the least memory"}

NUM_WIDE = 2
"""Of the uniform formats that are accurate enough, so many of the best begin a mixture."""


def _mixtures(
    found: Sequence[Candidate],
    losses: LossTable,
    accepted_loss: float,
    search: Chooser,
    price: Callable[[CacheDtype, Weights], float],
) -> list[tuple[Weights, CacheDtype]]:
    """The best mixture for each cache: the tables of weights that are accurate enough, the formats of all."""
    best_of_each = []
    for cache_dtype in dict.fromkeys(entry.layout.cache_dtype for entry in found):
        here = sorted(
            (entry for entry in found if entry.layout.cache_dtype == cache_dtype), key=lambda entry: entry.score
        )
        wide = [entry.weights for entry in here if entry.loss <= accepted_loss + 1e-9]
        if len(wide) == len(here):
            continue  # nothing is to be gained by what loses too much
        # Mixtures that begin with the same tables are the same.
        homes = {weights.table_format: weights for weights in reversed(wide[:NUM_WIDE])}
        left = accepted_loss - search.cache_loss(cache_dtype)
        here_price = functools.partial(price, cache_dtype)
        others = [entry.weights for entry in here]
        mixtures = [mixing.mix(home, others, losses, left, here_price) for home in homes.values()]
        # They all use up the accepted loss, so that only their cost tells them apart.
        best_of_each += [(mixture, cache_dtype) for mixture in sorted(filter(None, mixtures), key=here_price)[:1]]
    return best_of_each


def _is_worth_it(mixture: Candidate, uniform_ones: Sequence[Candidate]) -> bool:
    """Whether a mixture, which uses up the accepted loss, is better by more than a tie than all that is uniform."""
    return all(entry.refused or entry.score > mixture.score * TIE for entry in uniform_ones)


def _best_or_least(entries: Sequence[Candidate]) -> Candidate:
    """The best of those allowed, or the smallest where none is."""
    allowed = [entry for entry in entries if not entry.refused]
    if allowed:
        return min(allowed, key=lambda entry: entry.score)
    return min(entries, key=lambda entry: entry.predicted.peak_bytes)


def _tell_kernels(search: Chooser, kernels: Kernels, chosen: Candidate, batch: int) -> None:
    """Write down the kernels' choice, with PyTorch beside it where it was measured and can run these formats."""
    alternatives = [
        Alternative(
            value=kernels,
            prefill_tokens_s=chosen.predicted.prefill_tokens_s,
            decode_tokens_s=chosen.predicted.decode_tokens_s,
            peak_bytes=chosen.predicted.peak_bytes,
            quality_loss=chosen.loss,
            rejected="",
        )
    ]
    other: Kernels = "torch" if kernels == "native" else "native"
    linears = {curve.weight_format for curve in search.machine.linears if curve.kernels == other}
    caches = {curve.cache_dtype for curve in search.machine.attentions if curve.kernels == other}
    if chosen.weights.formats() <= linears and chosen.layout.cache_dtype in caches:
        layout = dataclasses.replace(chosen.layout, kernels=other)
        everything = (DENSE,) * len(layout.attention_patterns)
        how = ""
        if other == "torch" and layout.attention_patterns != everything:
            layout, how = dataclasses.replace(layout, attention_patterns=everything), " with dense attention"
        entry = search.candidate(other, layout, chosen.weights, batch=batch, keep=True)
        ratio = score_text(search.objective.kind, entry.score / chosen.score)
        alternatives.append(
            Alternative(
                value=other,
                prefill_tokens_s=entry.predicted.prefill_tokens_s,
                decode_tokens_s=entry.predicted.decode_tokens_s,
                peak_bytes=entry.predicted.peak_bytes,
                quality_loss=entry.loss,
                rejected=entry.refused or f"{ratio}{how}; taken only where asked for (DSEEK_KERNELS)",
            )
        )
    why = "the compiled kernels were measured here" if kernels == "native" else "asked for, or no compiled kernels"
    search.choices.insert(0, Choice(name="kernels", chosen=kernels, why=why, alternatives=tuple(alternatives)))
