"""`profile`: records a callable or a block of code, native runs and PyTorch code alike, and makes a `Profile` of it."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

from dseek.hardware.machine import Machine
from dseek.hardware.store import kept_machine
from dseek.profiler.advice import advise
from dseek.profiler.native_session import NativeSession
from dseek.profiler.records import OperatorRecord, Profile, Stretch
from dseek.profiler.roofline import Roofline

if TYPE_CHECKING:
    import torch

    from dseek.profiler.torch_session import TorchSession

MUCH_WAITING, MUCH_PYTHON = 0.15, 0.2
"""Shares of the time from which on a note says so."""


class ProfileSession:
    """Records from entering to leaving; one at a time in a process.

    Args:
        title: what runs, for the report.
        machine: the measurements for the roofline; None takes those that are kept for this machine, if there are some.
        use_torch: record PyTorch's operators; None does so if PyTorch is imported already.
        timeline: keep the stretches for a trace.
        modules: PyTorch modules whose parts are named after their places in them, whoever calls them; the parts of
            others are named after their places in the outermost module that is called.
    """

    def __init__(
        self,
        title: str = "",
        *,
        machine: Machine | None = None,
        use_torch: bool | None = None,
        timeline: bool = True,
        modules: Sequence[torch.nn.Module] = (),
    ) -> None:
        self._title = title
        self._machine = machine
        self._use_torch = "torch" in sys.modules if use_torch is None else use_torch
        self._timeline = timeline
        self._modules = modules
        self._native = NativeSession(timeline=timeline)
        self._torch: TorchSession | None = None
        self._began_ns = 0
        self._wall_s = 0.0
        self._is_over = False

    def __enter__(self) -> Self:
        if self._use_torch:
            from dseek.profiler.torch_session import TorchSession

            self._torch = TorchSession(timeline=self._timeline, modules=self._modules)
            self._torch.start()
        self._native.start()
        self._began_ns = time.perf_counter_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._wall_s = (time.perf_counter_ns() - self._began_ns) * 1e-9
        self._native.stop()
        if self._torch is not None:
            self._torch.stop()
        self._is_over = True

    @functools.cached_property
    def result(self) -> Profile:
        """What was recorded; worked out when it is first asked for, after the end.

        Raises:
            RuntimeError: the recording has not ended.
        """
        if not self._is_over:
            raise RuntimeError("the recording has not ended: ask for the result after the `with` block")
        machine = self._machine if self._machine is not None else kept_machine()
        plans = self._native.plans
        num_threads = max(self._native.num_threads, self._torch.num_threads if self._torch is not None else 1)
        limits = functools.partial(_roofline, machine, num_threads) if machine is not None else None
        records = self._native.records(None if limits is None else functools.partial(limits, "native"))
        stretches = self._native.stretches(self._began_ns)
        lost = self._native.num_lost
        inside_s = sum(record.seconds for record in records)
        if self._torch is not None:
            torch_records, torch_stretches = self._torch.records(
                None if limits is None else functools.partial(limits, "torch")
            )
            inside_s += sum(record.seconds for record in torch_records)
            records += torch_records
            stretches += torch_stretches
            lost += self._torch.num_lost
        records.append(_outside(max(0.0, self._wall_s - inside_s)))
        records.sort(key=lambda record: -record.seconds)
        roofs = None
        if limits is not None:
            roofs = limits("native" if plans else "torch", _largest_working_set(records)).roofs
        plan = plans[0] if len(plans) == 1 else None
        return Profile(
            title=self._title or (plan.model if plan is not None else "a run"),
            machine=_machine_text(machine),
            num_threads=num_threads,
            wall_s=self._wall_s,
            operators=tuple(records),
            roofs=roofs,
            advice=advise(records, machine, plan, num_threads, self._wall_s) if machine is not None else (),
            stretches=tuple(sorted(stretches, key=lambda stretch: stretch.begin_s)),
            num_lost_stretches=lost,
            notes=_notes(records, self._wall_s, machine, lost),
        )


@overload
def profile(fn: None = None, /, **options: Any) -> ProfileSession: ...


@overload
def profile(fn: Callable[..., Any], /, *args: Any, **options: Any) -> Profile: ...


def profile(fn: Callable[..., Any] | None = None, /, *args: Any, **options: Any) -> ProfileSession | Profile:
    """Profile a callable, or give a context manager that profiles what is done in it.

    Args:
        fn: called once with `args`; None for the context manager.
        args: positional arguments of `fn`.
        options: keyword arguments of `ProfileSession`: title, machine, use_torch, timeline.

    Returns:
        The profile of the call; without `fn` a `ProfileSession`, whose `result` is the profile after its `with` block.
    """
    session = ProfileSession(**options)
    if fn is None:
        return session
    with session:
        fn(*args)
    return session.result


def _roofline(machine: Machine, num_threads: int, kernels: str, working_set_bytes: float) -> Roofline:
    """The limits; those of the native kernels where PyTorch was not measured, as both have one memory."""
    measured = {curve.kernels for curve in machine.linears} & {entry.kernels for entry in machine.overheads}
    if kernels not in measured:
        kernels = next(iter(sorted(measured)), kernels)
    return Roofline(machine, kernels, num_threads, working_set_bytes)


def _largest_working_set(records: list[OperatorRecord]) -> float:
    """Bytes of all weights, as the linear operators read them once."""
    return sum(record.num_bytes / record.calls for record in records if record.kind == "linear")


def _outside(seconds: float) -> OperatorRecord:
    return OperatorRecord(
        name="outside operators",
        kind="idle",
        phase="",
        layer=None,
        place="",
        calls=1,
        seconds=seconds,
        flops=0.0,
        num_bytes=0.0,
        dtype="",
    )


def _machine_text(machine: Machine | None) -> str:
    if machine is None:
        return "a machine that was not measured"
    return f"{machine.cpu_name}, {machine.num_cores} cores, {machine.kernel_variant} kernels"


def _notes(records: list[OperatorRecord], wall_s: float, machine: Machine | None, lost: int) -> tuple[str, ...]:
    found = []
    if machine is None:
        found.append("this machine was not measured, so there is no roofline: `dseek doctor` measures it")
    waited = sum(record.seconds for record in records if record.name == "wait") / wall_s
    if waited > MUCH_WAITING:
        found.append(
            f"threads waited for each other {100 * waited:.0f} % of the time: other programs took the processor, or "
            "there are more threads than help"
        )
    python = sum(record.seconds for record in records if record.name == "python") / wall_s
    if python > MUCH_PYTHON:
        found.append(f"Python took {100 * python:.0f} % of the time: larger batches or torch.compile would hide it")
    if lost:
        found.append(f"the timeline had no room for {lost} stretches; the tables count them all")
    return tuple(found)


__all__ = ["Profile", "ProfileSession", "Stretch", "profile"]
