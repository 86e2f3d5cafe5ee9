"""Shows on stderr how far a measurement is, of this machine or of a model's heads, that a command needs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dseek.core import events
from dseek.hardware.machine import Machine
from dseek.hardware.store import load_or_measure

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def measured_machine(*, refresh: bool = False) -> Machine:
    """Return this machine's kept measurements, or measure it now with a progress bar.

    Args:
        refresh: measure even if there are kept ones.

    Returns:
        The machine.

    Raises:
        ConfigError: a `DSEEK_*` variable is bad, or nothing can be measured here.
    """
    bar = _Bar("measuring this machine (once)")
    try:
        return load_or_measure(refresh=refresh, progress=bar.tell)
    finally:
        bar.close()


@contextmanager
def shown_calibration() -> Iterator[None]:
    """Show a bar while the windows of a model's heads are measured, if they are (`dseek.engine.window_calibration`)."""
    bar = _Bar("measuring the windows of the model's heads (once)")
    unsubscribe = events.subscribe(
        "calibration.layer", lambda layer, num_layers: bar.tell(layer / num_layers, f"layer {layer} of {num_layers}")
    )
    try:
        yield
    finally:
        unsubscribe()
        bar.close()


class _Bar:
    """A progress bar that appears with the first thing it is told; rich is imported only then.

    Args:
        title: what it says all the time.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._shown: tuple[Progress, TaskID] | None = None

    def tell(self, share: float, what: str) -> None:
        """Show how far it is.

        Args:
            share: done, from 0 to 1.
            what: comes next.
        """
        if self._shown is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            progress = Progress(
                TextColumn(self._title),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=Console(file=sys.stderr),
                transient=True,
            )
            progress.start()
            self._shown = progress, progress.add_task(what, total=1.0)
        progress, task = self._shown
        progress.update(task, completed=share, description=what)

    def close(self) -> None:
        """Take the bar away."""
        if self._shown is not None:
            self._shown[0].stop()
