"""What attention to less than everything costs in quality: the rise of perplexity over dense attention, a fraction.

The figures are priors, measured once on SmolLM2-135M-Instruct over source code of 8,192 tokens, not on the user's
model; `python -m benchmarks.experiments.patterns` reproduces them, and `python -m benchmarks.experiments.row_patterns`
those of selection by rows. They say nothing about tasks that hang on one far sentence.

The loss of a kind of pattern depends on the share of pairs of positions that it leaves out, in the last three quarters
of a full context. Beyond the largest measured share it grows as what is left shrinks. In some layers only, a pattern
loses more than their part of what it loses in all: layers with it are charged by their depth, as measured, until the
loss of all is reached.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

from dseek.core.attention_pattern import AttentionPattern
from dseek.core.shape import ModelShape
from dseek.plan.selection import skipped_share

Points = tuple[tuple[float, float, float], ...]
"""Share of pairs left out, rising; rise of the mean log-loss with that pattern in all layers; its standard error."""

MEASURED: dict[tuple[str, bool], Points] = {
    ("window", False): (
        (0.587, 0.0062, 0.0031),
        (0.784, 0.0268, 0.0046),
        (0.883, 0.0759, 0.0106),
        (0.932, 0.1718, 0.0289),
    ),
    ("dynamic", False): (
        (0.538, 0.0069, 0.0031),
        (0.735, 0.0251, 0.0049),
        (0.833, 0.0520, 0.0061),
        (0.883, 0.0858, 0.0105),
    ),
    ("dynamic", True): (
        (0.538, 0.0071, 0.0031),
        (0.735, 0.0253, 0.0054),
        (0.833, 0.0562, 0.0063),
        (0.883, 0.0899, 0.0105),
    ),
    ("rows", False): (
        (0.499, 0.0069, 0.0022),
        (0.680, 0.0113, 0.0024),
        (0.752, 0.0204, 0.0026),
        (0.818, 0.0336, 0.0025),
        (0.877, 0.0860, 0.0109),
    ),
    ("rows", True): (
        (0.621, 0.0050, 0.0007),
        (0.765, 0.0104, 0.0010),
        (0.814, 0.0173, 0.0013),
        (0.854, 0.0343, 0.0026),
        (0.884, 0.0921, 0.0131),
    ),
}
"""By kind and whether far cells count: windows of 2048, 1024, 512 and 256; 32, 16, 8 and 4 blocks beside one of 256.

Selection by rows, by whether the model's trained gate is followed: shares from 0.01, 0.02, 0.03, 0.05 and 0.1 beside a
window of 64, with the heads that the gate keeps dense; the share of pairs is the one that is foreseen.
"""

ERRORS_ADDED = 2.0
"""Standard errors that a measured loss is taken to be higher: a plan should not hang on what may be chance."""

MARGIN = 2.0
"""Factor on the loss for every model: a second one has not been measured, and may lose more."""

SENSITIVITY: dict[str, tuple[float, ...]] = {
    "window": (1.1, 2.5, 0.6, 2.4, 2.5, 0.2),
    "dynamic": (0.4, 1.8, 0.7, 3.1, 2.1, 0.2),
}
"""Loss of a layer over the average share of the loss in all layers, by kind and depth: one figure for each sixth.

The means are above 1, since a sixth of the layers loses more alone than beside the others.
"""

FIRST_SHARE = 2192 / 8192
"""Positions before this part of the context were not counted."""


def figures_of(pattern: AttentionPattern) -> tuple[str, bool]:
    """Name the measured figures that are a pattern's.

    Args:
        pattern: window or dynamic.

    Returns:
        A key of `MEASURED`.
    """
    return ("rows", pattern.gate) if pattern.min_share else (pattern.kind, pattern.far)


def layer_losses(shape: ModelShape, patterns: Sequence[AttentionPattern], context_tokens: int) -> list[float]:
    """Estimate what each layer loses with its pattern.

    Args:
        shape: the model.
        patterns: layer by layer.
        context_tokens: length of the sequence.

    Returns:
        Rise of perplexity, a fraction, by layer.
    """
    wholes = _wholes(shape, patterns, context_tokens)
    losses = []
    for layer, pattern in enumerate(patterns):
        by_depth = SENSITIVITY.get(pattern.kind, (0.0,))
        weight = by_depth[layer * len(by_depth) // shape.num_layers]
        losses.append(weight / shape.num_layers * wholes.get(figures_of(pattern), 0.0))
    return losses


def attention_loss(shape: ModelShape, patterns: Sequence[AttentionPattern], context_tokens: int) -> float:
    """Estimate what a model loses with patterns.

    Args:
        shape: the model.
        patterns: layer by layer.
        context_tokens: length of the sequence.

    Returns:
        Rise of perplexity, a fraction.
    """
    losses = layer_losses(shape, patterns, context_tokens)
    total = 0.0
    for figures, whole in _wholes(shape, patterns, context_tokens).items():
        some = sum(loss for loss, pattern in zip(losses, patterns, strict=True) if figures_of(pattern) == figures)
        total += min(some, whole)
    return total


def _wholes(
    shape: ModelShape, patterns: Sequence[AttentionPattern], context_tokens: int
) -> dict[tuple[str, bool], float]:
    """The loss with each kind of pattern in all layers, with its margin.

    Patterns of a kind are judged together, by what they leave out in the mean. Windows by head so lose what one window
    of their mean loses, which is what was measured (`benchmarks.experiments.head_windows`).
    """
    first = int(context_tokens * FIRST_SHARE)
    shares: dict[tuple[str, bool], list[float]] = {}
    for pattern in patterns:
        if pattern.kind != "dense":
            share = skipped_share(pattern, context_tokens, shape.num_kv_heads, first_token=first)
            shares.setdefault(figures_of(pattern), []).append(share)
    return {figures: MARGIN * _loss_at(figures, sum(some) / len(some)) for figures, some in shares.items()}


def pattern_loss(pattern: AttentionPattern, share: float) -> float:
    """Estimate what a model loses with a pattern in all layers.

    Args:
        pattern: window or dynamic.
        share: of the pairs that it leaves out.

    Returns:
        Rise of perplexity, a fraction: along straight lines between the measured points, from no loss at no share.
    """
    return _loss_at(figures_of(pattern), share)


def _loss_at(figures: tuple[str, bool], share: float) -> float:
    """The loss along a measured line."""
    shares, losses = [0.0], [0.0]
    for point, rise, error in MEASURED[figures]:
        shares.append(point)
        losses.append(math.expm1(rise + ERRORS_ADDED * error))
    if share >= shares[-1]:
        return losses[-1] * (1 - shares[-1]) / max(1 - share, 1e-6)
    upper = bisect.bisect_right(shares, max(share, 0.0))
    part = (max(share, 0.0) - shares[upper - 1]) / (shares[upper] - shares[upper - 1])
    return losses[upper - 1] + part * (losses[upper] - losses[upper - 1])
