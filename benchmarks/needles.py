"""Needles in haystacks: a sentence with a code among lines of source, and a question that its continuation answers.

A base model retrieves what it can copy: the question is the sentence again, up to the code. Everything is token ids, so
that the haystack's lines are the same wherever the needle lies.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.errors import BenchmarkError

NAMES = (
    "Marlow", "Ingrid", "Tobias", "Farida", "Kenji", "Oksana", "Desmond", "Lucia", "Priya", "Anselm", "Wanda", "Yusuf",
)  # fmt: skip
CODE_DIGITS = 5


@dataclass(frozen=True, slots=True)
class Needle:
    """Whose code is what."""

    name: str
    code: str

    @property
    def sentence(self) -> str:
        """What is hidden, a line of its own that begins with the line break before it."""
        return f"{self.question} {self.code}."

    @property
    def question(self) -> str:
        """What the haystack is followed by."""
        return f"\n# The secret code of {self.name} is"

    @property
    def answer(self) -> str:
        """How the question goes on."""
        return f" {self.code}"


def make_needles(count: int, seed: int) -> list[Needle]:
    """Draw needles.

    Args:
        count: how many, at most as many as there are `NAMES`.
        seed: of names and codes.

    Returns:
        Needles with different names.
    """
    draw = random.Random(seed)
    names = draw.sample(NAMES, count)
    return [Needle(name, "".join(draw.choice("0123456789") for _ in range(CODE_DIGITS))) for name in names]


def hide(
    haystack: Sequence[int],
    line_breaks: Sequence[int],
    sentence: Sequence[int],
    question: Sequence[int],
    *,
    num_tokens: int,
    depth: float,
) -> list[int]:
    """Make the prompt: haystack, needle between two of its lines, question.

    Args:
        haystack: token ids of the lines; what is more than needed is cut off at the end.
        line_breaks: indices of the haystack's tokens that begin with a line break, rising.
        sentence: token ids of the needle.
        question: token ids of the question.
        num_tokens: length of the prompt.
        depth: where the needle lies, from 0 (before everything) to 1 (right before the question).

    Returns:
        Token ids.

    Raises:
        BenchmarkError: the haystack is too short.
    """
    room = num_tokens - len(sentence) - len(question)
    if not 0 < room <= len(haystack):
        raise BenchmarkError(f"a haystack of {len(haystack)} tokens, {room} are needed for a prompt of {num_tokens}")
    places = [0, *(index for index in line_breaks if 0 < index < room), room]
    place = min(places, key=lambda index: abs(index - depth * room))
    return [*haystack[:place], *sentence, *haystack[place:room], *question]
