"""What a training loop of one's own needs around a prepared module: ranges, parameter groups, a teacher's loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from dseek.compress.qat_layers import ADDED, FoldedBatchNorm, QatLayer
from dseek.compress.qat_steps import InputRounding, WeightRounding
from dseek.core.errors import ConfigError


def rounding_layers(module: torch.nn.Module) -> Iterator[tuple[str, QatLayer]]:
    """Go through the prepared layers.

    Args:
        module: of `prepare`.

    Yields:
        Name and layer.

    Raises:
        ConfigError: there is none.
    """
    found = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, QatLayer)]
    if not found:
        raise ConfigError("the module has no rounding layers", remedy="call dseek.compress.qat.prepare on it first")
    yield from found


@torch.no_grad()
def calibrate(
    module: torch.nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[torch.nn.Module, Any], Any] | None = None,
    rule: str | None = None,
) -> None:
    """Set static activation ranges from some batches, which the module computes without rounding.

    Args:
        module: of `prepare`; its mode (training or not) is as before afterwards.
        batches: inputs; a tuple is taken for several arguments, a mapping for named ones. Some hundreds of samples do.
        forward: calls the module with a batch where that is not how.
        rule: max, mean or error; None is what the configuration says (`mean` is LSQ's for learned steps, least squared
            `error` otherwise).

    Raises:
        ConfigError: no layer has static ranges, there is no batch, or one that does not reach every layer.
    """
    if rule not in (None, "max", "mean", "error"):
        raise ConfigError(f"the rule is {rule!r}", needed="max, mean or error")
    layers = [(name, layer) for name, layer in rounding_layers(module) if layer.input_rounding.mode == "static"]
    if not layers:
        raise ConfigError("no layer has a static range", needed='activations="static" in the configuration')
    was_training = {part: part.training for part in module.modules()}
    module.eval()
    observers = [layer.input_rounding for _, layer in layers]
    num_batches = 0
    try:
        for observer in observers:
            observer.observing = True
        with rounding(module, weights=False):
            for batch in batches:
                _call(module, batch, forward)
                num_batches += 1
        if num_batches == 0:
            raise ConfigError("there is no batch to measure ranges with", needed="at least one")
        for name, layer in layers:
            try:
                layer.input_rounding.finish(rule)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error.found}", needed=error.needed, remedy=error.remedy) from error
    finally:
        for observer in observers:
            observer.observing = False
            observer.forget()
        for part, training in was_training.items():
            part.training = training


def _call(module: torch.nn.Module, batch: Any, forward: Callable[[torch.nn.Module, Any], Any] | None) -> Any:
    """Run one batch."""
    if forward is not None:
        return forward(module, batch)
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, (tuple, list)) else module(batch)


@contextmanager
def rounding(module: torch.nn.Module, *, weights: bool = True, inputs: bool = True) -> Iterator[None]:
    """Switch rounding on or off for a while.

    Args:
        module: of `prepare`.
        weights: whether weights round inside the block.
        inputs: whether inputs do.

    Yields:
        Nothing; outside everything is as before.
    """
    parts = [part for part in module.modules() if isinstance(part, (WeightRounding, InputRounding))]
    before = [part.enabled for part in parts]
    for part in parts:
        part.enabled = weights if isinstance(part, WeightRounding) else inputs
    try:
        yield
    finally:
        for part, enabled in zip(parts, before, strict=True):
            part.enabled = enabled


def freeze_ranges(module: torch.nn.Module, *, frozen: bool = True) -> None:
    """Keep the steps of weights and activations as they are, learned or not.

    Args:
        module: of `prepare`.
        frozen: False lets them learn again.
    """
    for _, layer in rounding_layers(module):
        layer.weight_rounding.freeze(frozen, layer.rounded_weight())
        layer.input_rounding.freeze(frozen)


def freeze_batch_norm(module: torch.nn.Module, *, frozen: bool = True) -> None:
    """Keep the statistics of folded batch norms as they are: training then computes what inference will.

    Args:
        module: of `prepare` with batch_norm="batch".
        frozen: False lets them follow the batches again.
    """
    for part in module.modules():
        if isinstance(part, FoldedBatchNorm):
            part.statistics_frozen = frozen


def parameter_groups(
    module: torch.nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    step_learning_rate: float | None = None,
    adaptive: bool = True,
) -> list[dict[str, Any]]:
    """Sort parameters for an optimiser: weights that decay, vectors that do not, learned steps by themselves.

    Steps never decay: a decaying step would shrink its range for no reason. Their gradient is scaled (LSQ) so that with
    plain gradient descent they change as fast as their layer's weights do, relative to their size. Adam and its kin
    divide by the gradient's size, which undoes the scaling and would change a step of 0.001 as fast as a weight of 0.1;
    for them the same balance is made by the rate, so that each step has a group of its own.

    Args:
        module: of `prepare`.
        learning_rate: of everything but the steps.
        weight_decay: of parameters of two or more dimensions.
        step_learning_rate: what takes the place of `learning_rate` for steps; None is the same.
        adaptive: whether the optimiser normalises gradients (Adam, AdamW, Adafactor, RMSprop), or not (SGD).

    Returns:
        Groups in the form that `torch.optim` takes, those of steps last; those without parameters are left out.
    """
    rate = learning_rate if step_learning_rate is None else step_learning_rate
    steps: dict[int, tuple[torch.nn.Parameter, float]] = {}
    for _, layer in rounding_layers(module):
        size = max(float(layer.rounded_weight().detach().abs().mean()), 1e-12)
        for part in (layer.weight_rounding, layer.input_rounding):
            if part.learned:
                step = part.step
                assert isinstance(step, torch.nn.Parameter)
                steps[id(step)] = step, rate * float(step.detach().abs().mean()) / size if adaptive else rate
    others = [parameter for parameter in module.parameters() if id(parameter) not in steps]
    matrices = [parameter for parameter in others if parameter.dim() >= 2]
    vectors = [parameter for parameter in others if parameter.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
    ]
    if adaptive:
        groups += [{"params": [step], "lr": own, "weight_decay": 0.0} for step, own in steps.values()]
    else:
        groups.append({"params": [step for step, _ in steps.values()], "lr": rate, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def plain_state_dict(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return what the module's state would be had it never been prepared; loads with strict=True into a plain one.

    Args:
        module: of `prepare`.
    """
    added = {
        f"{name}.{part}." if name else f"{part}."
        for name, layer in module.named_modules()
        if isinstance(layer, QatLayer)
        for part in ADDED
    }
    return {name: value for name, value in module.state_dict().items() if not name.startswith(tuple(added))}


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
    """Divergence of the student's classes from the teacher's, mean over rows.

    Args:
        student: logits [..., C].
        teacher: logits [..., C] of the wide model; no gradient goes there.
        temperature: softens both. Source: Hinton et al. 2015, section 2: the loss is multiplied by temperature^2 so
            that its gradient keeps its size.
    """
    shape = (-1, student.shape[-1])
    log_student = F.log_softmax(student.reshape(shape).float() / temperature, -1)
    log_teacher = F.log_softmax(teacher.detach().reshape(shape).float() / temperature, -1)
    return F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean") * temperature**2
