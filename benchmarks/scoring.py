"""Turn logits into losses: the same few lines for every engine whose logits can be had. numpy only."""

from __future__ import annotations

import math

import numpy as np


def score_rows(logits: np.ndarray, targets: np.ndarray) -> tuple[list[float], list[int]]:
    """Negative log likelihood of the token that follows each row, and the row's likeliest token.

    Args:
        logits: float32 [T, V].
        targets: int [T], the token that follows.

    Returns:
        Losses in nats and likeliest tokens, T of each.
    """
    if len(logits) == 0:
        return [], []
    top = logits.max(axis=1)
    total = np.exp(logits - top[:, None], dtype=np.float32).sum(axis=1, dtype=np.float64)
    chosen = logits[np.arange(len(logits)), targets]
    losses = np.log(total) + top - chosen
    return [float(loss) for loss in losses], [int(token) for token in logits.argmax(axis=1)]


def regrets(logits: np.ndarray, answer: np.ndarray) -> list[float]:
    """How much less likely each token of an answer is than the likeliest one there.

    Args:
        logits: float32 [T, V], row t being what the reference expects in place t of the answer.
        answer: int [T].

    Returns:
        T differences of log probability, in nats, 0 where the reference would have said the same.
    """
    return [float(row.max() - row[token]) for row, token in zip(logits, answer, strict=True)]


def perplexity(losses: list[float]) -> float:
    """Exponential of the mean loss; not finite where a loss is not."""
    return math.exp(min(sum(losses) / len(losses), 700.0)) if all(map(math.isfinite, losses)) else math.nan


def agreement(ours: list[int], theirs: list[int]) -> float:
    """Share of places where two lists of tokens are the same."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
