"""What attention to less than everything costs in quality: the rise of perplexity over dense attention, a fraction.

The figures are priors, measured once on SmolLM2-135M-Instruct over source code of 8,192 tokens, not on the user's
model; `python -m benchmarks.experiments.patterns` reproduces them. They say nothing about tasks that hang on one far
sentence.

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
}
"""By kind and whether far cells count: windows of 2048, 1024, 512 and 256; 32, 16, 8 and 4 blocks beside one of 256."""

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


def layer_losses(shape: ModelShape, pattern: AttentionPattern, context_tokens: int) -> list[float]:
    """Estimate what each layer loses with a pattern.

    Args:
        shape: the model.
        pattern: how the layer attends.
        context_tokens: length of the sequence.

    Returns:
        Rise of perplexity, a fraction, by layer.
    """
    if pattern.kind == "dense":
        return [0.0] * shape.num_layers
    whole = _whole(shape, pattern, context_tokens)
    by_depth = SENSITIVITY[pattern.kind]
    weights = [by_depth[layer * len(by_depth) // shape.num_layers] for layer in range(shape.num_layers)]
    return [whole * weight / shape.num_layers for weight in weights]


def attention_loss(shape: ModelShape, patterns: Sequence[AttentionPattern], context_tokens: int) -> float:
    """Estimate what a model loses with patterns.

    Args:
        shape: the model.
        patterns: layer by layer.
        context_tokens: length of the sequence.

    Returns:
        Rise of perplexity, a fraction.
    """
    total = 0.0
    for pattern in dict.fromkeys(patterns):
        if pattern.kind != "dense":
            losses = layer_losses(shape, pattern, context_tokens)
            some = sum(loss for layer, loss in enumerate(losses) if patterns[layer] == pattern)
            total += min(some, _whole(shape, pattern, context_tokens))
    return total


def _whole(shape: ModelShape, pattern: AttentionPattern, context_tokens: int) -> float:
    """The loss with a pattern in all layers, with its margin."""
    first = int(context_tokens * FIRST_SHARE)
    share = skipped_share(pattern, context_tokens, shape.num_kv_heads, first_token=first)
    return MARGIN * pattern_loss(pattern, share)


def pattern_loss(pattern: AttentionPattern, share: float) -> float:
    """Estimate what a model loses with a pattern in all layers.

    Args:
        pattern: window or dynamic.
        share: of the pairs that it leaves out.

    Returns:
        Rise of perplexity, a fraction: along straight lines between the measured points, from no loss at no share.
    """
    shares, losses = [0.0], [0.0]
    for point, rise, error in MEASURED[pattern.kind, pattern.far]:
        shares.append(point)
        losses.append(math.expm1(rise + ERRORS_ADDED * error))
    if share >= shares[-1]:
        return losses[-1] * (1 - shares[-1]) / max(1 - share, 1e-6)
    upper = bisect.bisect_right(shares, max(share, 0.0))
    part = (max(share, 0.0) - shares[upper - 1]) / (shares[upper] - shares[upper - 1])
    return losses[upper - 1] + part * (losses[upper] - losses[upper - 1])
