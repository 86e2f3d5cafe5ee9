"""The table of rows: name, claim, and the function that measures it, imported when it is run."""

from __future__ import annotations

from benchmarks.errors import BenchmarkError
from benchmarks.rows.claims import ALL
from benchmarks.rows.row import Measure, Row, Settings

__all__ = ["ROWS", "Measure", "Row", "Settings", "row"]

ROWS: dict[str, Row] = {row.name: row for row in ALL}
"""Every row by its name."""


def row(name: str) -> Row:
    """Find a row.

    Args:
        name: as `list` shows it.

    Returns:
        The row.

    Raises:
        BenchmarkError: there is none of that name; the nearest is named.
    """
    if name not in ROWS:
        import difflib

        near = difflib.get_close_matches(name, ROWS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise BenchmarkError(f"there is no row {name!r}{hint}; `python -m benchmarks list` shows them")
    return ROWS[name]
