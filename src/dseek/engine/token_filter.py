"""`TokenFilter`: says which tokens may follow, so that an answer keeps to a grammar.

Libraries such as xgrammar and llguidance compile a JSON schema, a regular expression or a grammar to an automaton and
give a mask for each token; anything with these two methods can be plugged into a request. A filter has the state of one
answer. It is asked once a token, also for tokens that speculation has guessed, always in order, and never taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dseek.core.errors import RequestError


class TokenFilter(Protocol):
    """Masks tokens and follows the answer."""

    def mask(self, token_ids: Sequence[int]) -> np.ndarray | None:
        """Tell which tokens may come next.

        Args:
            token_ids: the answer so far.

        Returns:
            bool [V] (entries beyond the vocabulary are ignored), or int32 or uint32 [V / 32 rounded up], a bit a token,
            the lowest first; None lets everything pass. It must let something pass: at the end, an end token.
        """

    def accept(self, token_id: int) -> None:
        """Follow the answer.

        Args:
            token_id: the token that was chosen; one that the last mask let pass.
        """


def masked(logits_V: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Take what a mask forbids out of logits.

    Args:
        logits_V: float32 [V]; left unchanged.
        mask: from `TokenFilter.mask`.

    Returns:
        float32 [V], minus infinity where the token may not come.

    Raises:
        RequestError: the mask has another size or kind than it should have, or lets nothing pass.
    """
    if mask is None:
        return logits_V
    vocab_size = len(logits_V)
    allowed = np.asarray(mask).reshape(-1)
    if allowed.dtype in (np.int32, np.uint32):
        allowed = np.unpackbits(allowed.astype("<u4", copy=False).view(np.uint8), bitorder="little").view(bool)
    if allowed.dtype != np.bool_ or len(allowed) < vocab_size:
        raise RequestError(
            f"the token filter gave a mask of {np.asarray(mask).dtype} {list(np.asarray(mask).shape)}",
            needed=f"bool [{vocab_size}], or int32 [{-(-vocab_size // 32)}] with a bit a token",
        )
    allowed = allowed[:vocab_size]
    if not allowed.any():
        raise RequestError("the token filter lets no token pass", needed="an end token at least")
    return np.where(allowed, logits_V, np.float32(-np.inf))
