"""What a format costs in quality: the rise of perplexity over the file's own weights in fp32, as a fraction.

The figures are priors, measured once on SmolLM2-135M-Instruct, not on the user's model; they are reproduced with
`python -m benchmarks run quality-int8` and, for int4, `python -m benchmarks.experiments.sensitivity`, or for any model
and text with `dseek eval MODEL --text FILE --precision P` beside `--precision fp32`. Losses of weights and cache are
taken to add up.

The figure of i8p, int8 channels without a rotation, is that of rounding to nearest (`docs/lab-log.md`, W8A8 by channel
and token).

Where projections differ in format, each is charged for its own share of the loss (`prior_losses`): its share of the
weights times how sensitive its role is at its depth, which `python -m benchmarks.experiments.sensitivity` measured.
Losses measured for a model's own tensors may replace any of these (`plan.make`).

A format that holds a file's encoding exactly loses nothing: int8 groups hold Q8_0, int4 groups hold Q4_0 and Q4_1, and
int8 channels without a rotation hold those of a file that was made so, with the activations it was made for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dseek.core.errors import ConfigError
from dseek.core.shape import ModelShape
from dseek.plan.formats import AS_GIVEN, ENCODING_BITS, ROLES, VARIANTS, LayerFormats, Variant

LossTable = Mapping[tuple[int, str, str], float]
"""Loss of one projection, a fraction, by layer, role and weight format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredLosses:
    """What was found out about one model; the priors here stand in for what is missing."""

    projections: LossTable = field(default_factory=dict)
    """Of projections, each alone in a format."""
    caches: Mapping[str, float] = field(default_factory=dict)
    """By cache dtype, a fraction."""
    tables: Mapping[str, float] = field(default_factory=dict)
    """By format of embedding and head, a fraction."""

    def __post_init__(self) -> None:
        """Check the losses of caches and tables; those of projections are checked where the model is known.

        Raises:
            ConfigError: a loss that is not a number from 0 to 10.
        """
        for name, loss in (*self.caches.items(), *self.tables.items()):
            if not 0.0 <= loss <= 10.0:
                raise ConfigError(f"a loss of {loss} was given for {name}", needed="a fraction from 0 to 10")


WEIGHT_LOSS: dict[str, float] = {
    "f32": 0.0,
    "f16": 0.0001,
    "bf16": 0.0005,
    "i8c": 0.003,
    "i8p": 0.03,
    "i8g": 0.002,
    "i4g": 0.2,
}
"""By weight format, where the file is wider."""

CACHE_LOSS: dict[str, float] = {"fp32": 0.0, "bf16": 0.0, "int8": 0.001}
"""By cache dtype."""

SENSITIVITY: dict[str, tuple[float, ...]] = {
    "qkv": (1.9, 1.7, 1.6, 5.7, 3.0, 1.9),
    "output": (0.8, 0.5, 0.5, 1.3, 0.6, 0.25),
    "gate_up": (0.3, 0.25, 0.3, 0.5, 0.6, 1.2),
    "down": (0.6, 0.25, 1.9, 0.3, 0.7, 2.8),
}
"""Loss of a role's weights over that of the average weight, by depth: one figure for each sixth of the layers.

Means of two runs, each good to some 0.3; what came out lower than 0.25 could not be told from 0 and is set to it.
"""

LAST_LAYER, BEFORE_LAST = 3.0, 0.5
"""In the last sixth the last layer alone loses half: factors on the figures above for it and for the others there."""

EXACT_ENCODINGS: dict[str, tuple[str, ...]] = {
    "f16": ("F16",),
    "bf16": ("BF16",),
    "i8p": ("I8_CHANNEL",),
    "i8g": ("Q8_0",),
    "i4g": ("Q4_0", "Q4_1"),
}
"""Encodings that a format holds without rounding a weight (f32 holds all)."""


