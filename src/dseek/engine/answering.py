"""Makes tokens of logits: the next of a request, and those after it as long as its draft was right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dseek.core.errors import DseekError, RequestError
from dseek.engine.logprobs import token_logprobs
from dseek.engine.request import Request
from dseek.engine.token_filter import masked


def extend(
    request: Request, logits_RV: np.ndarray, now_s: float, not_finite: Callable[[Request], DseekError] | None
) -> int:
    """Choose tokens until the draft was wrong, the answer ends or the rows do.

    Args:
        request: all of its tokens are computed, and its `drafts` after them.
        logits_RV: float32 [1 + drafts, V], after its last token and after each of its draft.
        now_s: what the clock says.
        not_finite: makes the error of a request whose logits are not finite; None where all are.

    Returns:
        How many tokens of the draft were right. A request that cannot go on has failed.
    """
    num_right = 0
    request.num_steps += 1
    for logits_V in logits_RV:
        if not_finite is not None and not np.isfinite(logits_V).all():
            request.fail(not_finite(request))
            break
        try:
            token_id = _choose(request, logits_V)
        except DseekError as error:
            request.fail(error)
            break
        request.accept(token_id, now_s)
        if request.finished or num_right == len(request.drafts) or token_id != request.drafts[num_right]:
            break
        num_right += 1
    return num_right


def _choose(request: Request, logits_V: np.ndarray) -> int:
    """Choose one token, note how likely it was and tell the filter."""
    permitted = logits_V
    token_filter = request.token_filter
    if token_filter is not None:
        try:
            mask = token_filter.mask(request.token_ids[request.num_prompt_tokens :])
        except Exception as error:  # it is the user's, and no other request may suffer from it
            raise RequestError(f"the token filter failed: {type(error).__name__}: {error}") from error
        permitted = masked(logits_V, mask)
    token_id = request.sampler.choose(permitted, request.token_ids)
    if request.logprobs is not None:
        request.logprobs.append(token_logprobs(logits_V, token_id, request.params.logprobs or 0))
    if token_filter is not None:
        try:
            token_filter.accept(token_id)
        except Exception as error:
            raise RequestError(f"the token filter failed: {type(error).__name__}: {error}") from error
    return token_id
