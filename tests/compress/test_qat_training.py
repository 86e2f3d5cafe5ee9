"""What a training loop calls: ranges, parameter groups, freezing, curvature, a teacher; and that training helps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dseek.compress import qat
from dseek.core.errors import ConfigError


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def small(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5))


def test_ranges_come_from_the_batches() -> None:
    x = draw(64, 20)
    plain = small()
    prepared = qat.prepare(copy.deepcopy(plain), qat.QatConfig(activations="static"))
    prepared.train()
    qat.calibrate(prepared, [x[:32], (x[32:],)], rule="max")
    assert prepared.training and prepared[0].training
    hidden = plain[:2](x)
    torch.testing.assert_close(prepared[0].input_rounding.step, x.abs().max() / 127)
    torch.testing.assert_close(prepared[2].input_rounding.step, hidden.max() / 254)  # never negative: unsigned
    assert not prepared[0].input_rounding.unsigned and prepared[2].input_rounding.unsigned
    qat.calibrate(prepared, [x])
    assert 0 < prepared[0].input_rounding.step <= x.abs().max() / 127
    qat.calibrate(prepared, [{"rows": x}], forward=lambda module, batch: module(batch["rows"]))
    for batches, message in (([], "no batch"), ([x * float("nan")], "0: .*not finite")):
        with pytest.raises(ConfigError, match=message):
            qat.calibrate(prepared, batches)
    with pytest.raises(ConfigError, match="static"):
        qat.calibrate(qat.prepare(small()), [x])
    with pytest.raises(ConfigError, match="rule"):
        qat.calibrate(prepared, [x], rule="guess")
    with pytest.raises(ConfigError, match="prepare"):
        qat.calibrate(small(), [x])


def test_a_layer_that_no_batch_reaches_is_named() -> None:
    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    prepared = qat.prepare(Half(), qat.QatConfig(activations="static"))
    with pytest.raises(ConfigError, match="idle: a layer saw no input"):
        qat.calibrate(prepared, [draw(3, 4)])


def test_the_first_batch_of_training_sets_ranges_that_nobody_measured() -> None:
    prepared = qat.prepare(small(), qat.QatConfig(activations="static", estimator="lsq"))
    prepared.train()
    prepared(draw(16, 20))
    assert prepared[2].input_rounding.ready
    prepared.eval()(draw(1, 20))


def test_parameter_groups() -> None:
    prepared = qat.prepare(small(), qat.QatConfig(activations="static", estimator="lsq"))
    qat.calibrate(prepared, [draw(32, 20)])
    groups = qat.parameter_groups(
        prepared, learning_rate=0.1, weight_decay=0.5, step_learning_rate=0.01, adaptive=False
    )
    matrices, vectors, steps = groups
    assert [parameter.dim() for parameter in matrices["params"]] == [2, 2] and matrices["weight_decay"] == 0.5
    assert [parameter.dim() for parameter in vectors["params"]] == [1, 1] and vectors["weight_decay"] == 0
    assert len(steps["params"]) == 4 and steps["lr"] == 0.01 and steps["weight_decay"] == 0
    assert sum(len(group["params"]) for group in groups) == len(list(prepared.parameters()))
    assert len(qat.parameter_groups(qat.prepare(small()), learning_rate=0.1)) == 2
    torch.optim.SGD(groups)


def test_adaptive_optimisers_move_steps_as_fast_as_weights() -> None:
    """Relative to their size: one update of Adam changes both by the rate over the mean weight."""
    prepared = qat.prepare(small(), qat.QatConfig(activations="static", estimator="lsq"))
    qat.calibrate(prepared, [draw(32, 20)])
    groups = qat.parameter_groups(prepared, learning_rate=1e-4)
    assert len(groups) == 6 and all(len(group["params"]) == 1 for group in groups[2:])
    optimizer = torch.optim.Adam(groups)
    before = {name: value.detach().clone() for name, value in prepared.named_parameters()}
    F.cross_entropy(prepared.train()(draw(64, 20)), torch.arange(64) % 5).backward()
    optimizer.step()
    relative = 1e-4 / before["0.weight"].abs().mean()
    for name in ("0.weight", "0.weight_rounding.step", "0.input_rounding.step"):
        change = (dict(prepared.named_parameters())[name] - before[name]).abs().max() / before[name].abs().mean()
        torch.testing.assert_close(change, relative, rtol=0.02, atol=0)


def test_frozen_ranges_stay() -> None:
    prepared = qat.prepare(small(), qat.QatConfig(activations="static", estimator="lsq"))
    qat.calibrate(prepared, [draw(32, 20)])
    prepared.train()

    def steps_with_gradient() -> int:
        prepared.zero_grad()
        prepared(draw(8, 20)).square().sum().backward()
        named = prepared.named_parameters()
        return sum(parameter.grad is not None for name, parameter in named if name.endswith("rounding.step"))

    assert steps_with_gradient() == 4
    before = prepared(draw(8, 20))
    qat.freeze_ranges(prepared)
    assert steps_with_gradient() == 0
    torch.testing.assert_close(prepared(draw(8, 20)), before, rtol=0, atol=0)
    qat.freeze_ranges(prepared, frozen=False)
    assert steps_with_gradient() == 4


def test_ranges_by_maximum_can_be_frozen_too() -> None:
    prepared = qat.prepare(small())
    step = prepared[0].weight_rounding.current_step(prepared[0].weight)
    qat.freeze_ranges(prepared)
    prepared[0].weight.data *= 2
    torch.testing.assert_close(prepared[0].weight_rounding.current_step(prepared[0].weight), step)
    resumed = qat.prepare(small(seed=1))
    resumed.load_state_dict(prepared.state_dict(), strict=True)
    torch.testing.assert_close(resumed(draw(3, 20)), prepared(draw(3, 20)), rtol=0, atol=0)
    qat.freeze_ranges(prepared, frozen=False)
    torch.testing.assert_close(prepared[0].weight_rounding.current_step(prepared[0].weight), 2 * step)
    resumed.load_state_dict(prepared.state_dict(), strict=True)
    torch.testing.assert_close(resumed(draw(3, 20)), prepared(draw(3, 20)), rtol=0, atol=0)


def test_distillation_is_the_divergence() -> None:
    student, teacher = draw(2, 3, 7).requires_grad_(), draw(2, 3, 7, seed=1).requires_grad_()
    loss = qat.distillation_loss(student, teacher, temperature=2.0)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    torch.testing.assert_close(loss, 4 * (p * (p / q).log()).sum(-1).mean())
    loss.backward()
    assert teacher.grad is None and student.grad is not None
    assert qat.distillation_loss(teacher, teacher) == 0


def test_deltas_are_the_curvature_over_the_gradient() -> None:
    """Of a quadratic loss of one layer's output the second derivatives are known."""
    torch.manual_seed(0)
    prepared = qat.prepare(torch.nn.Linear(6, 4, bias=False), qat.QatConfig(estimator="ewgs", activations="none"))
    x, target = draw(10, 6), draw(10, 4, seed=1)

    def loss() -> torch.Tensor:
        return F.mse_loss(prepared(x), target)

    deltas = qat.update_deltas(prepared, loss, num_probes=400)
    rounded = prepared.weight_rounding(prepared.weight)
    step = rounded.step
    gradient = 2 / 40 * ((x @ (rounded.values * step).T - target).T @ x) * step
    curvature = (2 / 40 * x.square().sum(0) * step.square()).mean()
    expected = float((curvature / (3 * gradient.std())).detach())
    assert deltas["weight_rounding"] == pytest.approx(expected, rel=0.05)
    assert float(prepared.weight_rounding.delta) == pytest.approx(deltas["weight_rounding"])
    with pytest.raises(ConfigError, match="ewgs"):
        qat.update_deltas(qat.prepare(small()), lambda: torch.zeros(()))


