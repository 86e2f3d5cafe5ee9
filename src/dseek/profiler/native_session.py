"""Listens to native runs (event `engine.native_forward`) and makes operators of what the decoder's clocks counted.

While it listens every batch is recorded with a few numbers of its rows; sums are made when the run is over. It does
not see the time between batches, which `session` puts down as time outside the operators, and no encoder-decoders.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dseek.core import events
from dseek.plan.plan import Plan
from dseek.profiler.native_work import (
    LINEAR_NAMES,
    SHOWN_NAMES,
    DecoderWork,
    Rows,
    Work,
    kind_of,
    streamed_bytes,
)
from dseek.profiler.records import OperatorRecord, Roof, Stretch, sizes_text
from dseek.profiler.roofline import Roofline

FORWARD_EVENT = "engine.native_forward"
"""A batch ran; whoever listens makes the decoder count."""

TIMELINE_EVENT = "engine.native_timeline"
"""Is listened to by whoever wants the stretches of `FORWARD_EVENT` as well."""

MAX_STRETCHES = 200_000
"""Bars of a timeline that are kept."""


@dataclass(slots=True)
class _Phase:
    """What was counted in one phase of one plan."""

    nanoseconds: np.ndarray
    """float64 [layers + 1, operators], means over the threads."""
    batches: dict[Rows, int]
    """How many batches of each sort."""


class NativeSession:
    """Records native runs from `start` to `stop`.

    Args:
        timeline: keep the stretches of every thread too.
    """

    def __init__(self, *, timeline: bool) -> None:
        self._timeline = timeline
        self._ends: list[Callable[[], None]] = []
        self._phases: dict[tuple[int, str], _Phase] = {}
        self._plans: dict[int, Plan] = {}
        self._operators: list[str] = []
        self._stretches: list[tuple[int, np.ndarray]] = []
        self._num_kept = 0
        self.num_lost = 0
        self.num_threads = 1
        self.forward_s = 0.0
        """Time of all batches."""

    def start(self) -> None:
        """Begin to listen."""
        self._ends.append(events.subscribe(FORWARD_EVENT, self._on_forward))
        if self._timeline:
            self._ends.append(events.subscribe(TIMELINE_EVENT, lambda **_: None))

    def stop(self) -> None:
        """Stop listening; may be called twice."""
        while self._ends:
            self._ends.pop()()

    @property
    def plans(self) -> list[Plan]:
        """Plans of what ran."""
        return list(self._plans.values())

    def _on_forward(
        self,
        *,
        plan: Plan,
        batch: Any,
        seconds: float,
        operators: list[str],
        nanoseconds: np.ndarray,
        stretches: list[np.ndarray],
        num_lost: int,
        **_: Any,
    ) -> None:
        """Add a batch to its phase."""
        ends = batch.positions[batch.row_starts[1:] - 1] + 1
        firsts = batch.positions[batch.row_starts[:-1]]
        rows = Rows(tuple(zip(firsts.tolist(), ends.tolist(), strict=True)), len(batch.logit_rows))
        key = (id(plan), rows.phase)
        self._plans[id(plan)] = plan
        self._operators = operators
        self.num_threads = max(self.num_threads, len(nanoseconds))
        self.forward_s += seconds
        mean = nanoseconds.mean(axis=0)
        phase = self._phases.get(key)
        if phase is None:
            phase = self._phases[key] = _Phase(np.zeros_like(mean), defaultdict(int))
        phase.nanoseconds += mean
        phase.batches[rows] += 1
        self.num_lost += num_lost
        for thread, part in enumerate(stretches):
            room = max(0, MAX_STRETCHES - self._num_kept)
            self.num_lost += max(0, len(part) - room)
            if len(part[:room]):
                self._stretches.append((thread, part[:room].copy()))
                self._num_kept += len(part[:room])

    def records(self, roofline: Callable[[float], Roofline] | None) -> list[OperatorRecord]:
        """Make the operators of everything that was recorded.

        Args:
            roofline: makes the roofline for a working set in bytes; None leaves the limits open.
        """
        found: list[OperatorRecord] = []
        for (plan_id, name), phase in self._phases.items():
            found += _records_of(self._plans[plan_id], name, phase, self._operators, roofline)
        return found

    def stretches(self, began_ns: int) -> list[Stretch]:
        """Make the bars of the timeline.

        Args:
            began_ns: when the run began, by the clock of `time.perf_counter_ns`.
        """
        found = []
        for thread, part in self._stretches:
            for begin, end, waited, layer, operator in part.tolist():
                name = self._operators[operator]
                shown = SHOWN_NAMES.get(name, name)
                place = _place(layer, max(plan.shape.num_layers for plan in self.plans))
                worked = (end - begin - waited) * 1e-9
                start = (begin - began_ns) * 1e-9
                if worked > 0:
                    found.append(Stretch(shown, place, thread, start, worked))
                if waited > 0:
                    found.append(Stretch("wait", place, thread, start + worked, waited * 1e-9))
        return found


def _records_of(
    plan: Plan, phase_name: str, phase: _Phase, operators: list[str], roofline: Callable[[float], Roofline] | None
) -> list[OperatorRecord]:
    """Operators of one phase, layer by layer."""
    work = DecoderWork(plan)
    num_layers = plan.shape.num_layers
    limits = None
    if roofline is not None:
        limits = roofline(streamed_bytes(plan.shape, plan.layer_formats, plan.head_format))
    num_batches = sum(phase.batches.values())
    sums: dict[Any, Work] = {}

    def summed(operator: str, layer: int) -> Work:
        """Work of all batches; layers that are alike are worked out once."""
        alike: Any = (operator, layer)
        if layer < num_layers:
            windowed = plan.shape.window_layers is None or plan.shape.window_layers[layer]
            alike = (operator, plan.layer_formats[layer], plan.attention_patterns[layer], windowed)
            alike = (*alike, layer + 1 == num_layers)
        if alike not in sums:
            total = Work()
            for rows, count in phase.batches.items():
                one = work.work(operator, layer, rows)
                total += Work(count * one.flops, count * one.num_bytes)
            sums[alike] = total
        return sums[alike]

    def mean_rows(operator: str, layer: int) -> float:
        total = sum(count * work.rows_of(operator, layer, rows) for rows, count in phase.batches.items())
        return total / num_batches

    found = []
    for layer in range(num_layers + 1):
        for index, operator in enumerate(operators):
            seconds = float(phase.nanoseconds[layer, index]) * 1e-9
            if seconds <= 0:
                continue
            total = summed(operator, layer)
            dtype = work.dtype(operator, layer) if kind_of(operator) != "idle" else ""
            least: float | None = None
            roof: Roof = ""
            if limits is not None and kind_of(operator) != "idle":
                # Attention and what moves numbers compute in fp32, from whatever the cache is made of.
                least, roof = limits.least_s(total.flops, total.num_bytes, dtype)
            sizes = work.sizes(operator, layer)
            dimensions = None
            if sizes is not None:
                dimensions = (max(1, round(mean_rows(operator, layer))), *sizes)
            found.append(
                OperatorRecord(
                    name=SHOWN_NAMES.get(operator, operator),
                    kind=kind_of(operator),
                    phase=phase_name,
                    layer=layer if layer < num_layers else None,
                    place=_place(layer, num_layers),
                    calls=num_batches,
                    seconds=seconds,
                    flops=total.flops,
                    num_bytes=total.num_bytes,
                    dtype=plan.cache_dtype if operator == "attention" else dtype,
                    sizes=sizes_text(dimensions),
                    dimensions=dimensions,
                    least_s=least,
                    roof=roof,
                )
            )
    return found


def _place(layer: int, num_layers: int) -> str:
    return f"layer {layer}" if layer < num_layers else "outside layers"


def role_of(name: str) -> str | None:
    """Return the role in `ModelShape.linear_sizes` of a linear operator's shown name, or None for others.

    Args:
        name: as `SHOWN_NAMES` has it.
    """
    return next((role for role, shown in LINEAR_NAMES.items() if shown == name), None)
