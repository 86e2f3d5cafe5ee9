"""Write texts in which passages of files come back: what heads that look something up are measured on.

Running text seldom asks for one far token, so a measurement on it says little about the heads that find it. Here lines
of the files are joined in pieces, and every third piece is an earlier one again, from anywhere before it.

Run: `python -m benchmarks.prepare.recall FILES --out DIR`, then give DIR's texts to `dseek train-gate` as a list of
their own. Nothing in them is of the form that the row `needle` asks in.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from dseek.core.files import atomic_write_text

PIECE_LINES = (1, 12)
"""Least and most lines of a piece."""
MIN_CHARACTERS = 48_000
"""Of a text: more than 8192 tokens of source."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the texts and print how many there are.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        Exit status: 2 where a file cannot be read or the files are too short.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare.recall", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="UTF-8 texts")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the texts, made if need be")
    parser.add_argument("--texts", type=int, default=8, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is joined (default: %(default)s)")
    options = parser.parse_args(arguments)
    draw = random.Random(options.seed)
    try:
        lines = [_lines(path) for path in options.files]
        options.out.mkdir(parents=True, exist_ok=True)
        for index in range(options.texts):
            atomic_write_text(options.out / f"recall-{index:04d}.txt", compose(lines, draw))
    except (OSError, ValueError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    print(f"{options.texts} texts in {options.out}")
    return 0


def _lines(path: Path) -> list[str]:
    """The lines of a file that say something."""
    return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if len(line.strip()) > 20]


def compose(lines: Sequence[Sequence[str]], draw: random.Random) -> str:
    """Join pieces, every third of them one that was there before.

    Args:
        lines: lines to take pieces from, by file.
        draw: chooses; the same one gives the same text.

    Returns:
        At least `MIN_CHARACTERS` characters.

    Raises:
        ValueError: no file is long enough for a piece.
    """
    usable = [own for own in lines if len(own) > PIECE_LINES[1]]
    if not usable:
        raise ValueError(f"no file has more than {PIECE_LINES[1]} lines of over 20 characters, one is needed")
    pieces: list[str] = []
    num_characters = 0
    while num_characters < MIN_CHARACTERS:
        if len(pieces) % 3 == 2:
            piece = draw.choice(pieces)
        else:
            own = draw.choice(usable)
            count = draw.randint(*PIECE_LINES)
            first = draw.randrange(len(own) - count)
            piece = "\n".join(own[first : first + count])
        pieces.append(piece)
        num_characters += len(piece) + 1
    return "\n".join(pieces) + "\n"


if __name__ == "__main__":
    sys.exit(main())
