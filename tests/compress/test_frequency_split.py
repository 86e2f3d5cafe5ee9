"""Convolutions split by frequency: exactness, the bound, gradients, what the spectrum foretells, and the choice."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dseek.compress.frequency_split import FrequencySplitConfig, apply, convert, low_channels_within
from dseek.compress.frequency_split_conv import FrequencySplitConv2d, Split
from dseek.compress.frequency_split_phases import axis_taps
from dseek.compress.frequency_split_spectrum import Spectrum, block_response, frequencies, power_spectrum
from dseek.core.errors import ConfigError

SHAPES = [
    {"in_channels": 6, "out_channels": 5, "kernel_size": 1},
    {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1},
    {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, "stride": 2},
    {"in_channels": 4, "out_channels": 6, "kernel_size": 5, "padding": 2, "stride": (3, 1), "bias": False},
    {"in_channels": 4, "out_channels": 8, "kernel_size": 3, "padding": "same", "dilation": 2, "groups": 2},
    {"in_channels": 6, "out_channels": 6, "kernel_size": (3, 2), "padding": (1, 0), "groups": 6},
    {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"in_channels": 4, "out_channels": 4, "kernel_size": 2, "padding": "valid", "stride": 2, "dilation": 3},
]
SIZES = [(16, 16), (13, 18)]


def make(arguments: dict[str, object], seed: int = 0) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(**arguments).requires_grad_(False)


def smooth(*size: int, seed: int = 0) -> torch.Tensor:
    """Noise with much of its power at low frequencies, as images have it."""
    noise = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    rows, columns = frequencies(*size[-2:])
    falling = 1 / (0.02 + (rows[:, None] ** 2 + columns**2)) ** 0.75
    return torch.fft.irfft2(torch.fft.rfft2(noise.double()) * falling, s=size[-2:]).float()


def whole(convolution: nn.Conv2d, **fields: object) -> Split:
    return Split(low_channels=tuple(range(convolution.in_channels)), **fields)


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("arguments", SHAPES, ids=str)
def test_two_terms_in_fp32_are_the_convolution(
    arguments: dict[str, object], factor: int, poisoned_memory: None
) -> None:
    convolution = make(arguments)
    module = FrequencySplitConv2d(convolution, whole(convolution, kind="terms", factor=factor, low_dtype="fp32"))
    for height, width in SIZES:
        x = torch.randn(2, convolution.in_channels, height, width)
        expected, found = convolution(x), module(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(module(x), found)
        assert torch.equal(module(x[0]), module(x[:1])[0])
    x = torch.randn(2, height, width, convolution.in_channels).permute(0, 3, 1, 2)
    torch.testing.assert_close(module(x), convolution(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arguments", SHAPES, ids=str)
def test_low_channels_alone_are_the_convolution_of_block_means(arguments: dict[str, object]) -> None:
    convolution = make(arguments)
    for factor in (2, 4):
        module = FrequencySplitConv2d(convolution, whole(convolution, kind="channels", factor=factor, low_dtype="fp32"))
        x = torch.randn(2, convolution.in_channels, 16, 12)
        if convolution.padding_mode != "zeros":
            before, after = module.padding[:2]
            x = F.pad(x, (before, after, before, after), mode=convolution.padding_mode)
            twin = copy.deepcopy(convolution)
            twin.padding, twin.padding_mode = (0, 0), "zeros"
            module = FrequencySplitConv2d(twin, module.split)
        else:
            twin = convolution
        below, right = -x.shape[2] % factor, -x.shape[3] % factor
        means = F.avg_pool2d(F.pad(x, (0, right, 0, below)), factor)
        blocks = means.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        expected = twin(blocks)
        found = module(x)
        torch.testing.assert_close(found, expected[..., : found.shape[2], : found.shape[3]], rtol=1e-5, atol=1e-5)


def test_taps_by_phase_are_where_outputs_read() -> None:
    for kernel, stride, dilation, before, factor in [
        (3, 1, 1, 1, 2),
        (5, 2, 1, 2, 4),
        (3, 3, 2, 0, 2),
        (1, 1, 1, 0, 4),
    ]:
        taps = axis_taps(kernel, stride, dilation, before, factor)
        for output in range(20):
            a, phase = divmod(output, len(taps))
            read = [(output * stride - before + tap * dilation) // factor for tap in range(kernel)]
            assert [a * len(taps) * stride // factor + tap for tap in taps[phase]] == read


@pytest.mark.parametrize("kind", ["terms", "channels", "some channels"])
@pytest.mark.parametrize("dtypes", [("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "fp32")], ids=str)
@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("arguments", SHAPES[:4] + SHAPES[6:], ids=str)
def test_error_is_within_the_bound(
    arguments: dict[str, object], factor: int, dtypes: tuple[str, str], kind: str
) -> None:
    convolution = make(arguments)
    low = tuple(range(convolution.in_channels)) if kind != "some channels" else (0, 2)
    split = Split(
        kind="terms" if kind == "terms" else "channels",
        factor=factor,
        low_channels=low,
        low_dtype=dtypes[0],
        high_dtype=dtypes[1],
    )
    module = FrequencySplitConv2d(convolution, split)
    ratios = []
    for seed, size in enumerate(SIZES):
        x = smooth(2, convolution.in_channels, *size, seed=seed)
        exact = copy.deepcopy(convolution).double()(x.double())
        error, bound = (module(x).double() - exact).abs(), module.error_bound(x)
        assert bool((error <= bound).all())
        ratios.append(float((bound / error.clamp_min(1e-300)).min()))
        # Where no channel's fast part is dropped, a tenth that goes missing is far outside.
        if kind == "terms" or factor == 1:
            assert bool(((module(x).double() * 0.9 - exact).abs() > bound).any())
    assert min(ratios) < 50


def test_two_terms_take_up_the_rounding_of_the_means() -> None:
    convolution = make({"in_channels": 16, "out_channels": 16, "kernel_size": 1})
    x = smooth(2, 16, 32, 32) + 30
    exact = copy.deepcopy(convolution).double()(x.double())

    def error(**fields: object) -> float:
        module = FrequencySplitConv2d(convolution, whole(convolution, **fields))
        return float((module(x).double() - exact).norm() / exact.norm())

    narrow = error(kind="channels", factor=1)
    assert error(kind="terms", factor=2) < narrow
    assert error(kind="terms", factor=2, low_dtype="fp32", high_dtype="bf16") < narrow / 4
    assert error(kind="channels", factor=2) > 10 * narrow


def test_gradients_are_those_of_the_convolution() -> None:
    for arguments in SHAPES[:5]:
        convolution = make(arguments).requires_grad_(True)
        module = FrequencySplitConv2d(
            copy.deepcopy(convolution), whole(convolution, kind="terms", factor=2, low_dtype="fp32")
        )
        x = torch.randn(2, convolution.in_channels, 13, 16, requires_grad=True)
        other = x.detach().clone().requires_grad_(True)
        direction = torch.randn_like(convolution(x))
        (convolution(x) * direction).sum().backward()
        (module(other) * direction).sum().backward()
        torch.testing.assert_close(other.grad, x.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module.weight.grad, convolution.weight.grad, rtol=1e-4, atol=1e-4)


def test_kernels_follow_the_weight_and_state_dicts_go_both_ways() -> None:
    convolution, other = make(SHAPES[1]), make(SHAPES[1], seed=1)
    module = FrequencySplitConv2d(convolution, whole(convolution, kind="terms", factor=2))
    x = smooth(1, 4, 8, 8)
    before = module(x)
    module.load_state_dict(other.state_dict())
    assert not torch.allclose(module(x), before, atol=1e-2)
    torch.testing.assert_close(module(x), other(x), rtol=2e-2, atol=5e-2)
    other.load_state_dict(module.state_dict())
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_spectrum_is_the_energy_and_foretells_what_means_leave_out() -> None:
    for size in ((16, 12), (9, 15)):
        x = smooth(3, 2, *size)
        torch.testing.assert_close(power_spectrum(x).sum((1, 2)), x.double().square().sum((0, 2, 3)))
    x = smooth(2, 3, 24, 16).double()
    for factor in (2, 4):
        spectrum = Spectrum((factor,))
        spectrum.add(x.float())
        # Averaged over where the blocks begin, the residual is what the response says.
        measured = torch.zeros(3, dtype=torch.float64)
        for rows in range(factor):
            for columns in range(factor):
                moved = torch.roll(x, (rows, columns), (2, 3))
                means = F.avg_pool2d(moved, factor).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
                measured += (moved - means).square().sum((0, 2, 3)) / factor**2
        torch.testing.assert_close(spectrum.residual[factor], measured, rtol=1e-5, atol=1e-7)
        assert 0 < spectrum.low_share(factor) < 1
    assert block_response(torch.tensor([0.0, 0.5], dtype=torch.float64), 2).tolist() == pytest.approx([1.0, 0.0])
    torch.testing.assert_close(spectrum.radial.sum(), x.square().sum(), rtol=1e-6, atol=0)


def test_low_channels_are_the_most_within_the_error() -> None:
    convolution = make({"in_channels": 4, "out_channels": 8, "kernel_size": 1, "bias": False})
    x = torch.cat([smooth(2, 2, 32, 32), torch.randn(2, 2, 32, 32)], 1)
    x[:, 1] = 1  # constant: nothing is left out
    spectrum = Spectrum((2,))
    spectrum.add(x)
    energy = float(convolution(x).double().square().sum())
    assert low_channels_within(convolution.weight, spectrum, 2, energy, 0.0) in ((1,), ())
    assert low_channels_within(convolution.weight, spectrum, 2, energy, 1e-4) == (1,)
    assert low_channels_within(convolution.weight, spectrum, 2, energy, 2.0) == (0, 1, 2, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 32, 1)
        self.up = nn.ConvTranspose2d(32, 4, 2)
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.point(F.relu(self.depthwise(F.relu(self.norm(self.first(x)))))))


def test_convert_reports_and_stays_within_the_error() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    images = smooth(4, 3, 32, 32)
    config = FrequencySplitConfig(cost="operations", max_error=0.01)
    converted, report = convert(model, [(images[:2], "label"), [images[2:]]], config)
    assert type(model.first) is nn.Conv2d and model.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert [layer.name for layer in report.layers] == ["first", "point"]
    assert set(report.left) == {"depthwise", "up", "unused"}
    for layer in report.layers:
        assert layer.candidates[0].kind == "wide"
        assert layer.chosen.error <= 0.01 and layer.chosen.cost == min(
            candidate.cost for candidate in layer.candidates if candidate.error <= 0.01 or candidate.kind == "wide"
        )
        assert sum(layer.radial) == pytest.approx(1)
        # What was foretold is of the measured size.
        for candidate in layer.candidates[1:]:
            assert 0.2 < candidate.predicted_error / candidate.error < 5, candidate
    assert report.splits
    with torch.no_grad():
        expected, found = model.eval()(images), converted(images)
        assert float((found - expected).norm() / expected.norm()) < 0.03
        assert torch.equal(apply(model, report.splits)(images), found)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["layers"][0]["chosen"]["split"]["factor"] >= 1
    again = [
        Split(**{**entry["chosen"]["split"], "low_channels": tuple(entry["chosen"]["split"]["low_channels"])})
        for entry in plain["layers"]
        if entry["chosen"]["split"]
    ]
    assert again == list(report.splits.values())


def test_nothing_is_split_where_nothing_may_be_lost() -> None:
    converted, report = convert(Net(), smooth(2, 3, 16, 16), FrequencySplitConfig(max_error=0.0, num_timings=1))
    assert not report.splits and type(converted.get_submodule("first")) is nn.Conv2d


def test_wrong_input_is_refused() -> None:
    convolution = make(SHAPES[0])
    for fields in (
        {"kind": "terms", "factor": 0, "low_channels": tuple(range(6))},
        {"kind": "terms", "factor": 2, "low_channels": (0, 1)},
        {"kind": "channels", "factor": 2, "low_channels": (1, 0)},
        {"kind": "channels", "factor": 2, "low_channels": (6,)},
        {"kind": "channels", "factor": 2, "low_channels": ()},
        {"kind": "channels", "factor": 2, "low_channels": (0,), "low_dtype": "int8"},
        {"kind": "other", "factor": 2, "low_channels": (0,)},
    ):
        with pytest.raises(ConfigError):
            FrequencySplitConv2d(convolution, Split(**fields))
    with pytest.raises(ConfigError, match="at least one batch"):
        convert(Net(), [])
    with pytest.raises(ConfigError, match="tensor of images"):
        convert(Net(), ["image"])
    with pytest.raises(ConfigError, match="not finite"):
        convert(Net(), torch.full((1, 3, 8, 8), float("nan")))
    with pytest.raises(ConfigError, match="plain"):
        apply(Net(), {"norm": Split(kind="terms", factor=2, low_channels=(0,))})
    for wrong in ({"max_error": -1}, {"factors": (1,)}, {"narrow_dtype": "int8"}, {"num_samples": 0}):
        with pytest.raises(ConfigError):
            convert(Net(), smooth(1, 3, 8, 8), FrequencySplitConfig(**wrong))
