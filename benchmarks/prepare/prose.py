"""Write articles of question-answering data as plain texts, a file each: what a gate for prose may be trained on.

Run: `python -m benchmarks.prepare.prose FILES --out DIR`, then `dseek train-gate MODEL --text DIR/*.txt --out GATE`.
Give other files than the one that the row prose-perplexity measures with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.prose import articles


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the texts and print how many there are.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        Exit status: 2 where a file cannot be read.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare.prose", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON lines with `context` and `title`")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the texts, made if need be")
    options = parser.parse_args(arguments)
    count = 0
    try:
        for path in options.files:
            stem = path.name.split(".")[0]
            options.out.mkdir(parents=True, exist_ok=True)
            for index, text in enumerate(articles(path).values()):
                (options.out / f"{stem}-{index:04d}.txt").write_text(text + "\n", encoding="utf-8")
                count += 1
    except BenchmarkError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    print(f"{count} texts in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
