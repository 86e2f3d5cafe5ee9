"""Command line of the benchmarks: `python -m benchmarks list | run NAME | table | quick`.

Results go to stdout, everything else to stderr. Exit status 1: a correctness check was red; 2: a user's error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import result, table
from benchmarks.errors import BenchmarkError, IncorrectError
from benchmarks.machine import describe
from benchmarks.rows import ROWS, Row, Settings, row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        Exit status.
    """
    options = _parser().parse_args(arguments)
    commands = {"list": _list, "run": _run, "table": _table, "quick": _quick}
    try:
        return commands[options.command](options)
    except BenchmarkError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
    except ValueError as error:  # dseek's own errors for users are of this family
        if type(error).__module__ != "dseek.core.errors":
            raise
        print(f"benchmarks: error: {error}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measured claims, one row each.")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="show every row")
    listing.add_argument("--json", action="store_true", help="as JSON")
    run = commands.add_parser("run", help="measure one row")
    run.add_argument("name", help="name of the row")
    run.add_argument("--json", action="store_true", help="print one JSON object")
    quick = commands.add_parser("quick", help="measure the rows that need no peer's environment, write the table")
    for command in (run, quick):
        command.add_argument("--rounds", type=_positive, default=7, help="measurements of each engine (7)")
        command.add_argument("--threads", type=_positive, default=2, help="threads of every engine (2)")
        command.add_argument("--smoke", action="store_true", help="smallest sizes, only to see that it runs")
    tables = commands.add_parser("table", help="show the kept results of this machine")
    tables.add_argument("--write", action="store_true", help="write them to benchmarks/results and the README")
    tables.add_argument("--threads", type=_positive, default=2, help="results with so many threads (2)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _settings(options: argparse.Namespace) -> Settings:
    rounds = 1 if options.smoke else options.rounds
    return Settings(threads=options.threads, rounds=rounds, smoke=options.smoke)


def _list(options: argparse.Namespace) -> int:
    if options.json:
        rows = [
            {
                "name": entry.name,
                "claim": entry.claim,
                "min_ratio": entry.min_ratio,
                "min_limit_share": entry.min_limit_share,
                "quick": entry.quick,
            }
            for entry in ROWS.values()
        ]
        print(json.dumps(rows, indent=1))
        return 0
    width = max(map(len, ROWS))
    for entry in ROWS.values():
        print(f"{entry.name:<{width}}  {entry.claim}; asked: {entry.bar}{' (quick)' if entry.quick else ''}")
    return 0


def _run(options: argparse.Namespace) -> int:
    entry = row(options.name)
    record, met = _measure(entry, _settings(options))
    if options.json:
        print(json.dumps(record))
    elif record["correct"]:
        share = "" if record["limit_share"] is None else f", {100 * record['limit_share']:.1f} % {entry.share_of}"
        beside = record["peer"] or "the bar"
        print(f"{record['name']}: {record['value']:.6g} {record['unit']}, {record['ratio']:.3f}x {beside}{share}")
        print("the claim is " + ("met" if met else "not met"))
    return 0 if record["correct"] else 1


def _table(options: argparse.Namespace) -> int:
    machine = describe(options.threads)
    records = result.kept(machine)
    print(table.markdown(records))
    if options.write:
        for path in table.write(records, machine):
            print(f"benchmarks: wrote {path}", file=sys.stderr)
    return 0


def _quick(options: argparse.Namespace) -> int:
    settings = _settings(options)
    records = []
    for entry in ROWS.values():
        if entry.quick:
            print(f"benchmarks: {entry.name}", file=sys.stderr)
            records.append(_measure(entry, settings)[0])
    machine = describe(settings.threads)
    if settings.smoke:
        print(json.dumps(records, indent=1))
    else:
        kept = result.kept(machine)
        table.write(kept, machine)
        print(table.markdown(kept))
    return 0 if all(record["correct"] for record in records) else 1


def _measure(entry: Row, settings: Settings) -> tuple[dict[str, Any], bool]:
    """Measure a row and keep the result.

    Args:
        entry: the row.
        settings: how.

    Returns:
        The printed object, and whether the claim is met.
    """
    try:
        outcome = entry.measure(settings)
        details = outcome.details
    except IncorrectError as error:
        print(f"benchmarks: {entry.name} is not reported, its check is red: {error}", file=sys.stderr)
        outcome, details = None, {"why": str(error)}
    record = result.printed(entry.name, outcome, describe(settings.threads))
    if not settings.smoke:
        result.keep(record, details)
    return record, outcome is not None and entry.is_met(outcome.ratio, outcome.limit_share)


if __name__ == "__main__":
    sys.exit(main())
