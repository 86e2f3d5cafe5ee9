"""Switches the native decoder's clocks on while somebody listens, and tells what they counted.

Event `engine.native_forward`, with the fields plan, batch, seconds, operators (names), nanoseconds (int64 [threads,
layers + 1, operators], the last layer being what belongs to none), stretches (a list a thread of begin, end, waited,
layer, operator, in nanoseconds of `time.perf_counter_ns`) and num_lost (stretches that found no room). Stretches are
kept only where `engine.native_timeline` has a listener too. With no listener this is one dictionary look-up a batch.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from dseek.core import events

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dseek.engine.batch import Batch
    from dseek.plan.plan import Plan

FORWARD_EVENT = "engine.native_forward"
TIMELINE_EVENT = "engine.native_timeline"

STRETCHES_A_LAYER = 512
"""Room for a thread's stretches in a batch, a layer: the longest step has some fifteen a task of rows."""

MOST_STRETCHES = 2**20
"""More than the decoder takes in any case."""

_NOTHING = nullcontext()


class DecoderClocks:
    """Knows whether the clocks of one decoder are on."""

    def __init__(self) -> None:
        self._is_on = False

    def watching(self, decoder: Any, plan: Plan, batch: Batch) -> AbstractContextManager[None]:
        """Time one call, if anyone listens.

        Args:
            decoder: the compiled decoder; its clocks are switched on or off as need be.
            plan: what it runs.
            batch: what it is about to compute.

        Returns:
            A context to make the call in; the event is emitted where it ends without an exception.
        """
        if events.has_listeners(FORWARD_EVENT):
            return self._timed(decoder, plan, batch)
        if self._is_on:
            decoder.set_timing(False)
            self._is_on = False
        return _NOTHING

    @contextmanager
    def _timed(self, decoder: Any, plan: Plan, batch: Batch) -> Iterator[None]:
        room = 0
        if events.has_listeners(TIMELINE_EVENT):
            room = min(MOST_STRETCHES, STRETCHES_A_LAYER * (plan.shape.num_layers + 1))
        decoder.set_timing(True, room)
        self._is_on = True
        started_s = time.perf_counter()
        yield
        seconds = time.perf_counter() - started_s
        nanoseconds, stretches, num_lost = decoder.timings()
        events.emit(
            FORWARD_EVENT,
            plan=plan,
            batch=batch,
            seconds=seconds,
            operators=decoder.operator_names,
            nanoseconds=nanoseconds,
            stretches=stretches,
            num_lost=num_lost,
        )
