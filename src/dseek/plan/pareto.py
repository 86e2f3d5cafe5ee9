"""Fronts of what cannot be bettered in time, memory and quality together, and why everything else was left.

A point is on the front where no other is at least as good in all three and better in one (Pareto). For this machine
`explore` prices complete layouts: every uniform format and mixture of formats, cache, pattern of attention, then
threads and chunks around what is on the front so far. For a described machine `what_if.search` gives the points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dseek.core.attention_pattern import DENSE, AttentionPattern
from dseek.core.shape import ModelShape
from dseek.hardware.machine import Machine
from dseek.plan import candidates, mixing, quality
from dseek.plan.attention import in_layers
from dseek.plan.attention_wish import patterns_text
from dseek.plan.candidates import Wishes
from dseek.plan.chooser import TIE, Candidate, Chooser
from dseek.plan.explain import loss_text, size_text
from dseek.plan.formats import CacheDtype
from dseek.plan.layout import PAGE_TOKENS, Layout
from dseek.plan.objective import Objective
from dseek.plan.quality import MeasuredLosses
from dseek.plan.weights import Weights, uniform

BUDGETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
"""Losses up to which formats are mixed, fractions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontPoint:
    """One way to run, judged."""

    name: str
    """What it is."""
    seconds: float
    """Time that counts: of a request, or of a token."""
    memory_bytes: float
    """Peak memory; of one device, where there are several."""
    quality_loss: float
    """Expected rise of perplexity, a fraction."""
    on_front: bool
    """Nothing else is at least as good in all three and better in one."""
    is_chosen: bool
    """It is what would run."""
    why: str
    """Why it was chosen or not."""


Entry = tuple[str, float, float, float]
"""Name, seconds, bytes, loss."""


def judge(entries: Sequence[Entry], *, memory_limit_bytes: float, max_quality_loss: float) -> list[FrontPoint]:
    """Find the front, choose the fastest point on it that is allowed, and say why not the others.

    Args:
        entries: all points.
        memory_limit_bytes: memory that may be used.
        max_quality_loss: accepted loss.

    Returns:
        All points, the fastest first. None is chosen where none is allowed.
    """
    order = sorted(range(len(entries)), key=lambda index: entries[index][1:])
    front: list[int] = []
    beaten_by: dict[int, int] = {}
    for index in order:
        # Whoever comes earlier in the order is as fast; so only memory and loss decide.
        better = next(
            (
                other
                for other in front
                if entries[other][2] <= entries[index][2] and entries[other][3] <= entries[index][3]
            ),
            None,
        )
        if better is None:
            front.append(index)
        else:
            beaten_by[index] = better

    def refusal(index: int) -> str:
        _, _, memory, loss = entries[index]
        if memory > memory_limit_bytes:
            return f"needs {size_text(memory)} of memory, {size_text(memory_limit_bytes)} allowed"
        if loss > max_quality_loss + 1e-9:
            return f"loses {loss_text(loss)} of quality, {loss_text(max_quality_loss)} accepted"
        return ""

    allowed = [index for index in front if not refusal(index)]
    chosen = -1
    if allowed:
        fastest = entries[allowed[0]][1]
        tied = [index for index in allowed if entries[index][1] <= TIE * fastest]
        chosen = min(tied, key=lambda index: (entries[index][3], entries[index][2]))

    def why(index: int) -> str:
        if index == chosen:
            return "the fastest that is allowed (among ties, the one that loses least)"
        if index in beaten_by:
            return f"no better in anything than {entries[beaten_by[index]][0]}"
        if text := refusal(index):
            return text
        ratio = entries[index][1] / entries[chosen][1]
        return f"on the front: takes {ratio:.2f} times as long, {_saving(entries[index], entries[chosen])}"

    return [
        FrontPoint(
            name=entries[index][0],
            seconds=entries[index][1],
            memory_bytes=entries[index][2],
            quality_loss=entries[index][3],
            on_front=index not in beaten_by,
            is_chosen=index == chosen,
            why=why(index),
        )
        for index in order
    ]


def _saving(entry: Entry, chosen: Entry) -> str:
    parts = []
    if entry[2] < chosen[2]:
        parts.append(f"saves {size_text(chosen[2] - entry[2])}")
    if entry[3] < chosen[3]:
        parts.append(f"loses {loss_text(entry[3])} instead of {loss_text(chosen[3])}")
    return " and ".join(parts) or "a tie"


def explore(
    shape: ModelShape,
    machine: Machine,
    objective: Objective,
    encodings: Mapping[str, int],
    wishes: Wishes,
    measured: MeasuredLosses | None = None,
) -> list[FrontPoint]:
    """Price the whole space on this machine and find the front.

    Args:
        shape: the model.
        machine: the measurements.
        objective: what for; its kind says which time counts.
        encodings: elements in the file, by encoding.
        wishes: what is decided already.
        measured: what formats lose, where that was measured.

    Returns:
        All points, the fastest first.

    Raises:
        ConfigError: a wish that cannot be granted.
    """
    space = _Space(shape, machine, objective, encodings, wishes, measured or MeasuredLosses())
    first = space.formats_and_attention()
    # Threads and chunks change little: they are varied around what is on the front so far.
    known = {_layout_key(entry): entry for entry in first}
    for entry in _front_of(first):
        for layout in space.neighbours(entry.layout):
            varied = space.priced(layout, entry.weights)
            known.setdefault(_layout_key(varied), varied)
    entries = [
        (entry.value, space.seconds(entry), float(entry.predicted.peak_bytes), entry.loss) for entry in known.values()
    ]
    return judge(entries, memory_limit_bytes=space.search.limit, max_quality_loss=objective.max_quality_loss)


