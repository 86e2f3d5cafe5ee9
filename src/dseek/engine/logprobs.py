"""Log-probabilities of sampled tokens, and of the likeliest tokens beside them.

They are the model's own: before temperature, filters, penalties and masks, as OpenAI's interface and vLLM give them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely the model found one token of an answer."""

    token_id: int
    """The token."""
    logprob: float
    """Natural logarithm of its probability."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens and their log-probabilities, falling; as many as were asked for."""


def token_logprobs(logits_V: np.ndarray, token_id: int, num_top: int) -> TokenLogprobs:
    """Look up a token's log-probability.

    Args:
        logits_V: float32 [V], finite.
        token_id: the token that was chosen.
        num_top: how many of the likeliest to list.

    Returns:
        The logarithms of the softmax; of equally likely tokens the one with the lower id comes first.
    """
    largest = logits_V.max()
    log_total = float(largest) + float(np.log(np.exp(logits_V - largest).sum(dtype=np.float64)))
    top: tuple[tuple[int, float], ...] = ()
    if num_top > 0:
        num_top = min(num_top, len(logits_V))
        least = np.partition(logits_V, len(logits_V) - num_top)[len(logits_V) - num_top]
        ids = np.flatnonzero(logits_V >= least)
        ids = ids[np.argsort(-logits_V[ids], kind="stable")][:num_top]
        top = tuple((int(i), float(logits_V[i]) - log_total) for i in ids)
    return TokenLogprobs(token_id, float(logits_V[token_id]) - log_total, top)
