"""Linear and convolution layers that round weights and inputs as they compute; the same parameters as before.

A layer keeps its place, its parameters and their names; what is added are the modules `weight_rounding` and
`input_rounding`. A checkpoint of the layer as it was loads with `strict=True`: what it does not know stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dseek.compress.qat_config import QatConfig
from dseek.compress.qat_steps import InputRounding, Rounded, WeightRounding

_LEAST_GAMMA = 1e-6
ADDED = ("weight_rounding", "input_rounding")
"""Names of the modules that a prepared layer has beside those of the plain one."""

Convolution = torch.nn.Conv1d | torch.nn.Conv2d
BatchNorm = torch.nn.BatchNorm1d | torch.nn.BatchNorm2d


def _adopt(new: torch.nn.Module, old: torch.nn.Module) -> None:
    """Take over everything an instance holds: parameters themselves, buffers, hooks, mode."""
    new.__dict__.update(old.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        new.__dict__[name] = dict(old.__dict__[name])


class QatLayer(torch.nn.Module):
    """What prepared layers share; a base class only."""

    weight_rounding: WeightRounding
    input_rounding: InputRounding
    config: QatConfig

    def rounded_weight(self) -> torch.Tensor:
        """Return the weight as it is before rounding, a batch norm folded into it."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Fill in what a checkpoint of the plain layer does not have."""
        for added in ADDED:
            child = getattr(self, added)
            if not any(name.startswith(f"{prefix}{added}.") for name in state_dict):
                own = child.state_dict()
                if getattr(child, "follows", False):
                    own.pop("step", None)  # frozen for other weights than those that are loaded
                state_dict.update({f"{prefix}{added}.{name}": value for name, value in own.items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)


class QatLinear(QatLayer, torch.nn.Linear):
    """`torch.nn.Linear` with rounding.

    Args:
        plain: the layer; its parameters are shared.
        config: how to round.
    """

    def __init__(self, plain: torch.nn.Linear, config: QatConfig) -> None:
        torch.nn.Module.__init__(self)
        _adopt(self, plain)
        self.config = config
        self.weight_rounding = WeightRounding(self.weight, config)
        grouped = config.group_size is not None
        self.input_rounding = InputRounding(config, by_sample=False, grouped=grouped, like=self.weight)
        self.train(plain.training)

    def rounded_weight(self) -> torch.Tensor:
        """Return the weight."""
        return self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply; `x` is [..., K]."""
        inputs, weight = self.input_rounding(x), self.weight_rounding(self.weight)
        step = _product_step(inputs, weight, (-1,))
        product = F.linear(_like(inputs, weight), _like(weight, inputs))
        scaled = product if step is None else product * step
        if self.bias is not None:
            scaled = scaled + self.bias
        return scaled.to(_result_dtype(product, x))


class _QatConvolution(QatLayer, torch.nn.modules.conv._ConvNd):
    """What both convolutions share."""

    batch_norm: FoldedBatchNorm | None

    def __init__(self, plain: Convolution, config: QatConfig, batch_norm: FoldedBatchNorm | None) -> None:
        torch.nn.Module.__init__(self)
        _adopt(self, plain)
        self.config = config
        # Not a child: its parameters have their names at the place where the batch norm is.
        object.__setattr__(self, "batch_norm", batch_norm)
        weight, _ = folded(self, batch_norm)
        self.weight_rounding = WeightRounding(weight, config)
        self.input_rounding = InputRounding(config, by_sample=True, grouped=False, like=self.weight)
        self.train(plain.training)

    def rounded_weight(self) -> torch.Tensor:
        """Return the weight with the batch norm folded into it."""
        return folded(self, self.batch_norm)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve, batch norm included; `x` is [B, C, ...] or [C, ...]."""
        batched = self.weight.dim()
        if x.dim() < batched:
            return self.forward(x[None])[0]
        norm = self.batch_norm
        if norm is not None and norm.uses_batch_statistics:
            return self._by_batch(x, norm)
        weight, bias = folded(self, norm)
        return self._convolve(x, weight, bias)

    def _convolve(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Round and convolve with a weight whose scale is its channels' own."""
        inputs, rounded = self.input_rounding(x), self.weight_rounding(weight)
        channels = (1, -1) + (1,) * (x.dim() - 2)
        step = _product_step(inputs, rounded, channels)
        product = self._conv_forward(_like(inputs, rounded), _like(rounded, inputs), None)
        scaled = product if step is None else product * step
        if bias is not None:
            scaled = scaled + bias.view(channels)
        return scaled.to(_result_dtype(product, x))

    def _by_batch(self, x: torch.Tensor, norm: FoldedBatchNorm) -> torch.Tensor:
        """Fold the running statistics into what is rounded, and normalise by those of the batch."""
        factor = norm.factor()
        factor = torch.where(factor.abs() < _LEAST_GAMMA, torch.full_like(factor, _LEAST_GAMMA), factor)
        channels = (1, -1) + (1,) * (x.dim() - 2)
        product = self._convolve(x, self.weight * factor.view(-1, *(1,) * (self.weight.dim() - 1)), None)
        product = product / factor.view(channels)
        if self.bias is not None:
            product = product + self.bias.view(channels)
        return norm.normalise(product)


class QatConv1d(_QatConvolution, torch.nn.Conv1d):
    """`torch.nn.Conv1d` with rounding.

    Args:
        plain: the layer; its parameters are shared.
        config: how to round.
        batch_norm: what follows it and is folded into it, or None.
    """


class QatConv2d(_QatConvolution, torch.nn.Conv2d):
    """`torch.nn.Conv2d` with rounding.

    Args:
        plain: the layer; its parameters are shared.
        config: how to round.
        batch_norm: what follows it and is folded into it, or None.
    """


class FoldedBatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """A batch norm whose work the convolution before it does; keeps parameters and statistics where they were.

    A base class of `FoldedBatchNorm1d` and `FoldedBatchNorm2d`.

    Args:
        plain: the batch norm; its parameters and buffers are shared.
        config: whether the statistics are frozen.
    """

    statistics_frozen: bool

    def __init__(self, plain: BatchNorm, config: QatConfig) -> None:
        torch.nn.Module.__init__(self)
        _adopt(self, plain)
        self.statistics_frozen = config.batch_norm == "frozen"

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether a forward pass normalises by its own batch."""
        return self.training and not self.statistics_frozen

    def factor(self) -> torch.Tensor:
        """Return gamma / sqrt(running variance + epsilon), [N]."""
        assert self.running_var is not None  # `prepare` folds no other
        inverse = torch.rsqrt(self.running_var + self.eps)
        return self.weight * inverse if self.affine else inverse

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `x` [B, N, ...] by its own statistics and move the running ones."""
        normalised: torch.Tensor = super().forward(x)
        return normalised

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`, which is normalised already."""
        return x


class FoldedBatchNorm1d(FoldedBatchNorm, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, folded; see `FoldedBatchNorm`."""


class FoldedBatchNorm2d(FoldedBatchNorm, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, folded; see `FoldedBatchNorm`."""


def folded(
    layer: torch.nn.modules.conv._ConvNd, norm: FoldedBatchNorm | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fold a batch norm into the convolution before it.

    Args:
        layer: the convolution.
        norm: what follows it, or None.

    Returns:
        Weight w gamma / sigma and bias (b - mu) gamma / sigma + beta, with running statistics. Source: Jacob et al.
        2018, section 3.2, equation 14; that training may normalise by the batch while the running statistics are what
        is folded and rounded: Krishnamoorthi 2018, section 3.2.2.
    """
    weight, bias = layer.weight, layer.bias
    if norm is None:
        return weight, bias
    assert norm.running_mean is not None
    factor = norm.factor()
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    shift = shift * factor
    if norm.affine:
        shift = shift + norm.bias
    return weight * factor.view(-1, *(1,) * (weight.dim() - 1)), shift


def _product_step(inputs: Rounded, weight: Rounded, channels: tuple[int, ...]) -> torch.Tensor | None:
    """Step of the product, or None where neither side has one; `channels` is the shape of the weight's there."""
    if weight.step is None:
        return inputs.step
    by_channel = weight.step.reshape(channels)
    return by_channel if inputs.step is None else inputs.step * by_channel


def _like(one: Rounded, other: Rounded) -> torch.Tensor:
    """Values in the wider dtype of both."""
    return one.values.to(torch.promote_types(one.values.dtype, other.values.dtype))


def _result_dtype(product: torch.Tensor, x: torch.Tensor) -> torch.dtype:
    """What the plain layer would give: autocast's dtype, or the input's."""
    return product.dtype if torch.is_autocast_enabled(x.device.type) else x.dtype
