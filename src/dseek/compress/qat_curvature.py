"""`update_deltas`: how strongly EWGS scales gradients, from the curvature of the loss.

The second derivative is probed with Hutchinson's estimator, which needs the graph of the gradient: twice the memory and
some times the work of a step, for one batch. Operators without a second derivative (fused attention) cannot be probed;
then the fixed delta of the configuration stays.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dseek.compress.qat_steps import InputRounding, WeightRounding
from dseek.compress.qat_training import rounding_layers
from dseek.core.errors import ConfigError

MOST_DELTA = 2.0
"""Beyond it a gradient would change its sign."""


def update_deltas(
    module: torch.nn.Module, loss: Callable[[], torch.Tensor], *, num_probes: int = 4, seed: int = 0
) -> dict[str, float]:
    """Set every layer's delta from the mean second derivative of the loss by its integers.

    Args:
        module: of `prepare` with an `ewgs` estimator, in training.
        loss: runs the module on a batch and gives the scalar loss.
        num_probes: random directions.
        seed: of the directions.

    Returns:
        The deltas by the name of the rounding module, from 0 to 2. By integers, not by values: a curvature that is
        negative in the mean gives 0.

    Raises:
        ConfigError: no layer scales gradients, or the graph has no second derivative.

    Source:
        Lee et al. 2021, EWGS, section 3.2: delta = (Tr(H) / N) / G with Hutchinson's Tr(H) = E[v^T H v] over random
        signs v, and G three standard deviations of the gradient.
    """
    parts: list[tuple[str, WeightRounding | InputRounding]] = []
    for name, layer in rounding_layers(module):
        for suffix, part in (("weight_rounding", layer.weight_rounding), ("input_rounding", layer.input_rounding)):
            if part.delta is not None:
                parts.append((f"{name}.{suffix}" if name else suffix, part))
    if not parts:
        raise ConfigError("no layer scales gradients", needed='an estimator "ewgs" or "lsq+ewgs"')
    try:
        for _, part in parts:
            part.recorded = []
        value = loss()
        # A layer that is called twice has two; one that rounds nothing (or whose inputs need no gradient) has none.
        found = [
            (name, part, integers) for name, part in parts for integers in part.recorded or () if integers.requires_grad
        ]
        traces, gradients = _probe(value, [integers for *_, integers in found], num_probes, seed)
    finally:
        for _, part in parts:
            part.recorded = None
    deltas: dict[str, list[float]] = {}
    for (name, _, integers), trace, gradient in zip(found, traces, gradients, strict=True):
        spread = float(3 * gradient.std())
        curvature = trace / integers.numel()
        delta = min(MOST_DELTA, max(0.0, curvature / spread)) if spread > 0 else 0.0
        deltas.setdefault(name, []).append(delta)
    means = {name: sum(values) / len(values) for name, values in deltas.items()}
    for name, part in parts:
        if name in means and part.delta is not None:
            part.delta.fill_(means[name])
    return means


def _probe(
    value: torch.Tensor, tensors: list[torch.Tensor], num_probes: int, seed: int
) -> tuple[list[float], list[torch.Tensor]]:
    """Traces of the blocks of the Hessian, and gradients."""
    generator = torch.Generator().manual_seed(seed)
    try:
        gradients = torch.autograd.grad(value, tensors, create_graph=True)
        traces = [0.0] * len(tensors)
        for _ in range(num_probes):
            signs = [(torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1).to(tensor) for tensor in tensors]
            along = torch.stack([(g * v).sum() for g, v in zip(gradients, signs, strict=True)]).sum()
            curved = torch.autograd.grad(along, tensors, retain_graph=True, materialize_grads=True)
            for index, (v, hv) in enumerate(zip(signs, curved, strict=True)):
                traces[index] += float((v * hv).sum().detach()) / num_probes
    except RuntimeError as error:
        raise ConfigError(
            f"the curvature cannot be probed: {error}",
            needed="a loss whose operators have second derivatives",
            remedy="keep the fixed ewgs_delta, or compute attention without a fused kernel for this call",
        ) from error
    return traces, [gradient.detach() for gradient in gradients]