def weight_loss(variant: Variant, shape: ModelShape, encodings: Mapping[str, int]) -> float:
    """Estimate the loss of storing a model's weights in one way.

    The loss of the format counts for the share of the projections' weights that it cannot hold exactly. Tables
    (embedding and head) are taken to be in the file's widest encodings, as quantised files have it.

    Args:
        variant: the way.
        shape: the model.
        encodings: elements in the file, by encoding.

    Returns:
        Rise of perplexity, as a fraction.
    """
    total = shape.num_layers * shape.num_block_parameters()
    elsewhere = shape.num_parameters() - total
    exact = 0
    for name, count in sorted(encodings.items(), key=lambda item: -ENCODING_BITS.get(item[0], 0)):
        in_tables = min(count, elsewhere)
        elsewhere -= in_tables
        if name in EXACT_ENCODINGS.get(variant.weight_format, ()):
            exact += count - in_tables
    return WEIGHT_LOSS[variant.weight_format] * max(0, total - exact) / total


def prior_losses(shape: ModelShape, encodings: Mapping[str, int]) -> dict[tuple[int, str, str], float]:
    """Estimate what every projection loses in every format, without having read a weight.

    Args:
        shape: the model.
        encodings: elements in the file, by encoding.

    Returns:
        A complete `LossTable`; over all projections the losses of a format add up to `weight_loss`.
    """
    weights: dict[tuple[int, str], float] = {}
    for role, (rows, columns) in shape.linear_sizes().items():
        by_depth = SENSITIVITY[role]
        for layer in range(shape.num_layers):
            sixth = layer * len(by_depth) // shape.num_layers
            factor = by_depth[sixth]
            if layer + 1 == shape.num_layers:
                factor *= LAST_LAYER
            elif sixth + 1 == len(by_depth):
                factor *= BEFORE_LAST
            weights[layer, role] = rows * columns * factor
    total = sum(weights.values())
    return {
        (layer, role, variant.weight_format): weight_loss(variant, shape, encodings) * weight / total
        for variant in (*VARIANTS, AS_GIVEN)
        for (layer, role), weight in weights.items()
    }


def completed_losses(
    shape: ModelShape, encodings: Mapping[str, int], measured: LossTable | None
) -> dict[tuple[int, str, str], float]:
    """Take measured losses where there are some, and the prior elsewhere.

    Args:
        shape: the model.
        encodings: elements in the file, by encoding.
        measured: losses of some of the model's projections, or None.

    Returns:
        A complete `LossTable`.

    Raises:
        ConfigError: a loss of no projection or format, or one that is not a number from 0 to 10.
    """
    losses = prior_losses(shape, encodings)
    for place, loss in (measured or {}).items():
        if place not in losses:
            layer, role, weight_format = place
            raise ConfigError(
                f"a loss was given for {role} of layer {layer} in {weight_format}",
                needed=f"layers 0 to {shape.num_layers - 1}, roles {', '.join(ROLES)} and a weight format",
            )
        if not 0.0 <= loss <= 10.0:
            raise ConfigError(f"a loss of {loss} was given", needed="a fraction from 0 to 10")
        losses[place] = loss
    return losses


def total_loss(layer_formats: Iterable[LayerFormats], losses: LossTable) -> float:
    """Add up the losses of all projections.

    Args:
        layer_formats: layer by layer.
        losses: complete.

    Returns:
        Rise of perplexity, as a fraction.
    """
    return sum(
        losses[layer, role, weight_format]
        for layer, formats in enumerate(layer_formats)
        for role, weight_format in formats.by_role().items()
    )


def cache_loss(cache_dtype: str, measured: Mapping[str, float] | None = None) -> float:
    """Return the loss of a cache dtype.

    Args:
        cache_dtype: fp32, bf16 or int8.
        measured: losses by cache dtype that go before the prior.
    """
    return CACHE_LOSS[cache_dtype] if measured is None else measured.get(cache_dtype, CACHE_LOSS[cache_dtype])
