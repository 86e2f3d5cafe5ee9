"""`Sampler`: chooses the next token of one request from its logits.

The filters follow Hugging Face `generate` (repetition penalty, temperature, top-k, top-p, min-p). Each request has a
generator of its own that is asked for exactly one number a token, so an answer depends on its seed and its logits and
on nothing that runs beside it. Axis: V vocabulary.

Written for vocabularies of 50,000 and more: greedy is an argmax and nothing else, top-k partitions, top-p sorts only
the weights that can be in the nucleus.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dseek.core.errors import RequestError

if TYPE_CHECKING:
    from dseek.engine.request import SamplingParams


class Sampler:
    """Draws tokens for one request.

    Args:
        params: checked sampling parameters.
    """

    __slots__ = ("_generator", "_num_seen", "_params", "_seen")

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._generator = random.Random(params.seed) if params.temperature > 0 else None
        self._seen: np.ndarray | None = None
        self._num_seen = 0

    def choose(self, logits_V: np.ndarray, token_ids: Sequence[int]) -> int:
        """Choose the token that follows.

        Args:
            logits_V: float32 [V]; left unchanged.
            token_ids: prompt and answer so far, for the repetition penalty; only ever grows between calls.

        Returns:
            The token's id.

        Raises:
            RequestError: the logits are not finite numbers.
        """
        if self._params.repetition_penalty != 1:
            logits_V = self._penalised(logits_V, token_ids)
        if self._generator is None:
            return checked_argmax(logits_V)
        ids, weights = distribution(logits_V, self._params)
        cumulated = np.cumsum(weights, dtype=np.float64)
        position = int(np.searchsorted(cumulated, self._generator.random() * cumulated[-1], side="right"))
        position = min(position, len(weights) - 1)
        return position if ids is None else int(ids[position])

    def _penalised(self, logits_V: np.ndarray, token_ids: Sequence[int]) -> np.ndarray:
        """Weaken the tokens seen so far (Keskar et al. 2019, CTRL, section 4.1, with the sign handled as in HF)."""
        if self._seen is None:
            self._seen = np.zeros(len(logits_V), dtype=bool)
        self._seen[token_ids[self._num_seen :]] = True
        self._num_seen = len(token_ids)
        seen_ids = np.flatnonzero(self._seen)
        seen_logits = logits_V[seen_ids]
        penalty = np.float32(self._params.repetition_penalty)
        logits_V = logits_V.copy()
        logits_V[seen_ids] = np.where(seen_logits < 0, seen_logits * penalty, seen_logits / penalty)
        return logits_V


def checked_argmax(logits_V: np.ndarray) -> int:
    """Find the largest logit.

    Args:
        logits_V: float32 [V].

    Returns:
        Its index, the first of equals.

    Raises:
        RequestError: it is not a finite number.
    """
    token_id = int(logits_V.argmax())
    _require_finite(float(logits_V[token_id]))
    return token_id


def distribution(logits_V: np.ndarray, params: SamplingParams) -> tuple[np.ndarray | None, np.ndarray]:
    """Apply temperature, top-k, top-p and min-p.

    Args:
        logits_V: float32 [V], repetition penalty already applied.
        params: with a temperature above 0.

    Returns:
        Ids of the tokens that are left (None: all, in order) and their weights, float32, not normalised.

    Raises:
        RequestError: the largest logit is not a finite number.

    Source: top-k: Fan et al. 2018, section 5.4; top-p: Holtzman et al. 2020, section 3.1; min-p: Nguyen et al. 2024.
    """
    scaled = logits_V * np.float32(1 / params.temperature)
    largest = scaled.max()
    _require_finite(float(largest))
    scaled -= largest
    ids: np.ndarray | None = None
    if 0 < params.top_k < len(scaled):
        least_kept = np.partition(scaled, len(scaled) - params.top_k)[len(scaled) - params.top_k]
        ids = np.flatnonzero(scaled >= least_kept)
        scaled = scaled[ids]
    weights = np.exp(scaled)
    if params.top_p < 1:
        kept = _nucleus(weights, params.top_p)
        ids = kept if ids is None else ids[kept]
        weights = weights[kept]
    if params.min_p > 0:
        kept = np.flatnonzero(weights >= np.float32(params.min_p))  # The largest weight is exp(0) = 1.
        ids = kept if ids is None else ids[kept]
        weights = weights[kept]
    return ids, weights


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Find the smallest set of largest weights whose share reaches top_p; of equals, those with the lower index."""
    total = float(weights.sum(dtype=np.float64))
    # Tokens at or below this weight sum to at most 1 - top_p even if all of them were at it: never in the nucleus.
    candidates = np.flatnonzero(weights > (1 - top_p) * total / len(weights))
    falling = np.sort(weights[candidates])[::-1]
    cumulated = np.cumsum(falling, dtype=np.float64)
    num_kept = min(int(np.searchsorted(cumulated, top_p * total, side="left")) + 1, len(falling))
    least_kept = falling[num_kept - 1]
    kept = candidates[weights[candidates] >= least_kept]
    num_surplus = len(kept) - num_kept
    if num_surplus:
        equal = np.flatnonzero(weights[kept] == least_kept)
        kept = np.delete(kept, equal[-num_surplus:])
    return kept


def _require_finite(logit: float) -> None:
    """Refuse logits that no token can be drawn from."""
    if not -float("inf") < logit < float("inf"):
        raise RequestError(
            f"the model's largest logit is {logit}", needed="a finite number", remedy="check the weights, or try fp32"
        )
