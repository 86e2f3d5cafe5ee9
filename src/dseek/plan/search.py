"""The search: which formats, cache, threads and chunk serve an objective best, within the quality and memory allowed.

Decisions are taken one after the other, each with everything else at its best so far, so that each can be told in one
sentence: 1. kernels, 2. batch (only if it is free), 3. formats of the weights and the cache together, mixtures of two
formats among them (`mixing`), 4. threads, 5. the prefill chunk. Among values whose predicted cost is within 3 % of the
best, which is less than the prediction can tell apart, the one with the least quality loss, then the least memory or
disturbance, is taken.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dseek.core.errors import ConfigError, MemoryLimitError
from dseek.core.shape import ModelShape
from dseek.hardware.machine import Machine
from dseek.plan import candidates, cost, mixing, quality
from dseek.plan.candidates import BATCHES, Wishes
from dseek.plan.cost import Prediction
from dseek.plan.explain import Alternative, Choice, loss_text, score_text, size_text
from dseek.plan.formats import CacheDtype, Kernels, Precision
from dseek.plan.layout import PAGE_TOKENS, Layout
from dseek.plan.objective import Objective
from dseek.plan.quality import LossTable
from dseek.plan.weights import Weights, formats_text, uniform

TIE = 1.03
MEMORY_SHARE = 0.9
"""Of the machine's memory that a plan may foresee, unless the user sets a limit."""


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


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A complete layout with what it is worth."""

    value: str
    layout: Layout
    weights: Weights
    loss: float
    predicted: Prediction
    score: float
    refused: str
    """Why it is out of the question; empty if it is not."""


class _Search:
    """Keeps what every step of the search needs."""

    def __init__(self, shape: ModelShape, machine: Machine, objective: Objective, wishes: Wishes) -> None:
        self.shape = shape
        self.machine = machine
        self.objective = objective
        self.wishes = wishes
        self.context = candidates.context_of(shape, objective)
        self.prompt, self.answer = objective.request(self.context)
        self.limit = objective.memory_limit_bytes or int(MEMORY_SHARE * machine.memory_limit_bytes)
        self.choices: list[Choice] = []

    def candidate(self, value: str, layout: Layout, weights: Weights, *, batch: int, keep: bool = False) -> _Candidate:
        """Predict a layout and judge it; `keep` overlooks its quality (the user asked for the precision)."""
        predicted = cost.predict(
            self.shape, self.machine, layout, prompt_tokens=self.prompt, context_tokens=self.prompt, batch=batch
        )
        loss = weights.loss + quality.cache_loss(layout.cache_dtype)
        refused = ""
        if predicted.peak_bytes > self.limit:
            refused = f"needs {size_text(predicted.peak_bytes)} of memory, {size_text(self.limit)} allowed"
        elif loss > self.objective.max_quality_loss + 1e-9 and not keep:
            refused = f"loses {loss_text(loss)} of quality, {loss_text(self.objective.max_quality_loss)} accepted"
        return _Candidate(
            value=value,
            layout=layout,
            weights=weights,
            loss=loss,
            predicted=predicted,
            score=self.score(predicted, batch),
            refused=refused,
        )

    def score(self, predicted: Prediction, batch: int) -> float:
        """Cost of a layout, less is better: seconds of a request, seconds a token, or bytes."""
        seconds = batch * self.prompt / predicted.prefill_tokens_s + batch * self.answer / predicted.decode_tokens_s
        if self.objective.kind == "memory":
            return float(predicted.peak_bytes)
        if self.objective.kind == "throughput":
            return seconds / (batch * (self.prompt + self.answer))
        return seconds

    def choose(
        self, name: str, entries: Sequence[_Candidate], order: Callable[[_Candidate], tuple[float, ...]], why: str
    ) -> _Candidate:
        """Take the best of those allowed; write down the choice.

        Args:
            name: what is decided.
            entries: at least one.
            order: breaks ties, least first.
            why: said of a choice that had alternatives.

        Raises:
            MemoryLimitError: none fits.
            ConfigError: none is accurate enough (only with a cache dtype that was asked for).
        """
        allowed = [entry for entry in entries if not entry.refused]
        if not allowed:
            raise self.refusal(entries)
        best = min(entry.score for entry in allowed)
        tied = [entry for entry in allowed if entry.score <= best * TIE]
        chosen = min(tied, key=order)
        alternatives = tuple(
            Alternative(
                value=entry.value,
                prefill_tokens_s=entry.predicted.prefill_tokens_s,
                decode_tokens_s=entry.predicted.decode_tokens_s,
                peak_bytes=entry.predicted.peak_bytes,
                quality_loss=entry.loss,
                rejected="" if entry is chosen else self.rejection(entry, chosen),
            )
            for entry in entries
        )
        if len(entries) == 1:
            why = "asked for, or the only one there is"
        self.choices.append(Choice(name=name, chosen=chosen.value, why=why, alternatives=alternatives))
        return chosen

    def rejection(self, entry: _Candidate, chosen: _Candidate) -> str:
        """Say why a candidate was not taken."""
        if entry.refused:
            return entry.refused
        text = score_text(self.objective.kind, entry.score / chosen.score)
        if entry.score > chosen.score * TIE:
            return text
        if loss_text(entry.loss) != loss_text(chosen.loss) and entry.loss > chosen.loss:
            return f"{text}, a tie, and loses {loss_text(entry.loss)} of quality instead of {loss_text(chosen.loss)}"
        return f"{text}, a tie: the more modest value is taken"

    def refusal(self, entries: Sequence[_Candidate]) -> MemoryLimitError | ConfigError:
        """The error where no candidate is allowed, with the numbers and what would help."""
        fitting = [entry for entry in entries if entry.predicted.peak_bytes <= self.limit]
        if fitting:
            least = min(fitting, key=lambda entry: entry.loss)
            return ConfigError(
                f"no way to run {self.wishes.model} keeps the quality loss within "
                f"{loss_text(self.objective.max_quality_loss)}; the best, {least.value}, loses {loss_text(least.loss)}",
                remedy="accept more with --max-quality-loss, or allow more memory or another precision",
            )
        least = min(entries, key=lambda entry: entry.predicted.peak_bytes)
        sizes, layout = least.predicted, least.layout
        per_token = sizes.cache_bytes / max(1, layout.num_pages * PAGE_TOKENS)
        room = self.limit - sizes.weights_bytes - sizes.workspace_bytes
        longest = int(room / per_token / layout.max_batch) // PAGE_TOKENS * PAGE_TOKENS
        help_text = "free memory, or take a smaller model or a narrower precision (--precision int8, int4)"
        if longest >= PAGE_TOKENS:
            help_text = f"take --context {longest} or less"
            if layout.max_batch > 1:
                help_text += ", or fewer sequences (--batch)"
        return MemoryLimitError(
            f"{self.wishes.model} needs {size_text(sizes.peak_bytes)} in {least.value}: weights "
            f"{size_text(sizes.weights_bytes)}, cache {size_text(sizes.cache_bytes)} for {layout.max_batch} x "
            f"{self.context} tokens, workspace {size_text(sizes.workspace_bytes)}",
            needed=f"at most {size_text(self.limit)}",
            remedy=help_text,
        )


def decide(
    shape: ModelShape,
    machine: Machine,
    objective: Objective,
    encodings: Mapping[str, int],
    wishes: Wishes,
    measured_losses: LossTable | None = None,
) -> Decision:
    """Search for the best layout.

    Args:
        shape: the model.
        machine: the measurements.
        objective: what for.
        encodings: elements in the file, by encoding.
        wishes: what is decided already.
        measured_losses: what projections lose, where that was measured; the others are estimated.

    Returns:
        The layout with its prediction and the reasons.

    Raises:
        ConfigError: a wish that cannot be granted.
        MemoryLimitError: nothing allowed fits into the memory.
    """
    search = _Search(shape, machine, objective, wishes)
    losses = quality.completed_losses(shape, encodings, measured_losses)
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
            num_pages=batch * -(-search.context // PAGE_TOKENS),
            max_batch=batch,
            prefill_chunk_tokens=start_chunk,
            num_threads=start_threads,
        )

    # 2. Formats of weights and cache, for a given batch.
    pairs = [
        (uniform(variant, shape, losses), cache_dtype)
        for variant, cache_dtype in candidates.format_pairs(machine, kernels, precision, wishes)
    ]
    forced = precision != "auto" or wishes.cache_dtype is not None
    accepted = objective.max_quality_loss
    if forced:
        # The most accurate way of what was asked for is allowed whatever it loses.
        accepted = max(accepted, min(weights.loss + quality.cache_loss(cache) for weights, cache in pairs))

    def format_candidate(weights: Weights, cache_dtype: CacheDtype, batch: int) -> _Candidate:
        keep = forced and weights.loss + quality.cache_loss(cache_dtype) <= accepted + 1e-9
        value = f"{weights.name}; cache {cache_dtype}"
        return search.candidate(value, layout_of(weights, cache_dtype, batch), weights, batch=batch, keep=keep)

    def format_candidates(batch: int) -> list[_Candidate]:
        found = [format_candidate(weights, cache_dtype, batch) for weights, cache_dtype in pairs]
        if kernels == "torch" or precision != "auto":
            return found
        mixtures = [
            format_candidate(weights, cache_dtype, batch)
            for weights, cache_dtype in _mixtures(
                found, losses, accepted, lambda cache, weights: format_candidate(weights, cache, batch).score
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

    # 4. Threads, then the chunk, with the formats as chosen.
    def vary(name: str, layouts: Mapping[int, Layout], why: str, *, prefill_only: bool = False) -> _Candidate:
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
"""Of the uniform formats that are accurate enough, so many of the best are mixed with the narrower ones."""


def _mixtures(
    found: Sequence[_Candidate],
    losses: LossTable,
    accepted_loss: float,
    price: Callable[[CacheDtype, Weights], float],
) -> list[tuple[Weights, CacheDtype]]:
    """The best mixture for each cache: of weights that are accurate enough and of weights that are not."""
    best_of_each = []
    for cache_dtype in dict.fromkeys(entry.layout.cache_dtype for entry in found):
        here = sorted(
            (entry for entry in found if entry.layout.cache_dtype == cache_dtype), key=lambda entry: entry.score
        )
        wide = [entry.weights for entry in here if entry.loss <= accepted_loss + 1e-9]
        narrow = [entry.weights for entry in here if entry.loss > accepted_loss + 1e-9]
        left = accepted_loss - quality.cache_loss(cache_dtype)
        here_price = functools.partial(price, cache_dtype)
        mixtures = [
            mixing.mix(one, other, losses, left, here_price)
            for one, other in itertools.product(wide[:NUM_WIDE], narrow)
        ]
        # They all use up the accepted loss, so that only their cost tells them apart.
        best_of_each += [(mixture, cache_dtype) for mixture in sorted(filter(None, mixtures), key=here_price)[:1]]
    return best_of_each


def _is_worth_it(mixture: _Candidate, uniform_ones: Sequence[_Candidate]) -> bool:
    """Whether a mixture, which uses up the accepted loss, is better by more than a tie than all that is uniform."""
    return all(entry.refused or entry.score > mixture.score * TIE for entry in uniform_ones)


def _best_or_least(entries: Sequence[_Candidate]) -> _Candidate:
    """The best of those allowed, or the smallest where none is."""
    allowed = [entry for entry in entries if not entry.refused]
    if allowed:
        return min(allowed, key=lambda entry: entry.score)
    return min(entries, key=lambda entry: entry.predicted.peak_bytes)


def _tell_kernels(search: _Search, kernels: Kernels, chosen: _Candidate, batch: int) -> None:
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
        entry = search.candidate(other, layout, chosen.weights, batch=batch, keep=True)
        ratio = score_text(search.objective.kind, entry.score / chosen.score)
        alternatives.append(
            Alternative(
                value=other,
                prefill_tokens_s=entry.predicted.prefill_tokens_s,
                decode_tokens_s=entry.predicted.decode_tokens_s,
                peak_bytes=entry.predicted.peak_bytes,
                quality_loss=entry.loss,
                rejected=entry.refused or f"{ratio}; taken only where asked for (DSEEK_KERNELS)",
            )
        )
    why = "the compiled kernels were measured here" if kernels == "native" else "asked for, or no compiled kernels"
    search.choices.insert(0, Choice(name="kernels", chosen=kernels, why=why, alternatives=tuple(alternatives)))
