"""The modules inside a prepared layer that round its weight and its inputs, with the steps that they learn or keep.

`Rounded` is integers and a step apart, so that a layer multiplies integers and then steps, as the kernels do. Under
autocast the integers are exact in bfloat16 (eight bits of significand), which a rounded weight in float would not be.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dseek.compress import qat_rounding
from dseek.compress.qat_config import QatConfig
from dseek.core.errors import ConfigError

GROUP = 32
"""Inputs that share a scale where activations are rounded by groups, as the kernels do it."""

MOST_ROWS_IN_GROUPS = 8
"""Up to here the kernels round the inputs of grouped weights to int8; more rows are computed in bfloat16."""

_SAMPLE_VALUES = 1 << 16
_SAMPLE_OF_BATCH = 1 << 13


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32, or float64 if it is.

    Args:
        x: of any floating dtype.
    """
    return x if x.dtype == torch.float64 else x.float()


class Rounded(NamedTuple):
    """What is multiplied, and the step it is multiplied by afterwards (None: it is in `values` already)."""

    values: torch.Tensor
    step: torch.Tensor | None


class WeightRounding(torch.nn.Module):
    """Rounds a weight, by channel or by group.

    Args:
        weight: as it is rounded (batch norm folded), [N, K] or [N, C, ...].
        config: of the layer; `group_size` counts for two dimensions only.
    """

    step: torch.Tensor | None
    delta: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, config: QatConfig) -> None:
        super().__init__()
        self.group_size = config.group_size if weight.dim() == 2 else None
        self.bits = config.weight_bits
        self.symmetric = config.symmetric or self.group_size is None
        self.low, self.high = qat_rounding.integer_range(self.bits)
        self.learned = config.learns_steps
        self.rule = config.rule
        if self.rule == "span":
            self.low = -self.high - 1  # of weights the kernels take -128, too
        self.follows = self.rule in ("max", "span") and not self.learned
        self.enabled = True
        self.frozen = False
        blocks = self._blocks(wide(weight.detach()))
        step = None if self.follows else self._steps(blocks)
        if step is not None and self.learned:
            self.step = torch.nn.Parameter(step)
        else:
            self.register_buffer("step", step)
        delta = torch.tensor(config.ewgs_delta, device=weight.device) if config.scales_gradients else None
        self.register_buffer("delta", delta)
        self.recorded: list[torch.Tensor] | None = None
        self.elements_of_step = blocks[0, 0].numel() if self.group_size else blocks[0].numel()

    def _blocks(self, weight: torch.Tensor) -> torch.Tensor:
        """Lay out groups as [N, G, group]; a short last group is filled with zeros. Channels stay as they are."""
        if self.group_size is None:
            return weight
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % self.group_size))
        return padded.unflatten(1, (-1, self.group_size))

    def _steps(self, blocks: torch.Tensor) -> torch.Tensor:
        """Find steps by the rule."""
        dims = (2,) if self.group_size else tuple(range(1, blocks.dim()))
        if self.rule == "max":
            return qat_rounding.step_by_max(blocks, dims, self.high)
        if self.rule == "span":
            return qat_rounding.step_by_max(blocks, dims, (self.high - self.low) / 2)
        if self.rule == "mean":
            return qat_rounding.step_by_mean(blocks, dims, self.high)
        return qat_rounding.step_by_error(blocks, dims, self.low, self.high)

    def freeze(self, frozen: bool, weight: torch.Tensor) -> None:
        """Keep steps as they are for `weight`, or, where `frozen` is False, let them learn or follow it again."""
        self.frozen = frozen
        if self.follows:
            self.step = self._steps(self._blocks(wide(weight.detach()))) if frozen else None

    def current_step(self, blocks: torch.Tensor) -> torch.Tensor:
        """Return the step that `blocks` are rounded by now, above zero, and for groups as float16 holds it."""
        if self.step is None:
            step = self._steps(blocks)
        else:
            step = self.step.detach() if self.frozen else self.step
            if self.learned and not self.frozen:
                step = qat_rounding.scale_gradient(
                    step, qat_rounding.step_gradient_factor(self.elements_of_step, self.high)
                )
            step = step.abs().clamp_min(qat_rounding.LEAST_STEP)
        return _as_half(step) if self.group_size else step

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take steps that were frozen when the state was made, and be as frozen as it was."""
        if self.follows:
            kept = state_dict.get(f"{prefix}step")
            self.frozen = kept is not None
            self.step = None if kept is None else torch.empty_like(kept)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def integers(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Round, keeping integers, steps and minima apart.

        Args:
            weight: as it is rounded.

        Returns:
            Integers [N, K] or [N, C, ...], of groups [N, G, group]; steps that broadcast to them; and the least value
            of each group [N, G, 1] where groups are not symmetric, else None.
        """
        blocks = self._blocks(wide(weight))
        if not self.symmetric:
            step, minimum = _step_and_minimum(blocks.detach())
            integers = qat_rounding.round_to_steps(blocks - minimum, step, 0, 15, self.delta)
        else:
            minimum = None
            step = self.current_step(blocks)
            integers = qat_rounding.round_to_steps(blocks, step, self.low, self.high, self.delta)
        if self.recorded is not None:
            self.recorded.append(integers)
        return integers, step, minimum

    def forward(self, weight: torch.Tensor) -> Rounded:
        """Round `weight`: integers [N, ...] and steps [N, 1, ...] of channels, or the rounded weight of groups."""
        if not self.enabled:
            return Rounded(weight, None)
        integers, step, minimum = self.integers(weight)
        if self.group_size is None:
            return Rounded(integers, step)
        rounded = integers * step if minimum is None else integers * step + minimum
        return Rounded(rounded.flatten(1)[:, : weight.shape[1]], None)


