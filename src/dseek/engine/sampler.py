"""`Sampler`: chooses the next token of one request from its logits.

The filters follow Hugging Face `generate` (repetition penalty, temperature, top-k, top-p, min-p), bias and penalties on
presence and frequency OpenAI's interface. Each request has a generator of its own that is asked for exactly one number
a token, so an answer depends on its seed and its logits and on nothing that runs beside it. Axis: V vocabulary.

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
    from dseek.engine.sampling_params import SamplingParams


class Sampler:
    """Draws tokens for one request.

    Args:
        params: checked sampling parameters.
        num_prompt_tokens: tokens before the answer, which presence and frequency do not count.
    """

    __slots__ = ("_bias", "_counts", "_generator", "_num_prompt_tokens", "_num_seen", "_params", "_seen")

    def __init__(self, params: SamplingParams, num_prompt_tokens: int = 0) -> None:
        self._params = params
        self._generator = random.Random(params.seed) if params.temperature > 0 else None
        self._num_prompt_tokens = num_prompt_tokens
        self._num_seen = 0
        self._seen: np.ndarray | None = None
        self._counts: np.ndarray | None = None
        self._bias = dict(params.logit_bias)

    def choose(self, logits_V: np.ndarray, token_ids: Sequence[int]) -> int:
        """Choose the token that follows.

        Args:
            logits_V: float32 [V]; left unchanged.
            token_ids: prompt and answer so far, for the penalties; only ever grows between calls.

        Returns:
            The token's id.

        Raises:
            RequestError: the logits are not finite numbers.
        """
        if self._params.changes_logits:
            logits_V = self._changed(logits_V, token_ids)
        if self._generator is None:
            return checked_argmax(logits_V)
        ids, weights = distribution(logits_V, self._params)
        cumulated = np.cumsum(weights, dtype=np.float64)
        position = int(np.searchsorted(cumulated, self._generator.random() * cumulated[-1], side="right"))
        position = min(position, len(weights) - 1)
        return position if ids is None else int(ids[position])

    def _changed(self, logits_V: np.ndarray, token_ids: Sequence[int]) -> np.ndarray:
        """Apply bias and penalties.

        Source: repetition: Keskar et al. 2019, CTRL, section 4.1, with the sign handled as in HF; presence and
        frequency: OpenAI's API reference, logit - count * frequency - (count > 0) * presence.
        """
        params, logits_V = self._params, logits_V.copy()
        self._follow(len(logits_V), token_ids)
        for token_id, bias in self._bias.items():
            if token_id < len(logits_V):
                logits_V[token_id] += np.float32(bias)
        if self._seen is not None:
            seen_ids = np.flatnonzero(self._seen)
            seen_logits, penalty = logits_V[seen_ids], np.float32(params.repetition_penalty)
            logits_V[seen_ids] = np.where(seen_logits < 0, seen_logits * penalty, seen_logits / penalty)
        if self._counts is not None:
            said_ids = np.flatnonzero(self._counts)
            loss = self._counts[said_ids] * np.float32(params.frequency_penalty) + np.float32(params.presence_penalty)
            logits_V[said_ids] -= loss
        return logits_V

    def _follow(self, vocab_size: int, token_ids: Sequence[int]) -> None:
        """Note what has been said since the last call."""
        params = self._params
        if params.repetition_penalty != 1:
            if self._seen is None:
                self._seen = np.zeros(vocab_size, dtype=bool)
            self._seen[token_ids[self._num_seen :]] = True
        if params.presence_penalty or params.frequency_penalty:
            if self._counts is None:
                self._counts = np.zeros(vocab_size, dtype=np.float32)
            for token_id in token_ids[max(self._num_seen, self._num_prompt_tokens) :]:
                self._counts[token_id] += 1
        self._num_seen = len(token_ids)


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
