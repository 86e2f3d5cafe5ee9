"""Documents: a question near the beginning, its paragraph somewhere among others.

    64 words that lead in (the beginning of some other paragraph) | the question | paragraphs in any order

The lead-in matters. Every attention pattern keeps the first block of 64 in sight of all later tokens; a question there
would be near to everything, and a document would ask for nothing from afar.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.experiments.pyramid_f1.squad import MAX_QUESTION_WORDS, MAX_SPAN_WORDS, Corpus, Question
from dseek.core.attention_pattern import BLOCK_TOKENS

LEAD_WORDS = BLOCK_TOKENS
LEAD, QUESTION, TEXT = range(3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One question in its document of T words."""

    question: Question
    features: np.ndarray
    """int64 [T, 4] word, first letters, shape, and one of LEAD, QUESTION, TEXT."""
    paragraph: np.ndarray
    """int64 [T] number of the paragraph in the document, -1 outside of paragraphs."""
    places: np.ndarray
    """int64 [T, 2] of each word of a paragraph: which paragraph of the corpus, and which of its words."""
    answer_start: int
    """Position of the first word of the paragraph that answers."""

    def spans(self) -> list[tuple[int, int]]:
        """Positions of the first and last word of each answer that is short enough."""
        return [(self.answer_start + first, self.answer_start + last) for first, last in self.question.spans]

    def text(self, corpus: Corpus, first: int, last: int) -> str:
        """The characters from one word to another one of the same paragraph.

        Args:
            corpus: what the document was built of.
            first: position of the first word.
            last: position of the last word.
        """
        words = corpus.paragraphs[self.places[first, 0]]
        return words.text[words.spans[self.places[first, 1]][0] : words.spans[self.places[last, 1]][1]]


def longest_paragraph(length: int) -> int:
    """Words that a paragraph may have to fit into a document beside lead-in and question.

    Args:
        length: words of the document.
    """
    return length - LEAD_WORDS - MAX_QUESTION_WORDS


def build(corpus: Corpus, question: Question, length: int, random: np.random.Generator) -> Document:
    """Build a document around a question.

    Args:
        corpus: where the other paragraphs come from.
        question: a question whose paragraph fits (see `longest_paragraph`).
        length: words.
        random: draws the other paragraphs and the order.

    Returns:
        The document, exactly so long; its last other paragraph is cut.
    """
    own = corpus.paragraphs[question.paragraph_idx]
    rest = length - LEAD_WORDS - len(question.words) - len(own)
    assert rest >= 0, "the paragraph does not fit"
    others: list[int] = []
    used = {question.paragraph_idx}

    def draw() -> int:
        # A small corpus may have to repeat a paragraph, but never the one that answers.
        while True:
            drawn = int(random.integers(len(corpus.paragraphs)))
            if drawn != question.paragraph_idx and (drawn not in used or len(used) == len(corpus.paragraphs)):
                used.add(drawn)
                return drawn

    lead: list[np.ndarray] = []
    while sum(map(len, lead)) < LEAD_WORDS:
        lead.append(corpus.paragraphs[draw()].features)
    while rest > 0:
        others.append(draw())
        rest -= len(corpus.paragraphs[others[-1]])
    # The paragraph that is cut is drawn like any other one, so that its place tells nothing; so is the answering one's.
    cut_words = len(corpus.paragraphs[others[-1]]) + rest if others else 0
    pieces = [(idx, len(corpus.paragraphs[idx])) for idx in others[:-1]]
    pieces += [(others[-1], cut_words)] if others else []
    order = [*pieces, (question.paragraph_idx, len(own))]
    random.shuffle(order)

    features = [
        _tagged(np.concatenate(lead)[:LEAD_WORDS], LEAD),
        _tagged(question.words.features, QUESTION),
        *(_tagged(corpus.paragraphs[idx].features[:count], TEXT) for idx, count in order),
    ]
    before = LEAD_WORDS + len(question.words)
    counts = np.array([count for _, count in order])
    own_place = [idx for idx, _ in order].index(question.paragraph_idx)
    places = [np.stack([np.full(count, idx), np.arange(count)], axis=1) for idx, count in order]
    return Document(
        question=question,
        features=np.concatenate(features),
        paragraph=np.concatenate([np.full(before, -1), np.repeat(np.arange(len(order)), counts)]),
        places=np.concatenate([np.full((before, 2), -1), *places]),
        answer_start=before + int(counts[:own_place].sum()),
    )


def _tagged(features: np.ndarray, tag: int) -> np.ndarray:
    return np.concatenate([features, np.full((len(features), 1), tag)], axis=1)


def usable(corpus: Corpus, length: int, *, trained: bool) -> list[Question]:
    """Questions whose paragraph fits into a document.

    Args:
        corpus: a part of the data.
        length: words of the document.
        trained: leave out those without an answer short enough to train on.
    """
    longest = longest_paragraph(length)
    return [
        question
        for question in corpus.questions
        if len(corpus.paragraphs[question.paragraph_idx]) <= longest and (question.spans or not trained)
    ]


def batches(corpus: Corpus, length: int, batch: int, seed: int) -> Iterator[list[Document]]:
    """Documents to train on, without end: every question once, then again in another order among other paragraphs.

    Args:
        corpus: a part of the data.
        length: words of each document.
        batch: documents at a time.
        seed: decides everything.

    Yields:
        So many documents.
    """
    random = np.random.default_rng(seed)
    questions = usable(corpus, length, trained=True)
    waiting: list[Question] = []
    while True:
        while len(waiting) < batch:
            waiting += [questions[idx] for idx in random.permutation(len(questions))]
        now, waiting = waiting[:batch], waiting[batch:]
        yield [build(corpus, question, length, random) for question in now]


def features_of(documents: list[Document]) -> torch.Tensor:
    """Stack documents of one length.

    Args:
        documents: at least one.

    Returns:
        int64 [B, T, 4].
    """
    return torch.from_numpy(np.stack([document.features for document in documents]))


def best_span(scores_T2: torch.Tensor, document: Document) -> tuple[int, int]:
    """Find the span within one paragraph whose first and last word score best together.

    Args:
        scores_T2: [T, 2] scores of each word as the first and as the last.
        document: the document.

    Returns:
        Positions of the first and the last word, at most `MAX_SPAN_WORDS` in all.
    """
    paragraph = torch.from_numpy(document.paragraph)
    first_T, last_T = scores_T2.unbind(-1)
    best, found = -float("inf"), (0, 0)
    for more in range(MAX_SPAN_WORDS):
        past = len(paragraph) - more
        inside = (paragraph[:past] >= 0) & (paragraph[:past] == paragraph[more:])
        sums = (first_T[:past] + last_T[more:]).masked_fill(~inside, -float("inf"))
        place = int(sums.argmax())
        if float(sums[place]) > best:
            best, found = float(sums[place]), (place, place + more)
    return found