def test_deltas_of_a_network_lie_in_their_range() -> None:
    config = qat.QatConfig(estimator="lsq+ewgs", activations="static", weight_bits=3, activation_bits=3)
    prepared = qat.prepare(small(), config)
    x, labels = draw(64, 20), torch.arange(64) % 5
    qat.calibrate(prepared, [x])
    prepared.train()
    deltas = qat.update_deltas(prepared, lambda: F.cross_entropy(prepared(x), labels))
    assert set(deltas) == {f"{layer}.{part}_rounding" for layer in "02" for part in ("weight", "input")}
    assert all(0 <= delta <= 2 for delta in deltas.values()) and any(delta > 0 for delta in deltas.values())


def fit(module: torch.nn.Module, groups: list[dict[str, Any]], x: torch.Tensor, labels: torch.Tensor, num: int) -> None:
    module.train()
    optimizer = torch.optim.Adam(groups)
    for _ in range(num):
        optimizer.zero_grad()
        F.cross_entropy(module(x), labels).backward()
        optimizer.step()
    module.eval()


@pytest.fixture(scope="module")
def solved() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """Five noisy clusters, and a wide network that tells them apart."""
    labels = torch.arange(500) % 5
    x = draw(5, 20, seed=1)[labels] + 1.5 * draw(500, 20, seed=2)
    net = small()
    fit(net, [{"params": list(net.parameters()), "lr": 1e-2}], x, labels, 150)
    assert (net(x).argmax(-1) == labels).all()
    return net, x, labels


@pytest.mark.parametrize("estimator", ["ste", "lsq", "ewgs", "lsq+ewgs"])
def test_training_wins_back_what_rounding_lost(
    solved: tuple[torch.nn.Module, torch.Tensor, torch.Tensor], estimator: str
) -> None:
    """Two bits: after some steps less than half as many are wrong as by rounding alone, and the integers agree."""
    net, x, labels = solved
    config = qat.QatConfig(
        weight_bits=2, activation_bits=2, activations="static", estimator=estimator, step_rule="error"
    )
    prepared = qat.prepare(copy.deepcopy(net), config).eval()
    qat.calibrate(prepared, [x])
    wrong_before = (prepared(x).argmax(-1) != labels).sum()
    assert wrong_before > 25
    fit(prepared, qat.parameter_groups(prepared, learning_rate=1e-2), x, labels, 60)
    trained = prepared(x).detach()
    assert (trained.argmax(-1) != labels).sum() < 0.5 * wrong_before
    torch.testing.assert_close(qat.convert(prepared)(x), trained, rtol=1e-4, atol=1e-4)
