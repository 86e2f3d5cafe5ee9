"""AdamW whose two moments take one byte each: blocks of values, each with its own scale.

A block of 256 values keeps its largest magnitude in float32 and each value as an 8-bit code of its share of that,
spaced by a power law: a code c stands for (c / 127)^2 with its sign in the first moment, for (c / 255)^4 in the second.
So small values keep a relative precision, as in the tables of Dettmers et al., but without a table: a root and a
rounding are elementwise, which on a processor is quicker than looking up 256 entries. A second moment that is not zero
never becomes zero, since it is divided by. Parameters below 4,096 values keep float32.

Why not torchao's: it looks its codes up in tables and has to be compiled first;
this one also keeps its state in tensors of plain types, which safetensors holds.

Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, section 2; Loshchilov and Hutter 2019,
Decoupled Weight Decay Regularization, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dseek.train.shards import local

BLOCK = 256
"""Values that share a scale."""
LEAST_NUMEL = 4096
"""Smaller parameters keep their moments in float32."""
CHUNK = 1 << 20
"""Values whose moments are wide at a time."""


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit moments.

    Args:
        params: parameters, or groups of them with `weight_decay`.
        lr: step size.
        betas: shares of the two moments that a step keeps.
        eps: added to the root of the second moment.
        weight_decay: share of the weight, times `lr`, that a step takes away.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: computes the loss again; None where it is not wanted.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        learned = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, _ in learned:  # all at once: among the temporaries of an update they would tear memory into bits
            if not self.state[parameter]:
                self.state[parameter] = {"step": torch.zeros(()), **_new_moments(local(parameter).view(-1))}
        for parameter, group in learned:
            self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        values = local(parameter).view(-1)
        assert parameter.grad is not None
        gradient = local(parameter.grad).reshape(-1)
        state = self.state[parameter]
        state["step"] += 1
        (beta1, beta2), step = group["betas"], float(state["step"])
        rate = group["lr"] / (1.0 - beta1**step)
        root = (1.0 - beta2**step) ** 0.5
        for first in range(0, len(values), CHUNK):
            part = slice(first, min(first + CHUNK, len(values)))
            blocks = slice(first // BLOCK, -(-part.stop // BLOCK))
            grad = gradient[part].float()
            mean = _widened(state, "exp_avg", part, blocks, 2).lerp_(grad, 1.0 - beta1)
            square = _widened(state, "exp_avg_sq", part, blocks, 4).mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
            values[part].mul_(1.0 - group["lr"] * group["weight_decay"])
            values[part].addcdiv_(mean, square.sqrt().div_(root).add_(group["eps"]), value=-rate)
            _narrow(state, "exp_avg", mean, part, blocks, 2)
            _narrow(state, "exp_avg_sq", square, part, blocks, 4)


def _new_moments(values: torch.Tensor) -> dict[str, torch.Tensor]:
    if len(values) < LEAST_NUMEL:
        return {"exp_avg": values.new_zeros(len(values)).float(), "exp_avg_sq": values.new_zeros(len(values)).float()}
    num_blocks = -(-len(values) // BLOCK)
    scale = torch.zeros(num_blocks, device=values.device)
    return {
        "exp_avg": torch.zeros(len(values), dtype=torch.int8, device=values.device),
        "exp_avg_scale": scale,
        "exp_avg_sq": torch.zeros(len(values), dtype=torch.uint8, device=values.device),
        "exp_avg_sq_scale": scale.clone(),
    }


def moment_sizes(num_values: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Tell what the moments of so many values are, to hold what was read from a file against it.

    Args:
        num_values: of a parameter, or of this rank's part of it.

    Returns:
        Shape and dtype of each tensor but the step.
    """
    moments = _new_moments(torch.empty(num_values, device="meta"))
    return {key: (tuple(value.shape), value.dtype) for key, value in moments.items()}


def _widened(state: dict[str, Any], name: str, part: slice, blocks: slice, power: int) -> torch.Tensor:
    """Moments of a chunk in float32; those that are kept so are handed out themselves."""
    codes = state[name][part]
    if codes.dtype == torch.float32:
        wide: torch.Tensor = codes
        return wide
    signed = codes.dtype == torch.int8
    share = codes.float().div_(127.0 if signed else 255.0)
    magnitude = share.abs() if signed else share
    wide = share.mul_(magnitude) if power == 2 else share.square_().square_()
    return wide.mul_(state[f"{name}_scale"][blocks].repeat_interleave(BLOCK)[: len(wide)])


def _narrow(state: dict[str, Any], name: str, wide: torch.Tensor, part: slice, blocks: slice, power: int) -> None:
    codes = state[name][part]
    if codes.dtype == torch.float32:
        return  # updated where it lies
    padded = torch.nn.functional.pad(wide, (0, -len(wide) % BLOCK)).view(-1, BLOCK)
    scale = padded.abs().amax(dim=1)
    state[f"{name}_scale"][blocks] = scale
    share = padded.div_(scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).view(-1)[: len(wide)]
    if power == 2:
        codes.copy_(share.abs().sqrt_().mul_(127.0).copysign_(share).round_())
    else:
        positive = share > 0
        codes.copy_(share.sqrt_().sqrt_().mul_(255.0).round_().clamp_(min=positive))
