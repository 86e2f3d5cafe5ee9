"""The table of kept results: on the screen, in a dated file, and in the README."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.machine import sentence
from benchmarks.paths import REPOSITORY, RESULTS_DIR
from benchmarks.result import slug
from benchmarks.rows import ROWS

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
"""Lines of the README between which the table stands."""

LEGEND = (
    "Ratio: the peer's median time over ours, taken in turn within one run, or how many times the bar is met; more is "
    "better. Share of the limit: of the GEMM rate or read bandwidth measured in the same run; for `load`, the share "
    "of weights and cache in peak memory; for the quality of dynamic attention, the share of query-key pairs skipped."
)
"""What the columns mean."""


def markdown(records: dict[str, dict[str, Any]]) -> str:
    """Write a table of results.

    Args:
        records: a result by the row's name; they may be of several machines.

    Returns:
        Markdown: a line about each machine, the table, and what its columns mean.
    """
    ordered = [records[name] for name in ROWS if name in records]
    machines: dict[str, str] = {}
    """A letter by what is said of the machine, in the order of the rows."""
    for record in ordered:
        machines.setdefault(sentence(record["machine"]), chr(ord("A") + len(machines)))
    lines = [
        "Every row is a command, `python -m benchmarks run NAME`; the newest result of each is shown. Measured on:",
        "",
        *(f"- {letter}: {text}" for text, letter in machines.items()),
        "",
        "| row | what | measured | beside | ratio | asked | share of the limit | reached | machine, day |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in ordered:
        name, row = record["name"], ROWS[record["name"]]
        where = f"{machines[sentence(record['machine'])]}, {record['measured_at'][:10]}"
        if not record["correct"]:
            lines.append(
                f"| `{name}` | {row.claim} | not reported: its check is red | | | {row.bar} | | no | {where} |"
            )
            continue
        met = "yes" if row.is_met(record["ratio"], record["limit_share"]) else "no"
        lines.append(
            f"| `{name}` | {row.claim} | {_figure(record)} | {record['peer'] or 'the bar'} | {_ratio(record['ratio'])} "
            f"| {row.bar} | {_share(record['limit_share'])} | {met} | {where} |"
        )
    return "\n".join([*lines, "", LEGEND])


def write(records: dict[str, dict[str, Any]], machine: dict[str, Any]) -> list[Path]:
    """Write the dated results of a machine, and the README's table of the newest results of all machines.

    Args:
        records: kept results by the row's name.
        machine: the machine they belong to.

    Returns:
        The files written.

    Raises:
        BenchmarkError: there are no results, or the README has no place for the table.
    """
    if not records:
        raise BenchmarkError("there are no results of this machine yet; run some rows first")
    RESULTS_DIR.mkdir(exist_ok=True)
    day = datetime.now(UTC).date().isoformat()
    path = RESULTS_DIR / f"{day}-{slug(machine)}.json"
    ordered = [records[name] for name in ROWS if name in records]
    path.write_text(json.dumps({"date": day, "machine": machine, "results": ordered}, indent=1) + "\n")
    readme = REPOSITORY / "README.md"
    readme.write_text(inserted(readme.read_text(), markdown(newest())))
    return [path, readme]


def newest() -> dict[str, dict[str, Any]]:
    """The newest result of each row in the dated files, whatever the machine."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS_DIR.glob("*.json")):
        for record in json.loads(path.read_text())["results"]:
            before = found.get(record["name"])
            if before is None or before["measured_at"] <= record["measured_at"]:
                found[record["name"]] = record
    return found


def inserted(document: str, table: str) -> str:
    """Put a table between the two marks of a document.

    Args:
        document: text with the lines `START` and `END`.
        table: what goes between them.

    Returns:
        The new text.

    Raises:
        BenchmarkError: a mark is missing.
    """
    before, start, rest = document.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise BenchmarkError(f"the README lacks the lines {START} and {END}")
    return f"{before}{START}\n{table}\n{END}{after}"


def _figure(record: dict[str, Any]) -> str:
    """A value in a unit that reads well."""
    value, unit = record["value"], record["unit"]
    if unit == "fraction":
        return f"{100 * value:.2f} %"
    if unit == "times":
        return f"{value:.2f} times"
    if unit == "s/token":
        return f"{1 / value:,.0f} tokens/s"
    text = f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"
    tokens = record.get("details", {}).get("tokens")
    return f"{text} ({tokens / value:,.0f} tokens/s)" if tokens else text


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"
