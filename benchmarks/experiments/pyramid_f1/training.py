"""Training and scoring the twins.

Short documents come first, in which the window reaches everything: there all patterns are one computation, so that one
training serves all twins of a seed. Then each twin goes on by itself with longer documents, the same ones in the same
order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from benchmarks.experiments.pyramid_f1.documents import Document, batches, best_span, build, features_of, usable
from benchmarks.experiments.pyramid_f1.reader import Reader
from benchmarks.experiments.pyramid_f1.squad import Corpus, f1
from dseek.core.attention_pattern import DENSE, AttentionPattern

WINDOW_TOKENS = 256
TOP_BLOCKS = 8
PATTERNS = {
    "pyramid": AttentionPattern(kind="dynamic", window_tokens=(WINDOW_TOKENS,), top_blocks=TOP_BLOCKS, far=True),
    "window": AttentionPattern(kind="window", window_tokens=(WINDOW_TOKENS,)),
    "dense": DENSE,
    "window-1024": AttentionPattern(kind="window", window_tokens=(1024,)),
}
"""The twins. The last one sees more words than the pyramid does, all of them near."""

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Some training on documents of one length."""

    length: int
    """Words of a document."""
    batch: int
    """Documents of a step."""
    steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How well a reader answers."""

    f1: list[float]
    """F1 of each question, 0 to 1."""
    distance: list[int]
    """Words from the end of the question to the answering paragraph, of each."""
    loss: float
    """Mean of `loss_of` over the questions that have an answer short enough."""
    right_paragraph: float
    """Share of answers from the paragraph that was asked about."""
    best_f1: float
    """Mean F1 of the best span that could be given: what the words' borders and the longest span cost."""

    @property
    def mean_f1(self) -> float:
        """Mean F1, 0 to 1."""
        return sum(self.f1) / len(self.f1)


def loss_of(scores_BT2: torch.Tensor, documents: Sequence[Document]) -> torch.Tensor:
    """Negative log likelihood of the answers' first and last words, among the words of all paragraphs.

    Args:
        scores_BT2: [B, T, 2] what the reader gave.
        documents: B documents with at least one span each.

    Returns:
        Mean over the documents of the sum for the first and the last word; any annotator's word counts as right.
    """
    losses = []
    for scores_T2, document in zip(scores_BT2, documents, strict=True):
        outside = torch.from_numpy(document.paragraph < 0)[:, None]
        log_shares = scores_T2.masked_fill(outside, -math.inf).log_softmax(0)
        for side, places in enumerate(zip(*document.spans(), strict=True)):
            losses.append(-log_shares[sorted(set(places)), side].logsumexp(0))
    return torch.stack(losses).sum() / len(documents)


def train(
    reader: Reader, pattern: AttentionPattern, corpus: Corpus, stage: Stage, *, rate: float, seed: int, log: Log
) -> None:
    """Train in place with AdamW, a short warm-up and a linear decay.

    Args:
        reader: the reader.
        pattern: what it attends to.
        corpus: the part to train on.
        stage: how long.
        rate: highest learning rate.
        seed: of documents and their order.
        log: gets a line now and then.
    """
    optimiser = torch.optim.AdamW(reader.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warm_up = max(1, stage.steps // 20)
    recent: list[float] = []
    reader.train()
    for step, documents in enumerate(islice(batches(corpus, stage.length, stage.batch, seed), stage.steps)):
        for group in optimiser.param_groups:
            group["lr"] = rate * min((step + 1) / warm_up, (stage.steps - step) / (stage.steps - warm_up + 1))
        # Long documents one by one: their activations are what fills the memory.
        together = max(1, min(stage.batch, 4096 // stage.length))
        total = 0.0
        for at in range(0, len(documents), together):
            some = documents[at : at + together]
            loss = loss_of(reader(features_of(some), pattern), some) * len(some) / len(documents)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        recent.append(total)
        if (step + 1) % max(1, stage.steps // 10) == 0:
            log(f"{stage.length} words, step {step + 1} of {stage.steps}: loss {np.mean(recent):.3f}")
            recent.clear()


@torch.no_grad()
def score(reader: Reader, pattern: AttentionPattern, corpus: Corpus, length: int, count: int) -> Score:
    """Answer questions of a part, always the same ones in the same documents.

    Args:
        reader: the reader.
        pattern: what it attends to.
        corpus: the part.
        length: words of each document.
        count: questions at most.

    Returns:
        The score.
    """
    random = np.random.default_rng(length)
    questions = usable(corpus, length, trained=False)
    chosen = [questions[idx] for idx in random.permutation(len(questions))[:count]]
    reader.eval()
    scores, distances, losses, right, best = [], [], [], [], []
    for question in chosen:
        document = build(corpus, question, length, random)
        (scores_T2,) = reader(features_of([document]), pattern)
        if document.spans():
            losses.append(float(loss_of(scores_T2[None], [document])))
        first, last = best_span(scores_T2, document)
        scores.append(f1(document.text(corpus, first, last), question.answers))
        right.append(document.places[first, 0] == question.paragraph_idx)
        distances.append(document.answer_start - int((document.paragraph >= 0).argmax()))
        best.append(max((f1(document.text(corpus, *span), question.answers) for span in document.spans()), default=0.0))
    return Score(
        f1=scores,
        distance=distances,
        loss=float(np.mean(losses)),
        right_paragraph=float(np.mean(right)),
        best_f1=float(np.mean(best)),
    )
