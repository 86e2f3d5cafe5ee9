"""Numbers that are not finite: finding them among logits, and saying where they began."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dseek.core.errors import NotFiniteError

if TYPE_CHECKING:
    from dseek.models.files import ModelFiles
    from dseek.plan.plan import Plan


def not_finite_error(token_ids: Sequence[int], model: tuple[ModelFiles, Plan] | None) -> NotFiniteError:
    """Make the error of a text after whose last token the model's numbers are not finite.

    Args:
        token_ids: the text.
        model: what was run, to find out where that began, which takes as long as a load; None does not ask.
    """
    where = "`dseek generate` with this prompt finds out where that began"
    if model is not None:
        where = _origin(*model, token_ids)
    return NotFiniteError(
        f"the logits after token {len(token_ids) - 1} are not finite; {where}",
        needed="finite numbers",
        remedy="check the weights, or try fp32",
    )


def first_bad_row(logits: np.ndarray) -> int | None:
    """Find logits that are not finite.

    Args:
        logits: float32 [L, V].

    Returns:
        Index of the first row that has some, or None. One sum decides, as a NaN or an infinity is never added away;
        only where the sum is not finite is every number looked at.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.add.reduce(logits, axis=None)
    if np.isfinite(total):
        return None
    bad = ~np.isfinite(logits).all(axis=1)
    return int(bad.argmax()) if bad.any() else None


def _origin(files: ModelFiles, plan: Plan, token_ids: Sequence[int]) -> str:
    """Say where the numbers of a text stopped being finite."""
    try:
        from dseek.engine.number_trace import first_not_finite

        origin = first_not_finite(files, plan, token_ids)
    except Exception as error:  # the search must not hide what it was made for
        return f"where that began could not be found ({type(error).__name__}: {error})"
    if origin is None:
        return "the reference stays finite: a narrow cache, a choice of blocks, or a faulty kernel made them"
    return f"first, {origin}"
