"""`QatConfig`: what is rounded during training, to how many bits, and by which gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dseek.core.errors import ConfigError

Estimator = Literal["ste", "lsq", "ewgs", "lsq+ewgs"]
Activations = Literal["dynamic", "static", "none"]
StepRule = Literal["max", "span", "mean", "error"]
BatchNorm = Literal["frozen", "batch"]

GROUP_SIZES = (32, 64, 128)
"""Inputs that may share a scale: multiples of the 32 that the kernels have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QatConfig:
    """How `prepare` makes a module's layers round."""

    weight_bits: int = 8
    """Bits of weights, 2 to 8; one scale an output channel, unless `group_size` says otherwise."""
    group_size: int | None = None
    """Inputs of a linear layer that share a scale: 32, 64 or 128. Convolutions keep one scale a channel."""
    symmetric: bool = True
    """Of groups only: whether zero is a level, or a group runs from its least to its largest value."""
    activations: Activations = "dynamic"
    """How the inputs of a layer are rounded. `dynamic`: by the largest magnitude of each token (linear layers), of each
    sample (convolutions), or of each 32 inputs (groups). `static`: by one step, set by `calibrate` and learned where
    the estimator learns steps. `none`: not at all while training; integers run on integers, so such layers are wide."""
    activation_bits: int = 8
    """Bits of inputs, 2 to 8."""
    estimator: Estimator = "ste"
    """How gradients pass the rounding (`dseek.compress.qat_rounding`): `ste` as if it were not there, `lsq` the same
    with learned steps, `ewgs` scaled by each element's rounding error, or `lsq+ewgs`."""
    step_rule: StepRule | None = None
    """Where the steps of weights come from. `max`: the largest magnitude over the largest integer, of every forward
    pass anew unless steps are learned. `span`: the same over half the range, (2^bits - 1) / 2, as torchao has it.
    `mean`: 2 mean |w| / sqrt(largest integer). `error`: the least squared error. Left out: `max`, and `mean` where
    steps are learned, as in the paper."""
    ewgs_delta: float = 0.1
    """Strength of the element-wise scaling before `update_deltas` has measured one, in units of the step."""
    batch_norm: BatchNorm = "frozen"
    """Batch norm behind a convolution is folded into its weight before rounding. `frozen`: with the running statistics,
    which stay as they are. `batch`: normalised by each batch, and the running statistics follow, until
    `freeze_batch_norm`."""
    fold: tuple[tuple[str, str], ...] = ()
    """Pairs of names, convolution and batch norm, to fold beside those that are found."""
    ignore: tuple[str, ...] = ()
    """Names of layers to leave as they are; `*` and `?` as in a shell."""
    overrides: Mapping[str, QatConfig] = field(default_factory=dict)
    """Other settings for layers whose names match; the first match counts."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: one that cannot be, or two that cannot be together.
        """
        for what, bits in (("weights", self.weight_bits), ("activations", self.activation_bits)):
            if not isinstance(bits, int) or not 2 <= bits <= 8:
                raise ConfigError(f"{bits} bits for {what}", needed="2 to 8")
        choices = (
            ("activations", self.activations, ("dynamic", "static", "none")),
            ("estimator", self.estimator, ("ste", "lsq", "ewgs", "lsq+ewgs")),
            ("step_rule", self.step_rule, (None, "max", "span", "mean", "error")),
            ("batch_norm", self.batch_norm, ("frozen", "batch")),
        )
        for name, value, known in choices:
            if value not in known:
                raise ConfigError(f"{name} is {value!r}", needed="one of " + ", ".join(map(str, known)))
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ConfigError(f"group_size is {self.group_size}", needed="one of 32, 64, 128, or None")
        if self.group_size is not None and self.weight_bits not in (4, 8):
            raise ConfigError(f"groups of {self.weight_bits}-bit weights", needed="4 or 8 bits, which the kernels have")
        if self.group_size is not None and (self.activations == "static" or self.activation_bits != 8):
            raise ConfigError(
                "groups of weights with activations other than dynamic ones of 8 bits",
                needed='activations "dynamic" (or "none") and activation_bits 8, as the kernels compute groups',
            )
        if not self.symmetric and (self.group_size is None or self.weight_bits != 4 or self.learns_steps):
            raise ConfigError(
                "weights that are not symmetric",
                needed="4-bit groups, and an estimator that does not learn steps",
                remedy='set group_size, weight_bits=4 and estimator "ste" or "ewgs", or leave symmetric=True',
            )
        if not 0.0 <= self.ewgs_delta <= 2.0:
            raise ConfigError(f"ewgs_delta is {self.ewgs_delta}", needed="0 to 2, so that no gradient turns round")
        if any(config.overrides or config.ignore or config.fold for config in self.overrides.values()):
            raise ConfigError("an override has overrides, ignored names or folds itself", needed="one level of them")

    @property
    def learns_steps(self) -> bool:
        """Whether steps are parameters."""
        return self.estimator.startswith("lsq")

    @property
    def scales_gradients(self) -> bool:
        """Whether gradients are scaled by the rounding error."""
        return self.estimator.endswith("ewgs")

    @property
    def rule(self) -> StepRule:
        """Where steps of weights come from, the default filled in."""
        return self.step_rule or ("mean" if self.learns_steps else "max")
