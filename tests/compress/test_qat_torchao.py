"""torchao's quantisation-aware training: the same rounding of weights, its settings translated, its gaps known."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torchao import quantization as torchao
from torchao.quantization import qat as torchao_qat

from dseek.compress import qat
from dseek.core.errors import ConfigError

DTYPES = {2: torch.int2, 3: torch.int3, 4: torch.int4, 8: torch.int8}


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def both(weights: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same layer, prepared by torchao and here."""
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(128, 24))
    theirs = copy.deepcopy(plain)
    config = torchao_qat.QATConfig(weight_config=weights)
    torchao.quantize_(theirs, config)
    return theirs, qat.prepare(copy.deepcopy(plain), qat.from_torchao(config))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_channels_round_to_the_same_numbers(bits: int) -> None:
    theirs, ours = both(torchao_qat.IntxFakeQuantizeConfig(DTYPES[bits], "per_channel"))
    weight, rounding = ours[0].weight, ours[0].weight_rounding
    wide = theirs[0].weight_fake_quantizer(theirs[0].weight)
    integers, step, _ = rounding.integers(weight)
    torch.testing.assert_close(step, theirs[0].weight_fake_quantizer.scale, rtol=0, atol=0)
    # torchao multiplies by the inverse of the step, which may go either way on a tie. The largest magnitude is on one.
    ties = ((weight / step).abs() % 1 - 0.5).abs() < 1e-4
    assert ties.sum() <= 1.1 * len(weight)
    torch.testing.assert_close((integers * step)[~ties], wide[~ties], rtol=1e-6, atol=0)
    assert ((integers * step - wide)[ties] / step.expand_as(weight)[ties]).abs().max() <= 1.001
    x = draw(5, 128)
    theirs(x).sum().backward()
    ours(x).sum().backward()
    # torchao lets the gradient into the scale, and so to the largest magnitude, and through what is above the largest
    # integer but rounds to it (a sixth of the elements at two bits); elsewhere both are straight-through.
    inside = ~ties & (weight / step <= rounding.high)
    assert weight.grad is not None and inside.float().mean() > 0.8
    torch.testing.assert_close(weight.grad[inside], theirs[0].weight.grad[inside], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(qat.convert(ours)(x), ours(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_do_but_for_scales_in_half_precision(group: int, symmetric: bool) -> None:
    theirs, ours = both(torchao_qat.IntxFakeQuantizeConfig(torch.int4, group_size=group, is_symmetric=symmetric))
    wide, found = theirs[0].weight_fake_quantizer(theirs[0].weight), ours[0].weight_rounding(ours[0].weight).values
    _, step, minimum = ours[0].weight_rounding.integers(ours[0].weight)
    # A half is off by 2^-11: of the step, times 15 levels at most, and of the minimum, which is 15 steps at most. What
    # lies nearer than that to the edge between two integers may go to the other one.
    bound = 15 * 2.0**-11 * (1 if symmetric else 2)
    off = (found - wide).abs().unflatten(1, (-1, group)) / step
    if minimum is not None:  # torchao's zero point is cut off towards zero, not rounded; what can differ is clipping
        zero_point = theirs[0].weight_fake_quantizer.zero_point
        same = (-8 - minimum / step).round()[..., 0] == zero_point
        assert same.float().mean() > 0.4
        off = off[same]
    assert (off > bound + 1e-5).float().mean() < 2 * bound and off.max() < 1 + bound + 1e-5


def test_settings_are_translated_and_differences_told(caplog: pytest.LogCaptureFixture) -> None:
    base = torchao.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=torchao.PerGroup(64)
    )
    with caplog.at_level(logging.WARNING):
        found = qat.from_torchao(torchao_qat.QATConfig(base))
    assert (found.weight_bits, found.group_size, found.activations) == (4, 64, "dynamic")
    assert "zero point" in caplog.text and "float16" in caplog.text
    found = qat.from_torchao(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=torchao.PerAxis(0)))
    assert (found.weight_bits, found.group_size, found.activations) == (3, None, "none")
    assert qat.from_torchao(torchao.Int8DynamicActivationInt8WeightConfig()) == qat.QatConfig(step_rule="span")
    learned = torchao_qat.IntxFakeQuantizeConfig(torch.int4, "per_channel", is_dynamic=False, range_learning=True)
    assert qat.from_torchao(learned).estimator == "lsq"
    for wrong, message in (
        (torchao.Float8WeightOnlyConfig(), "no counterpart"),
        (torchao_qat.IntxFakeQuantizeConfig(torch.int4, group_size=16), "groups of 16"),
        (torchao_qat.IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=False), "zero points"),
        (torchao_qat.IntxFakeQuantizeConfig(torch.uint4, "per_channel"), "dtype"),
    ):
        with pytest.raises(ConfigError, match=message):
            qat.from_torchao(wrong)


def test_what_torchao_does_not_serve_is_still_so() -> None:
    """If one of these begins to work, the adapter can lean on it."""
    with pytest.raises(ValueError, match="Unexpected base config"):
        torchao.quantize_(
            torch.nn.Sequential(torch.nn.Linear(32, 32)),
            torchao_qat.QATConfig(torchao.Int8DynamicActivationInt8WeightConfig(), step="prepare"),
        )
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3))
    torchao.quantize_(
        net, torchao_qat.QATConfig(weight_config=torchao_qat.IntxFakeQuantizeConfig(torch.int8, "per_channel"))
    )
    assert type(net[0]) is torch.nn.Conv2d
