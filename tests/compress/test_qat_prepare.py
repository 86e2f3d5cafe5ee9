"""Which layers round, which stay wide, and that parameters, states and gradients are where they were."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F

from dseek.compress import qat
from dseek.core.errors import ConfigError


def network(seed: int = 0) -> torch.nn.Sequential:
    """Convolutions with and without batch norm, groups and bias, and a linear layer."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, groups=8, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.Conv2d(8, 6, 1, padding=1, padding_mode="reflect"),
        torch.nn.Flatten(),
        torch.nn.Linear(6 * 8 * 8, 10),
    )
    for norm in net:
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.data.normal_()
            norm.bias.data.normal_()
    return net.eval()


def images(count: int = 4, seed: int = 9) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("estimator", ["ste", "lsq", "ewgs", "lsq+ewgs"])
@pytest.mark.parametrize("activations", ["dynamic", "static", "none"])
def test_rounding_is_small_and_can_be_switched_off(estimator: str, activations: str) -> None:
    plain = network()
    config = qat.QatConfig(estimator=estimator, activations=activations, step_rule="error")
    prepared = qat.prepare(copy.deepcopy(plain), config)
    if activations == "static":
        qat.calibrate(prepared, [images()])
    x = images()
    expected, found = plain(x), prepared(x)
    assert 0 < (found - expected).abs().max() < 0.03 * expected.abs().max()
    with qat.rounding(prepared, weights=False, inputs=False):
        torch.testing.assert_close(prepared(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prepared(x), found, rtol=0, atol=0)


def test_every_parameter_learns() -> None:
    prepared = qat.prepare(network(), qat.QatConfig(estimator="lsq+ewgs", activations="static", weight_bits=4))
    qat.calibrate(prepared, [images()])
    prepared.train()
    prepared(images()).square().sum().backward()
    for name, parameter in prepared.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("estimator", ["ste", "lsq", "ewgs", "lsq+ewgs"])
def test_a_plain_checkpoint_loads_into_every_kind(estimator: str) -> None:
    prepared = qat.prepare(network(), qat.QatConfig(estimator=estimator, weight_bits=4))
    qat.freeze_ranges(prepared)
    other = network(seed=5)
    prepared.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(qat.restore(prepared)(images()), other(images()), rtol=0, atol=0)


def test_state_loads_both_ways_and_parameters_are_shared() -> None:
    plain = network()
    before = dict(plain.named_parameters())
    prepared = qat.prepare(plain, qat.QatConfig(estimator="lsq", activations="static"))
    assert all(dict(prepared.named_parameters())[name] is value for name, value in before.items())
    other = network(seed=5)
    prepared.load_state_dict(other.state_dict(), strict=True)
    fresh = network(seed=7)
    fresh.load_state_dict(qat.plain_state_dict(prepared), strict=True)
    x = images()
    torch.testing.assert_close(fresh(x), other(x), rtol=0, atol=0)
    qat.calibrate(prepared, [x])
    again = qat.prepare(network(), qat.QatConfig(estimator="lsq", activations="static"))
    again.load_state_dict(prepared.state_dict(), strict=True)
    again.eval(), prepared.eval()
    torch.testing.assert_close(again(x), prepared(x), rtol=0, atol=0)
    restored = qat.restore(prepared)
    assert type(restored[0]) is torch.nn.Conv2d and type(restored[1]) is torch.nn.BatchNorm2d
    torch.testing.assert_close(restored(x), other(x), rtol=0, atol=0)


def test_batch_statistics_are_those_of_the_unfolded_pair() -> None:
    """In training, what comes out is normalised by the batch and the running statistics follow; frozen, they stay."""
    plain = network()
    prepared = qat.prepare(copy.deepcopy(plain), qat.QatConfig(batch_norm="batch"))
    x = images(16)
    plain.train(), prepared.train()
    with qat.rounding(prepared, weights=False, inputs=False):
        torch.testing.assert_close(prepared(x), plain(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prepared[1].running_mean, plain[1].running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prepared[4].running_var, plain[4].running_var, rtol=1e-4, atol=1e-5)
    assert int(prepared[1].num_batches_tracked) == 1
    qat.freeze_batch_norm(prepared)
    kept = prepared[1].running_mean.clone()
    in_training = prepared(x)
    assert torch.equal(prepared[1].running_mean, kept)
    torch.testing.assert_close(prepared.eval()(x), in_training, rtol=0, atol=0)


def test_the_folded_weight_is_what_is_rounded() -> None:
    """Jacob et al. 2018, equation 14: rounding sees w gamma / sigma, so channels of large gamma have coarse steps."""
    plain = network()
    prepared = qat.prepare(copy.deepcopy(plain), qat.QatConfig(weight_bits=3, activations="none"))
    norm, convolution = plain[1], plain[0]
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    weight = convolution.weight * factor[:, None, None, None]
    step = weight.abs().amax((1, 2, 3), keepdim=True) / 3
    bias = (convolution.bias - norm.running_mean) * factor + norm.bias
    x = images()
    expected = F.conv2d(x, (weight / step).round() * step, bias, padding=1)
    torch.testing.assert_close(prepared[:2](x), expected, rtol=1e-4, atol=1e-5)


class Residual(torch.nn.Module):
    """A batch norm whose convolution somebody else reads too, and one behind a branch that tracing cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.norm = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)
        self.alone, self.its_norm = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.shared(x)
        return self.its_norm(self.alone(self.norm(y) + y))


class Untraceable(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Residual(), torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) if x.sum() > 0 else x


def test_only_a_batch_norm_that_alone_follows_is_folded() -> None:
    choices = {choice.name: choice.batch_norm for choice in qat.inspect(Untraceable(), qat.QatConfig())}
    assert choices == {"first.shared": None, "first.alone": "first.its_norm", "second.0": "second.1"}
    wished = qat.QatConfig(fold=(("first.shared", "first.norm"),))
    assert {choice.name: choice.batch_norm for choice in qat.inspect(Untraceable(), wished)}["first.shared"]
    with pytest.raises(ConfigError, match="cannot be folded"):
        qat.inspect(Untraceable(), qat.QatConfig(fold=(("first.norm", "first.shared"),)))


class Odd(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_what_stays_wide_is_told(caplog: pytest.LogCaptureFixture) -> None:
    net = torch.nn.ModuleDict(
        {
            "linear": torch.nn.Linear(8, 8),
            "odd": Odd(8, 8),
            "up": torch.nn.ConvTranspose2d(2, 2, 2),
            "volume": torch.nn.Conv3d(2, 2, 2),
            "attention": torch.nn.MultiheadAttention(8, 2),
            "head": torch.nn.Linear(8, 2),
            "hooked": torch.nn.Linear(8, 2),
        }
    )
    net["hooked"].register_forward_pre_hook(lambda module, arguments: None)
    with caplog.at_level(logging.WARNING):
        prepared = qat.prepare(net, qat.QatConfig(ignore=("head",)))
    assert isinstance(prepared["linear"], qat.QatLinear)
    assert sum(isinstance(layer, qat.QatLayer) for layer in prepared.modules()) == 1
    for name in ("odd", "up", "volume", "attention", "attention.out_proj", "head", "hooked"):
        assert f"{name} (" in caplog.text


def test_fused_inference_does_not_go_round_the_rounding() -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        wide = layer(x)
        prepared = qat.prepare(layer, qat.QatConfig(weight_bits=3))
        assert (prepared(x) - wide).abs().max() > 1e-3
        torch.testing.assert_close(qat.restore(prepared)(x), wide, rtol=1e-5, atol=1e-5)
    assert layer.activation_relu_or_gelu == 1


def test_tied_parameters_and_shared_layers_stay_so() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU())
    net.append(net[0])
    net.append(torch.nn.Linear(6, 6))
    net[3].weight = net[0].weight
    prepared = qat.prepare(net)
    assert prepared[0] is prepared[2] and prepared[3].weight is prepared[0].weight
    single = qat.prepare(torch.nn.Linear(4, 3))
    assert isinstance(single, qat.QatLinear) and type(qat.restore(single)) is torch.nn.Linear


def test_autocast_multiplies_the_same_integers() -> None:
    """bfloat16 holds every int8, so autocast's only rounding is that of sums; a rounded float weight loses its grid."""
    torch.manual_seed(0)
    prepared = qat.prepare(torch.nn.Linear(64, 32)).eval()
    x = torch.randn(7, 64)
    exact = prepared(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = prepared(x)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() <= 2**-7 * exact.abs().max()
    half = qat.prepare(torch.nn.Linear(64, 32).bfloat16())
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_overrides_and_wrong_settings() -> None:
    config = qat.QatConfig(weight_bits=2, overrides={"0": qat.QatConfig(), "7": qat.QatConfig(group_size=32)})
    prepared = qat.prepare(network(), config)
    assert prepared[0].weight_rounding.bits == 8 and prepared[3].weight_rounding.bits == 2
    assert prepared[7].weight_rounding.group_size == 32
    for wrong in (
        {"weight_bits": 9},
        {"estimator": "magic"},
        {"group_size": 48, "weight_bits": 4},
        {"group_size": 32, "weight_bits": 2},
        {"group_size": 32, "weight_bits": 4, "activations": "static"},
        {"symmetric": False},
        {"symmetric": False, "group_size": 32, "weight_bits": 4, "estimator": "lsq"},
        {"ewgs_delta": 3.0},
        {"overrides": {"0": qat.QatConfig(ignore=("1",))}},
    ):
        with pytest.raises(ConfigError):
            qat.QatConfig(**wrong)
    for config in (qat.QatConfig(ignore=("nothing",)), qat.QatConfig(overrides={"nothing.*": qat.QatConfig()})):
        with pytest.raises(ConfigError, match="nothing"):
            qat.prepare(network(), config)
    with pytest.raises(ConfigError, match="already"):
        qat.prepare(prepared)
    with pytest.raises(ConfigError, match="no layer"):
        qat.prepare(torch.nn.ReLU())
