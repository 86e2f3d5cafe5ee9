"""Records PyTorch code with `torch.profiler` and makes operators of its events, each in the module that called it.

An operator whose work is understood whole (a linear layer, attention) is one record, with all that it calls; of every
other operator its own time counts, without what it calls. Modules are marked by hooks on all of them; what a module
takes besides its operators is Python. Operators of a backward pass are put beside the forward operator that they belong
to, by PyTorch's sequence numbers.

Needs PyTorch: import it only where torch code is profiled.
"""

from __future__ import annotations

import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules import module as hooks

from dseek.profiler.records import Kind, OperatorRecord, Roof, Stretch, sizes_text
from dseek.profiler.roofline import Roofline
from dseek.profiler.torch_flops import VIEWS, cost_of, moved_bytes

MARK = "dseek module "
"""Begins the name of a module's span."""

MAX_STRETCHES = 200_000

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|encoder|decoder|stages?)\.(\d+)(?:\.|$)")

_Mark = getattr(torch._C._profiler, "_RecordFunctionFast", None) or torch.profiler.record_function


@dataclass(slots=True)
class _Span:
    """One event with what lies inside it."""

    event: Any
    begin_ns: int
    end_ns: int
    children: list[_Span] = field(default_factory=list)


@dataclass(slots=True)
class _Sum:
    """All calls of one operator in one place, while they are added up."""

    kind: Kind
    dtype: str
    calls: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    num_bytes: float = 0.0
    rows: int = 0


_Key = tuple[str, str, str, str, tuple[int, int] | None]
"""Phase, place, name, dtype, and outputs and inputs of a product."""