class _Space:
    """What can be combined."""

    def __init__(
        self,
        shape: ModelShape,
        machine: Machine,
        objective: Objective,
        encodings: Mapping[str, int],
        wishes: Wishes,
        measured: MeasuredLosses,
    ) -> None:
        self.shape = shape
        self.search = Chooser(shape, machine, objective, wishes, measured.caches)
        self.batch = objective.batch or 1
        self._wishes = wishes
        self._kernels = candidates.kernels(machine, wishes)
        self._threads = candidates.threads(machine, wishes)
        self._chunks = candidates.chunks(self.search.context, wishes)
        self._losses = quality.completed_losses(shape, encodings, measured.projections)
        self._is_mixed = candidates.precision(wishes) == "auto" and self._kernels == "native"
        self._pairs = [
            (uniform(variant, shape, self._losses, measured.tables), cache)
            for variant, cache in candidates.format_pairs(
                machine, self._kernels, candidates.precision(wishes), wishes, encodings
            )
        ]

    def formats_and_attention(self) -> list[Candidate]:
        """Every format, mixture and cache with every pattern of attention."""
        pairs = list(self._pairs)
        if self._is_mixed:
            pairs += self._mixtures()
        found = []
        for patterns in self._patterns():
            for weights, cache in pairs:
                found.append(self.priced(self._layout(weights, cache, patterns), weights))
        return found

    def neighbours(self, layout: Layout) -> list[Layout]:
        """The same with other threads and chunks."""
        return [
            dataclasses.replace(layout, num_threads=threads, prefill_chunk_tokens=chunk)
            for threads in self._threads
            for chunk in self._chunks
        ]

    def priced(self, layout: Layout, weights: Weights) -> Candidate:
        """Predict one layout."""
        name = f"{weights.name}; cache {layout.cache_dtype}; {layout.num_threads} threads; chunk "
        name += str(layout.prefill_chunk_tokens)
        if any(pattern.kind != "dense" for pattern in layout.attention_patterns):
            name += f"; {patterns_text(layout.attention_patterns)}"
        return self.search.candidate(name, layout, weights, batch=self.batch, keep=True)

    def seconds(self, entry: Candidate) -> float:
        """The time that counts: of a request, or a token for throughput."""
        predicted = entry.predicted
        tokens = self.batch * self.search.prompt, self.batch * self.search.answer
        request = tokens[0] / predicted.prefill_tokens_s + tokens[1] / predicted.decode_tokens_s
        return request / sum(tokens) if self.search.objective.kind == "throughput" else request

    def _layout(
        self, weights: Weights, cache: CacheDtype, patterns: tuple[AttentionPattern, ...] | None = None
    ) -> Layout:
        return Layout(
            kernels=self._kernels,
            layer_formats=weights.layer_formats,
            embedding_format=weights.table_format,
            head_format=weights.table_format,
            cache_dtype=cache,
            attention_patterns=patterns or (DENSE,) * self.shape.num_layers,
            num_pages=self.batch * -(-self.search.context // PAGE_TOKENS),
            max_batch=self.batch,
            prefill_chunk_tokens=min(self._chunks, key=lambda chunk: abs(chunk - 512)),
            num_threads=self._threads[-1],
        )

    def _mixtures(self) -> list[tuple[Weights, CacheDtype]]:
        """For every budget the best mixture that begins with the most accurate formats."""
        found: dict[object, tuple[Weights, CacheDtype]] = {}
        for cache in dict.fromkeys(cache for _, cache in self._pairs):
            here = [weights for weights, other in self._pairs if other == cache]

            def price(weights: Weights, cache: CacheDtype = cache) -> float:
                return self.seconds(self.priced(self._layout(weights, cache), weights))

            for budget in BUDGETS:
                accurate = [weights for weights in here if weights.loss <= budget]
                if not accurate or len(accurate) == len(here):
                    continue
                home = min(accurate, key=price)
                mixture = mixing.mix(home, here, self._losses, budget - self.search.cache_loss(cache), price)
                if mixture is not None:
                    found[mixture.layer_formats, mixture.table_format, cache] = (mixture, cache)
        return list(found.values())

    def _patterns(self) -> list[tuple[AttentionPattern, ...]]:
        """Dense attention, and patterns that leave out more than half of the typical request."""
        dense = (DENSE,) * self.shape.num_layers
        if self._kernels == "torch" or self._wishes.attention.settled_kind == "dense":
            return [dense]
        tokens, found = self.search.prompt + self.search.answer, [dense]
        for patterns in self._wishes.attention.by_layer(self.shape.num_layers, self._wishes.heads):
            seen = sum(pattern.visible_tokens(tokens, self.shape.num_kv_heads) for pattern in patterns)
            if 2 * seen < tokens * len(patterns):
                found.append(in_layers(patterns, self.shape))
        return list(dict.fromkeys(found))


def _layout_key(entry: Candidate) -> Layout:
    return entry.layout


def _front_of(entries: Sequence[Candidate]) -> list[Candidate]:
    """Candidates on the front, by their scores."""
    found: list[Candidate] = []
    for entry in sorted(entries, key=lambda entry: (entry.score, entry.predicted.peak_bytes, entry.loss)):
        if not any(
            other.predicted.peak_bytes <= entry.predicted.peak_bytes and other.loss <= entry.loss for other in found
        ):
            found.append(entry)
    return found
