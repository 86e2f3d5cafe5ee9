"""Extractive question answering data: reading, words, the split that keeps questions apart, and the F1 of answers.

A file is JSON lines under gzip. A line has a `context` (a paragraph) and either `qas`, each with a question `q` and
answers `a` as pairs of text and offset, or `questions` with the answers beside them under the names SQuAD uses.
"""

from __future__ import annotations

import gzip
import json
import re
import string
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.errors import BenchmarkError

WORD = re.compile(r"\w+|[^\w\s]")
WORD_BUCKETS = 1 << 15
"""Words are hashed into so many rows of the embedding; a word never seen in training still equals itself."""
PREFIX_BUCKETS = 1 << 13
PREFIX_LETTERS = 4
NUM_SHAPES = 6
MAX_QUESTION_WORDS = 40
MAX_SPAN_WORDS = 15
"""Longest answer that is trained on or given."""

Part = Literal["train", "tune", "test"]
_PARTS: tuple[Part, ...] = ("test", "tune", *("train",) * 10)
"""A paragraph is held out for the test, for choosing a learning rate, or trained on, by a hash of its words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """A text in words."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """First character of each word, and the one after its last."""
    features: np.ndarray
    """int64 [T, 3] bucket of the word, bucket of its first letters, shape."""

    def __len__(self) -> int:
        return len(self.spans)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question about one paragraph."""

    words: Words
    paragraph_idx: int
    """Place of its paragraph in the part."""
    answers: tuple[str, ...]
    """Accepted answers, one for each annotator."""
    spans: tuple[tuple[int, int], ...]
    """First and last word of each answer that is short enough, without repetition."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """One part of the data."""

    paragraphs: tuple[Words, ...]
    questions: tuple[Question, ...]


def split_words(text: str) -> Words:
    """Split a text into words and signs.

    Args:
        text: anything.

    Returns:
        The words with their places and features.
    """
    matches = list(WORD.finditer(text))
    features = np.array([_features(match.group()) for match in matches], dtype=np.int64).reshape(-1, 3)
    return Words(text=text, spans=tuple(match.span() for match in matches), features=features)


def _features(word: str) -> tuple[int, int, int]:
    lowered = word.lower().encode()
    prefix = word.lower()[:PREFIX_LETTERS].encode()
    if word.isdigit():
        shape = 1
    elif any(letter.isdigit() for letter in word):
        shape = 2
    elif word[0].isupper():
        shape = 4 if len(word) > 1 and word.isupper() else 3
    else:
        shape = 0 if word[0].isalpha() else 5
    return zlib.crc32(lowered) % WORD_BUCKETS, zlib.crc32(prefix) % PREFIX_BUCKETS, shape


def read(paths: Sequence[Path], max_paragraphs: int | None = None) -> dict[Part, Corpus]:
    """Read files and part them: no paragraph and no question stands in two parts.

    Args:
        paths: files as the module's docstring says.
        max_paragraphs: read no more of each file; None reads all.

    Returns:
        The parts. A question that occurs in several goes to the first of test, tune, train.

    Raises:
        BenchmarkError: a file is missing or is none of these, or a part would be empty.
    """
    records: dict[str, list[tuple[str, list[tuple[str, int]]]]] = {}
    for path in paths:
        for number, (context, questions) in enumerate(_records(path)):
            if max_paragraphs is not None and number == max_paragraphs:
                break
            records.setdefault(context.strip("\n"), []).extend(questions)

    by_part: dict[Part, list[str]] = {"test": [], "tune": [], "train": []}
    for context in records:
        by_part[_PARTS[zlib.crc32(_plain(context).encode()) % len(_PARTS)]].append(context)
    taken: set[str] = set()
    parts: dict[Part, Corpus] = {}
    for part, contexts in by_part.items():
        own: set[str] = set()
        paragraphs, questions_of_part = [], []
        for context in contexts:
            words = split_words(context)
            for text, answers in records[context]:
                if _plain(text) not in taken:
                    own.add(_plain(text))
                    question = _question(text, answers, words, len(paragraphs))
                    questions_of_part += [] if question is None else [question]
            paragraphs.append(words)
        taken |= own
        if not questions_of_part:
            raise BenchmarkError(f"no question is left for the part {part!r}: give more data")
        parts[part] = Corpus(paragraphs=tuple(paragraphs), questions=tuple(questions_of_part))
    return parts


def _records(path: Path) -> Iterable[tuple[str, list[tuple[str, int]]]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                yield record["context"], _qas(record)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise BenchmarkError(
            f"{path} is no file of questions: {type(error).__name__}: {error}; needed: JSON lines under gzip with "
            "context, questions, and answers as text and offset"
        ) from error


def _qas(record: dict[str, Any]) -> list[tuple[str, list[tuple[str, int]]]]:
    if "qas" in record and all("q" in qa for qa in record["qas"]):
        return [(qa["q"], [(answer[0], int(answer[1])) for answer in qa["a"]]) for qa in record["qas"]]
    return [
        (qa["question"], [(answer["text"], int(answer["answer_start"])) for answer in qa["answers"]])
        for qa in record["qas" if "qas" in record else "questions"]
    ]


def _question(text: str, answers: Sequence[tuple[str, int]], paragraph: Words, idx: int) -> Question | None:
    """Place answers on words; None where no answer lies where its offset says, or the question has no word."""
    good = [(answer, offset) for answer, offset in answers if paragraph.text[offset : offset + len(answer)] == answer]
    good = [(answer, offset) for answer, offset in good if normalise(answer)]
    words = split_words(text)
    if not good or not len(words):
        return None
    if len(words) > MAX_QUESTION_WORDS:
        words = split_words(text[: words.spans[MAX_QUESTION_WORDS - 1][1]])
    spans = {_word_span(paragraph, offset, offset + len(answer)) for answer, offset in good}
    return Question(
        words=words,
        paragraph_idx=idx,
        answers=tuple(answer for answer, _ in good),
        spans=tuple(sorted(span for span in spans if span[1] - span[0] < MAX_SPAN_WORDS)),
    )


def _word_span(paragraph: Words, start: int, past: int) -> tuple[int, int]:
    """First and last word that share a character with [start, past)."""
    touched = [idx for idx, (first, end) in enumerate(paragraph.spans) if first < past and end > start]
    return touched[0], touched[-1]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def normalise(text: str) -> list[str]:
    """Bring an answer to the words that are compared: lower case, no punctuation, no articles.

    Args:
        text: an answer.

    Returns:
        Its words. Source: Rajpurkar et al. 2016, SQuAD, section 6.1.
    """
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def f1(given: str, accepted: Sequence[str]) -> float:
    """Score an answer by the words it shares with the accepted answer that it is most like.

    Args:
        given: the answer.
        accepted: accepted answers, at least one.

    Returns:
        Harmonic mean of precision and recall over words, 0 to 1.
        Source: Rajpurkar et al. 2016, SQuAD, section 6.1.
    """
    return max(_f1(normalise(given), normalise(answer)) for answer in accepted)


def _f1(given: list[str], wanted: list[str]) -> float:
    shared = (Counter(given) & Counter(wanted)).total()
    return 2 * shared / (len(given) + len(wanted)) if shared else 0.0