class ModuleMarks:
    """Marks the calls of all modules, under their names in the outermost module that runs.

    Args:
        modules: roots whose parts have their names in them, whoever calls them.
    """

    def __init__(self, modules: Sequence[torch.nn.Module] = ()) -> None:
        self._given = {id(part): name for root in modules for name, part in root.named_modules() if name}
        self._handles: list[Any] = []
        self._open: list[tuple[Any, Any]] = []
        self._names: weakref.WeakKeyDictionary[torch.nn.Module, dict[int, str]] = weakref.WeakKeyDictionary()
        self._root: torch.nn.Module | None = None

    def start(self) -> None:
        """Hook into every module's call."""
        self._handles = [
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        """Take the hooks away; may be called twice."""
        while self._handles:
            self._handles.pop().remove()
        while self._open:
            self._open.pop()[1].__exit__(None, None, None)
        self._root = None

    def _enter(self, module: torch.nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if not self._open:
            self._root = module
            if module not in self._names:
                self._names[module] = {id(part): name for name, part in module.named_modules()}
        assert self._root is not None
        name = self._given.get(id(module)) or self._names[self._root].get(id(module)) or type(module).__name__
        mark = _Mark(MARK + name)
        mark.__enter__()
        self._open.append((module, mark))

    def _leave(self, module: torch.nn.Module, *_: Any) -> None:
        # A call that raised leaves inner modules open: close down to the one that ends.
        if not any(entry is module for entry, _ in self._open):
            return
        while self._open:
            entry, mark = self._open.pop()
            mark.__exit__(None, None, None)
            if entry is module:
                return


class TorchSession:
    """Records from `start` to `stop`.

    Args:
        timeline: keep the stretches too.
        modules: roots whose parts have their names in them, whoever calls them.
    """

    def __init__(self, *, timeline: bool, modules: Sequence[torch.nn.Module] = ()) -> None:
        self._timeline = timeline
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True)
        self._marks = ModuleMarks(modules)
        self._is_running = False
        self.num_lost = 0
        self.num_threads = torch.get_num_threads()

    def start(self) -> None:
        """Begin to record."""
        self._profiler.start()
        self._marks.start()
        self._is_running = True

    def stop(self) -> None:
        """End the recording; may be called twice."""
        if self._is_running:
            self._is_running = False
            self._marks.stop()
            self._profiler.stop()

    def records(self, roofline: Callable[[float], Roofline] | None) -> tuple[list[OperatorRecord], list[Stretch]]:
        """Make operators and bars of what was recorded.

        Args:
            roofline: makes the limits for a working set in bytes; None leaves them open.

        Returns:
            Operators, and stretches if they were asked for.
        """
        reader = _Reader(self._kineto_events(), keeps_stretches=self._timeline)
        reader.read()
        self.num_lost = reader.num_lost
        # Weights are what is read again and again; their dtype matters little to the bandwidth.
        weights = {key[1:]: key[4] for key in reader.sums if key[4] is not None}
        limits = roofline(4.0 * sum(outputs * inputs for outputs, inputs in weights.values())) if roofline else None
        return [_record(key, total, limits) for key, total in reader.sums.items()], reader.stretches

    def _kineto_events(self) -> list[Any]:
        results = self._profiler.profiler.kineto_results if self._profiler.profiler is not None else None
        return [] if results is None else list(results.events())


class _Reader:
    """Adds up one recording."""

    def __init__(self, events: list[Any], *, keeps_stretches: bool) -> None:
        self.sums: dict[_Key, _Sum] = {}
        self.stretches: list[Stretch] = []
        self.num_lost = 0
        self._keeps_stretches = keeps_stretches
        host = torch._C._autograd.DeviceType.CPU
        self._host = [event for event in events if event.device_type() == host and not event.is_async()]
        self._device_s: dict[int, float] = defaultdict(float)
        for event in events:
            if event.device_type() != host:
                self._device_s[event.linked_correlation_id()] += event.duration_ns() * 1e-9
        self._places: dict[int, str] = {}
        self._began_ns = min((event.start_ns() for event in self._host), default=0)

    def read(self) -> None:
        """Walk through every thread's events, outermost first; forward before backward, which asks for its places."""
        by_thread: dict[int, list[Any]] = defaultdict(list)
        for event in self._host:
            by_thread[event.start_thread_id()].append(event)
        order = sorted(by_thread, key=lambda thread: by_thread[thread][0].start_ns())
        for track, thread in enumerate(order):
            for span in _nested(by_thread[thread]):
                self._walk(span, "", "forward", track)

    def _walk(self, span: _Span, place: str, phase: str, track: int) -> None:
        event, name = span.event, span.event.name()
        inside = sum(child.end_ns - child.begin_ns for child in span.children)
        own_s = max(0, span.end_ns - span.begin_ns - inside) * 1e-9
        if name.startswith(MARK):
            place = name.removeprefix(MARK)
            self._add("python", place, phase, "idle", own_s)
        elif name.startswith("autograd::engine::evaluate_function"):
            phase = "backward"
            place = self._places.get(event.sequence_nr(), place)
            self._add("autograd", place, phase, "idle", own_s)
        elif "::" in name:
            if phase == "forward" and event.sequence_nr() >= 0 and place:
                self._places.setdefault(event.sequence_nr(), place)
            if self._operator(span, place, phase, own_s, track):
                return
        elif name.startswith(("ProfilerStep", "PyTorch Profiler")):
            pass
        else:
            self._add(name, place, phase, "idle", own_s)
        for child in span.children:
            self._walk(child, place, phase, track)

    def _operator(self, span: _Span, place: str, phase: str, own_s: float, track: int) -> bool:
        """Add an operator; True where it is counted whole, with all inside it."""
        event, name = span.event, span.event.name()
        shapes, dtypes = event.shapes(), event.dtypes()
        cost = cost_of(name, shapes, dtypes, event.concrete_inputs())
        device_s = sum(self._device_s.get(item.event.correlation_id(), 0.0) for item in _all(span))
        if cost is not None:
            if phase == "forward":
                for item in _all(span):
                    if item.event.sequence_nr() >= 0 and place:
                        self._places.setdefault(item.event.sequence_nr(), place)
            seconds = device_s or (span.end_ns - span.begin_ns) * 1e-9
            sizes = cost.dimensions[1:] if cost.dimensions is not None else None
            total = self._add(name, place, phase, cost.kind, seconds, cost.dtype, sizes)
            total.flops += cost.flops
            total.num_bytes += cost.num_bytes
            if cost.dimensions is not None:
                total.rows += cost.dimensions[0]
            self._bar(name, place, track, span)
            return True
        own_device_s = self._device_s.get(event.correlation_id(), 0.0)
        moves_itself = all(item.event.name() in VIEWS for item in _all(span) if item is not span)
        num_bytes = moved_bytes(name, shapes, dtypes) if moves_itself else 0.0
        kind: Kind = "memory" if num_bytes or name in VIEWS else "other"
        total = self._add(name, place, phase, kind, own_device_s or own_s, "fp32" if num_bytes else "")
        total.num_bytes += num_bytes
        self._bar(name, place, track, span)
        return False

    def _add(
        self,
        name: str,
        place: str,
        phase: str,
        kind: Kind,
        seconds: float,
        dtype: str = "",
        sizes: tuple[int, int] | None = None,
    ) -> _Sum:
        total = self.sums.setdefault((phase, place, name, dtype, sizes), _Sum(kind, dtype))
        total.calls += 1
        total.seconds += seconds
        return total

    def _bar(self, name: str, place: str, track: int, span: _Span) -> None:
        if not self._keeps_stretches:
            return
        if len(self.stretches) >= MAX_STRETCHES:
            self.num_lost += 1
            return
        begin_s = (span.begin_ns - self._began_ns) * 1e-9
        self.stretches.append(Stretch(name, place, track, begin_s, (span.end_ns - span.begin_ns) * 1e-9))


def _nested(events: list[Any]) -> list[_Span]:
    """Put the events of one thread into each other by their times."""
    spans = [_Span(event, event.start_ns(), event.start_ns() + event.duration_ns()) for event in events]
    spans.sort(key=lambda span: (span.begin_ns, -span.end_ns))
    outermost: list[_Span] = []
    open_spans: list[_Span] = []
    for span in spans:
        while open_spans and open_spans[-1].end_ns <= span.begin_ns:
            open_spans.pop()
        (open_spans[-1].children if open_spans else outermost).append(span)
        open_spans.append(span)
    return outermost


def _all(span: _Span) -> Iterator[_Span]:
    yield span
    for child in span.children:
        yield from _all(child)


def _record(key: _Key, total: _Sum, roofline: Roofline | None) -> OperatorRecord:
    phase, place, name, dtype, sizes = key
    least: float | None = None
    roof: Roof = ""
    if roofline is not None and total.kind in ("linear", "attention", "memory"):
        least, roof = roofline.least_s(total.flops, total.num_bytes, dtype or "fp32")
    dimensions = None
    if sizes is not None:
        dimensions = (max(1, round(total.rows / total.calls)), *sizes)
    found = _LAYER.search(place)
    return OperatorRecord(
        name=name,
        kind=total.kind,
        phase=phase,
        layer=int(found.group(1)) if found else None,
        place=place or "outside modules",
        calls=total.calls,
        seconds=total.seconds,
        flops=total.flops,
        num_bytes=total.num_bytes,
        dtype=total.dtype,
        sizes=sizes_text(dimensions),
        dimensions=dimensions,
        least_s=least,
        roof=roof,
    )
