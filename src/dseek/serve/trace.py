"""Traces of arrivals: when each request came, how long its prompt and its answer were.

Reads the CSV of the Azure LLM inference traces: `TIMESTAMP,ContextTokens,GeneratedTokens`, one line a request.
Source: Patel et al. 2024, Splitwise (the traces' publication).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dseek.core.errors import FileFormatError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

MAX_ROWS = 5_000_000
MAX_TOKENS = 10_000_000


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    at_s: float
    """Seconds after the first one."""
    prompt_tokens: int
    """Length of its prompt."""
    answer_tokens: int
    """Length of its answer."""


def read_trace(path: str | Path, max_rows: int = MAX_ROWS) -> list[Arrival]:
    """Read a trace.

    Args:
        path: the CSV file.
        max_rows: at most so many requests, from the beginning.

    Returns:
        The requests in order of arrival.

    Raises:
        FileFormatError: the file cannot be read, or a line is of another form.
    """
    found: list[tuple[float, int, int]] = []
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is None or not set(COLUMNS) <= set(reader.fieldnames):
                raise FileFormatError(f"{path} has the columns {reader.fieldnames}", needed=", ".join(COLUMNS))
            for row in reader:
                if len(found) >= max_rows:
                    break
                found.append(_parsed(row, path, reader.line_num))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileFormatError(f"the trace {path} cannot be read: {error}") from None
    if not found:
        raise FileFormatError(f"the trace {path} has no requests", needed="at least one")
    found.sort()
    first_s = found[0][0]
    return [Arrival(at_s - first_s, prompt, answer) for at_s, prompt, answer in found]


def scaled(trace: Sequence[Arrival], rate: float) -> list[Arrival]:
    """Make requests arrive faster or slower.

    Args:
        trace: the requests.
        rate: times as many a second; 0.1 stretches a minute to ten.

    Returns:
        The same requests at other times.
    """
    return [Arrival(arrival.at_s / rate, arrival.prompt_tokens, arrival.answer_tokens) for arrival in trace]


def _parsed(row: dict[str, str], path: str | Path, line: int) -> tuple[float, int, int]:
    try:
        # The traces have seven digits after the second, one more than Python reads.
        stamp = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26]).timestamp()
        prompt, answer = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        if not (0 < prompt <= MAX_TOKENS and 0 < answer <= MAX_TOKENS):
            raise ValueError(f"{prompt} and {answer} tokens")
    except (ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(
            f"line {line} of {path} is no request ({error})", needed="a time and two counts of tokens above 0"
        ) from None
    return stamp, prompt, answer
