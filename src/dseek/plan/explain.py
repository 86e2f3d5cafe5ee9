"""How a decision is told: every choice with its alternatives, their predicted cost, and why they were not taken."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """One value a choice could have had, everything else as chosen."""

    value: str
    """The value, as shown."""
    prefill_tokens_s: float
    """Predicted for the typical request."""
    decode_tokens_s: float
    """Predicted for the typical request."""
    peak_bytes: int
    """Predicted memory."""
    quality_loss: float
    """Expected rise of perplexity, as a fraction, of weights and cache together."""
    rejected: str
    """Why it was not taken; empty for the value that was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One decision: what was taken, why, and what else there was."""

    name: str
    """What was decided."""
    chosen: str
    """The value taken."""
    why: str
    """One sentence."""
    alternatives: tuple[Alternative, ...]
    """All values considered, the chosen one among them."""


def size_text(num_bytes: float) -> str:
    """Write a size for people.

    Args:
        num_bytes: the size.

    Returns:
        Such as `98.4 MB` (powers of ten).
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}" if num_bytes < 1000 * scale else f"{num_bytes / scale:.0f} {unit}"
    return f"{num_bytes:.0f} B"


def loss_text(loss: float) -> str:
    """Write a quality loss for people.

    Args:
        loss: a fraction.

    Returns:
        Such as `0.4 %`.
    """
    return f"{100 * loss:.0f} %" if loss >= 0.1 else f"{100 * loss:.2g} %"


def score_text(kind: str, ratio: float) -> str:
    """Say how an alternative compares with the chosen value in what the objective counts.

    Args:
        kind: latency, throughput or memory.
        ratio: the alternative's cost over the chosen one's (seconds, seconds a token, bytes).

    Returns:
        Such as `takes 1.8 times as long`.
    """
    if abs(ratio - 1) < 0.005:
        return "the same time" if kind != "memory" else "the same memory"
    if kind == "memory":
        return f"takes {ratio:.2f} times the memory"
    return f"takes {ratio:.2f} times as long"
