"""Print the files of the standard library that may be trained on, or those that are kept for measuring, one a line.

Run: `dseek train-gate MODEL --text $(python -m benchmarks.prepare.standard_library --training) --out DIR`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks import standard_library


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the paths.

    Args:
        arguments: without the program's name; None takes the process's own.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare.standard_library", description=__doc__)
    part = parser.add_mutually_exclusive_group(required=True)
    part.add_argument("--training", action="store_true", help="files to learn from")
    part.add_argument("--held-out", action="store_true", help="files to measure with")
    options = parser.parse_args(arguments)
    names = standard_library.training_files() if options.training else standard_library.held_out_files()
    for name in names:
        print(standard_library.root() / name)


if __name__ == "__main__":
    main()
