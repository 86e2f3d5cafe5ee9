"""Texts on which tokenizers are compared: scripts, code, white space, digits, and random code points."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

PLAIN = [
    "",
    " ",
    "Hello world",
    "  two spaces before and behind  ",
    "a\n\n\nb\t\tc\r\nd",
    "1234567890 12 345 7.5e-3",
    "   12\n    7",
    "don't we'll I'VE it's he'd",
    "naïve café Ünïcödé, “quotes” — dashes…",
    "日本語のテキスト 中文 한국어 العربية हिन्दी ไทย",
    "🙂🚀👩‍👩‍👧 ❤️ 🏳️‍🌈",
    "e\u0301 is not \u00e9, \u1e9b\u0323, \ufb01",
    "no\u00a0break\u200bzero\u2028line",
    "\x00\x01\x7f\ufffd",
    "    def f(x):\n        return x**2  # comment\n",
    '{"a": [1, 2, {"b": null}], "c": "\\u00e9"}',
    "a" * 300,
    " " * 40 + "x",
    "\u0663\u0664\u0665 \u00bd \u00b2 \u2167",
]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Draw short texts of random code points, no surrogates.

    Args:
        count: how many.
        seed: of the draw.

    Returns:
        The texts.
    """
    rng = random.Random(seed)
    blocks = [(32, 127), (32, 127), (9, 14), (0x80, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1F700), (0x10000, 0x11000)]
    return ["".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(rng.randrange(1, 60))) for _ in range(count)]


def source_files(count: int, characters: int = 8000) -> list[str]:
    """Take the beginnings of files of the standard library.

    Args:
        count: how many files.
        characters: of each.

    Returns:
        The texts.
    """
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:count]
    return [file.read_text(encoding="utf-8")[:characters] for file in files]
