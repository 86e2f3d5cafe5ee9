"""What a row is: a claim, the function that measures it, and how it is run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.result import Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a row is run."""

    threads: int = 2
    """Threads of every engine."""
    rounds: int = 7
    """Measurements of each engine that count."""
    smoke: bool = False
    """Only show that everything works, on the smallest sizes; the figures mean nothing and are not kept."""

    def pick(self, full: int, smoke: int) -> int:
        """A size: the claim's own, or the one of a smoke run."""
        return smoke if self.smoke else full


Measure = Callable[[Settings], Outcome]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measured claim."""

    name: str
    """Name on the command line."""
    claim: str
    """What is measured, against whom, for the table."""
    place: str
    """`module:function` below `benchmarks.rows` that measures it."""
    min_ratio: float = 1.0
    """Least ratio that meets the claim."""
    min_limit_share: float | None = None
    """Least share of the limit that meets the claim; None where it asks for none."""
    share_of: str = "of the limit"
    """What the share is one of, for people."""
    quick: bool = False
    """Needs no peer's environment and ends within minutes."""

    def measure(self, settings: Settings) -> Outcome:
        """Run the row.

        Args:
            settings: threads, rounds, smoke.

        Returns:
            The figures.

        Raises:
            IncorrectError: the correctness check is red.
            BenchmarkError: something needed is not there.
        """
        module_name, function_name = self.place.split(":")
        function: Measure = getattr(importlib.import_module(f"benchmarks.rows.{module_name}"), function_name)
        return function(settings)

    def is_met(self, ratio: float | None, limit_share: float | None) -> bool:
        """Whether figures meet the claim."""
        if ratio is not None and ratio < self.min_ratio:
            return False
        return self.min_limit_share is None or (limit_share is not None and limit_share >= self.min_limit_share)

    @property
    def bar(self) -> str:
        """The claim's bar for people."""
        text = f"{self.min_ratio:.4g}x"
        return text if self.min_limit_share is None else f"{text}, {100 * self.min_limit_share:.0f} % {self.share_of}"
