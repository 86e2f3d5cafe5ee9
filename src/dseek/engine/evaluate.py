"""Perplexity and next-token accuracy of a text, through the kernels and the precision that answers run with.

The text is cut in windows that overlap by one token, so every token but the first is predicted exactly once, from at
most a window of those before it. Longer windows give lower perplexities: compare like with like. Axes: T positions, V
vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dseek.core.errors import RequestError

if TYPE_CHECKING:
    from dseek.engine.llm import LLM


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What a text says about a model."""

    num_tokens: int
    """Tokens predicted."""
    num_windows: int
    """Windows they were predicted in."""
    window_tokens: int
    """Longest window."""
    perplexity: float
    """exp of the mean negative log likelihood."""
    accuracy: float
    """Fraction of tokens that were the likeliest."""
    seconds: float
    """Time of all windows, the scoring included."""

    @property
    def tokens_s(self) -> float:
        """Tokens predicted a second."""
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0


def evaluate(
    llm: LLM,
    token_ids: Sequence[int],
    *,
    window_tokens: int,
    progress: Callable[[int, int, float], None] | None = None,
) -> Evaluation:
    """Score a text.

    Args:
        llm: the model.
        token_ids: the text, at least two tokens.
        window_tokens: longest window, from 2 to the context.
        progress: called after each window with tokens predicted, tokens to predict and the perplexity so far.

    Returns:
        The scores.

    Raises:
        RequestError: the text or the window is too short or too long, or an id is out of range.

    Source: Jelinek et al. 1977, Perplexity, a measure of the difficulty of speech recognition tasks.
    """
    if len(token_ids) < 2:
        raise RequestError(f"the text has {len(token_ids)} tokens", needed="at least 2, so that one can be predicted")
    if not 2 <= window_tokens <= llm.engine.context_tokens:
        raise RequestError(
            f"the window is {window_tokens} tokens", needed=f"from 2 to the context's {llm.engine.context_tokens}"
        )
    num_targets = len(token_ids) - 1
    started_s = time.perf_counter()
    total, num_right, num_done, num_windows = 0.0, 0, 0, 0
    for start in range(0, num_targets, window_tokens - 1):
        window = token_ids[start : start + window_tokens]
        log_likelihoods, right = score(llm, window)
        total -= float(log_likelihoods.sum())
        num_right += int(right.sum())
        num_done += len(log_likelihoods)
        num_windows += 1
        if progress is not None:
            progress(num_done, num_targets, math.exp(total / num_done))
    assert num_done == num_targets
    return Evaluation(
        num_tokens=num_targets,
        num_windows=num_windows,
        window_tokens=window_tokens,
        perplexity=math.exp(total / num_targets),
        accuracy=num_right / num_targets,
        seconds=time.perf_counter() - started_s,
    )


def score(llm: LLM, token_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Compute how likely each token of a text was, given those before it.

    Args:
        llm: the model.
        token_ids: T ids, from 2 to the context.

    Returns:
        Log likelihoods, float64 [T - 1], and whether the token was the likeliest, bool [T - 1].

    Raises:
        RequestError: the text is too short or too long, or an id is out of range.
    """
    if len(token_ids) < 2:
        raise RequestError(f"the text has {len(token_ids)} tokens", needed="at least 2, so that one can be predicted")
    targets = np.array(llm.engine.check_token_ids(token_ids)[1:], dtype=np.int64)
    log_likelihoods = np.empty(len(targets), dtype=np.float64)
    right = np.empty(len(targets), dtype=bool)
    for start, logits_TV in llm.engine.logits(token_ids[:-1]):
        piece = slice(start, start + len(logits_TV))
        log_likelihoods[piece], right[piece] = _score_rows(logits_TV, targets[piece])
    return log_likelihoods, right


def _score_rows(logits_TV: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log likelihood of each row's target, and whether it has the largest logit."""
    rows = np.arange(len(targets))
    likeliest = logits_TV.argmax(axis=1)
    largest = logits_TV[rows, likeliest]
    if not np.isfinite(largest).all():
        raise RequestError("the model's logits are not finite numbers", remedy="check the weights, or try fp32")
    log_sums = np.log(np.exp(logits_TV - largest[:, None]).sum(axis=1, dtype=np.float64))
    return (logits_TV[rows, targets].astype(np.float64) - largest) - log_sums, likeliest == targets