def _step_and_minimum(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and least value of groups whose zero is a level but not in the middle, both as float16 holds them."""
    least, largest = blocks.amin(-1, keepdim=True).clamp_max(0), blocks.amax(-1, keepdim=True).clamp_min(0)
    step = ((largest - least) / 15).half().float().clamp_min(2.0**-24)
    levels_below = (-least / step).round().clamp(0, 15)
    return step, (-levels_below * step).half().float()


def _as_half(step: torch.Tensor) -> torch.Tensor:
    """Round steps to float16, in which the kernels keep them, letting the gradient pass."""
    rounded = step.detach().half().float().clamp_min(2.0**-24)
    return step + (rounded - step).detach()


class InputRounding(torch.nn.Module):
    """Rounds what goes into a layer.

    Args:
        config: of the layer.
        by_sample: whether one step is for a whole sample (convolutions), not for a token.
        grouped: whether the layer's weight has groups, so that inputs are rounded by groups as well.
        like: a tensor on the device of the layer.
    """

    step: torch.Tensor
    delta: torch.Tensor | None
    unsigned: torch.Tensor
    ready: torch.Tensor

    def __init__(self, config: QatConfig, *, by_sample: bool, grouped: bool, like: torch.Tensor) -> None:
        super().__init__()
        self.mode = config.activations
        self.bits = config.activation_bits
        self.by_sample = by_sample
        self.grouped = grouped
        self.learned = config.learns_steps and self.mode == "static"
        self.rule = config.rule if self.learned and config.rule != "span" else "error"
        self.enabled = True
        self.frozen = False
        self.observing = False
        self.recorded: list[torch.Tensor] | None = None
        self._seen: list[torch.Tensor] = []
        if self.mode == "static":
            step = torch.ones((), device=like.device)
            if self.learned:
                self.step = torch.nn.Parameter(step)
            else:
                self.register_buffer("step", step)
            self.register_buffer("unsigned", torch.tensor(False, device=like.device))
            self.register_buffer("ready", torch.tensor(False, device=like.device))
        delta = torch.tensor(config.ewgs_delta, device=like.device) if config.scales_gradients else None
        self.register_buffer("delta", delta)

    @property
    def range(self) -> tuple[int, int]:
        """Least and largest integer."""
        return qat_rounding.integer_range(self.bits, unsigned=self.mode == "static" and bool(self.unsigned))

    def freeze(self, frozen: bool) -> None:
        """Keep the step as it is, or, where `frozen` is False, let it learn."""
        self.frozen = frozen

    def forget(self) -> None:
        """Drop what was observed."""
        self._seen = []

    def observe(self, x: torch.Tensor) -> None:
        """Keep some values of `x` for `finish`."""
        values = wide(x.detach()).flatten()
        stride = max(1, len(values) // _SAMPLE_OF_BATCH)
        # The extremes go along, so that nothing that was seen is outside the range that the rule `max` gives.
        self._seen.append(torch.cat([values[::stride][:_SAMPLE_OF_BATCH], values.amin()[None], values.amax()[None]]))

    @torch.no_grad()
    def finish(self, rule: str | None = None) -> None:
        """Set the step from what was observed, by `rule` (max, mean or error; None is the configuration's).

        Raises:
            ConfigError: nothing was observed, or what was is not finite.
        """
        if not self._seen:
            raise ConfigError(
                "a layer saw no input while ranges were measured",
                needed="batches that reach every prepared layer",
                remedy="name the layer in `ignore`, or calibrate with inputs that use it",
            )
        values = torch.cat(self._seen)
        self._seen = []
        if not values.isfinite().all():
            raise ConfigError(
                "a layer's inputs are not finite", needed="finite activations", remedy="check the batches"
            )
        extremes = torch.stack([values.amin(), values.amax()])
        values = torch.cat([values[:: max(1, len(values) // _SAMPLE_VALUES)], extremes])
        self.unsigned.fill_(bool(extremes[0] >= 0))
        low, high = self.range
        rule = rule or self.rule
        if rule == "max":
            step = qat_rounding.step_by_max(values, (0,), high)
        elif rule == "mean":
            step = qat_rounding.step_by_mean(values, (0,), high)
        else:
            step = qat_rounding.step_by_error(values, (0,), low, high)
        self.step.copy_(step.reshape(()))
        self.ready.fill_(True)

    def current_step(self, elements_of_sample: int) -> torch.Tensor:
        """Return the static step, with LSQ's gradient for so many `elements_of_sample`."""
        step = self.step
        if self.learned and not self.frozen:
            step = qat_rounding.scale_gradient(
                step, qat_rounding.step_gradient_factor(elements_of_sample, self.range[1])
            )
        elif self.frozen:
            step = step.detach()
        return step.abs().clamp_min(qat_rounding.LEAST_STEP)

    def forward(self, x: torch.Tensor) -> Rounded:
        """Round `x`: integers in its shape and a step that broadcasts to the layer's output.

        Raises:
            ConfigError: a static step is asked for that was never measured.
        """
        if self.observing:
            self.observe(x)
        if not self.enabled or self.observing or self.mode == "none":
            return Rounded(x, None)
        x_wide = wide(x)
        if self.mode == "static":
            if not self.ready:
                if not self.training:
                    raise ConfigError(
                        "a static range was never measured",
                        needed="`calibrate` before the module is evaluated",
                        remedy="call dseek.compress.qat.calibrate(module, batches)",
                    )
                self.observe(x)
                self.finish()
            step = self.current_step(x_wide[0].numel())
            return Rounded(self._round(x_wide, step, *self.range), step)
        if self.grouped:
            return Rounded(self._by_groups(x_wide).to(x.dtype), None)
        low, high = self.range
        dims = tuple(range(1, x.dim())) if self.by_sample else (-1,)
        step = dynamic_step(x_wide, dims, high)
        return Rounded(self._round(x_wide, step, low, high), step)

    def _round(self, x: torch.Tensor, step: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Round to integers, which are kept where somebody asked for them."""
        integers = qat_rounding.round_to_steps(x, step, low, high, self.delta)
        if self.recorded is not None:
            self.recorded.append(integers)
        return integers

    def _by_groups(self, x: torch.Tensor) -> torch.Tensor:
        """Round by groups of 32 while training; afterwards as the kernels do, which depends on the number of rows."""
        num_rows = x.numel() // max(1, x.shape[-1])
        if not self.training and num_rows > MOST_ROWS_IN_GROUPS:
            return x + (x.detach().bfloat16().float() - x.detach())
        groups = torch.nn.functional.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
        low, high = self.range
        step = dynamic_step(groups, (-1,), high)
        rounded = self._round(groups, step, low, high) * step
        return rounded.flatten(-2)[..., : x.shape[-1]]


def dynamic_step(x: torch.Tensor, dims: tuple[int, ...], high: int) -> torch.Tensor:
    """Step of a token, sample or group by its largest magnitude; no gradient.

    Args:
        x: float32.
        dims: that share a step; kept with size one.
        high: the largest integer.
    """
    return (x.detach().abs().amax(dims, keepdim=True) / high).clamp_min(torch.finfo(torch.float32).tiny)
