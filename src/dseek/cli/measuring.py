"""Gets this machine's measurements for a command, showing on stderr how far a measurement is."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

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
    bar = _Bar()
    try:
        return load_or_measure(refresh=refresh, progress=bar.tell)
    finally:
        bar.close()


class _Bar:
    """A progress bar that appears with the first thing it is told; rich is imported only then."""

    def __init__(self) -> None:
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
                TextColumn("measuring this machine (once)"),
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
