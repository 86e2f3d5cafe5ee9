"""Splits a model's convolutions by frequency: `convert(model, images, config) -> (model, report)`.

Every plain `nn.Conv2d` is looked at alone. The spectrum of its input says how much block means would leave out of each
channel; with the weights' norms that foretells what dropping it costs in the output, which gives the largest set of low
channels within the accepted error. A few candidates (both terms, or low channels only; block sides; which part is in
16 bits; no split but 16 bits; as it is) are then tried on calibration inputs: their error is measured against the
convolution in float64, their cost is measured or counted, and the cheapest one within the error is taken.

An exact split into two terms costs more multiplications than the convolution has, so its 16-bit part has to be the
larger one to save anything; and a narrow dtype alone is hard to beat where the processor multiplies it four times as
fast. The report says, for each layer, what every candidate cost.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dseek.compress.frequency_split_conv import DTYPES, UNIT_ROUNDOFF, FrequencySplitConv2d, Split
from dseek.compress.frequency_split_spectrum import Spectrum, measure_spectra
from dseek.core.errors import ConfigError

Cost = Literal["seconds", "operations"]
CandidateKind = Literal["terms", "inverse_terms", "channels", "narrow"]

CANDIDATE_KINDS: tuple[CandidateKind, ...] = ("terms", "inverse_terms", "channels", "narrow")
"""terms: low part narrow, rest wide. inverse_terms: low part wide, rest narrow. channels: low channels at reduced
resolution and narrow, the others wide. narrow: all in 16 bits at full resolution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrequencySplitConfig:
    """How convolutions are split."""

    max_error: float = 0.005
    """Accepted error of a convolution's output, relative to its norm (bf16 throughout makes some 0.003)."""
    factors: tuple[int, ...] = (2, 4)
    """Block sides to try."""
    kinds: tuple[CandidateKind, ...] = CANDIDATE_KINDS
    """Candidates to try; see `CANDIDATE_KINDS`."""
    narrow_dtype: str = "bf16"
    """The 16-bit dtype: bf16 or fp16; fp32 leaves nothing but the reduced resolution."""
    cost: Cost = "seconds"
    """seconds: the fastest on the calibration inputs. operations: the fewest multiplications, one in 16 bits counting
    1 / `narrow_speed`; the same on every machine."""
    narrow_speed: float = 4.0
    """What a multiplication in 16 bits is taken to be faster by, where operations are counted."""
    num_samples: int = 2
    """Inputs of each convolution that candidates are tried on."""
    num_timings: int = 5
    """Timings of a candidate, of which the median counts."""
    depthwise: bool = False
    """Whether to look at depthwise convolutions too: they wait for memory, which a split only adds to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One way to compute a convolution, and what it came to."""

    kind: str
    """A `CandidateKind`, or `wide`: as it is."""
    split: Split | None
    """None: as it is."""
    predicted_error: float
    """Relative error of the output that the spectrum and the rounding foretell."""
    error: float
    """The same, measured on the calibration inputs."""
    cost: float
    """Seconds an input, or operations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """What became of one convolution."""

    name: str
    """In the model."""
    chosen: Candidate
    """The cheapest within the error."""
    candidates: tuple[Candidate, ...]
    """All that were tried, `wide` first."""
    low_share: dict[int, float]
    """Share of the input's energy that means of blocks keep, for each block side."""
    radial: tuple[float, ...]
    """Energy of the input by ring of frequency, as shares (see `frequency_split_spectrum.NUM_BINS`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrequencySplitReport:
    """What became of a model."""

    layers: tuple[LayerReport, ...]
    """Convolutions that were looked at."""
    left: dict[str, str]
    """Convolutions that were not, and why."""

    @property
    def splits(self) -> dict[str, Split]:
        """What to give to `apply` to get the same model without calibration."""
        return {layer.name: layer.chosen.split for layer in self.layers if layer.chosen.split is not None}

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain values, for JSON."""
        return {
            "layers": [
                {
                    "name": layer.name,
                    "chosen": _plain(layer.chosen),
                    "candidates": [_plain(candidate) for candidate in layer.candidates],
                    "low_share": {str(factor): share for factor, share in layer.low_share.items()},
                    "radial": list(layer.radial),
                }
                for layer in self.layers
            ],
            "left": dict(self.left),
        }


def convert(
    model: nn.Module, calibration: Iterable[Any] | torch.Tensor, config: FrequencySplitConfig | None = None
) -> tuple[nn.Module, FrequencySplitReport]:
    """Split a model's convolutions as their inputs' spectra allow.

    Args:
        model: takes one tensor of images; is left as it is.
        calibration: one batch, float32 [N, C, H, W], or an iterable of batches, each a tensor or a tuple or list whose
            first element is one (a data loader with labels).
        config: what to accept and to try.

    Returns:
        A copy of the model with `FrequencySplitConv2d` where one was chosen, in eval mode, and the report.

    Raises:
        ConfigError: a wrong value in the configuration, or calibration without images.
    """
    config = config or FrequencySplitConfig()
    _check(config)
    converted = copy.deepcopy(model).eval()
    layers, left = _find(converted, config)
    batches = [calibration] if isinstance(calibration, torch.Tensor) else calibration
    spectra = measure_spectra(
        converted, layers, _images(batches), factors=config.factors, num_samples=config.num_samples
    )
    reports = []
    for name, layer in layers.items():
        if name not in spectra:
            left[name] = "the calibration did not reach it"
            continue
        spectrum = spectra.pop(name)
        reports.append(_choose(name, layer, spectrum, config))
    report = FrequencySplitReport(layers=tuple(reports), left=left)
    return _replace(converted, report.splits), report


def apply(model: nn.Module, splits: Mapping[str, Split]) -> nn.Module:
    """Split convolutions as a report said.

    Args:
        model: with the same names; is left as it is.
        splits: of `FrequencySplitReport.splits`.

    Returns:
        A copy with the convolutions replaced.

    Raises:
        ConfigError: there is no plain convolution of a name, or a split does not fit.
    """
    return _replace(copy.deepcopy(model), splits)


def low_channels_within(
    weight: torch.Tensor, spectrum: Spectrum, factor: int, output_energy: float, max_error: float
) -> tuple[int, ...]:
    """Find the most channels whose fast part can be dropped.

    Taking what is dropped of different channels and pixels as uncorrelated, the output's error has the energy
    sum over channels of |W_c|^2 R_c, with |W_c|^2 the sum of squares of all taps of channel c and R_c the energy that
    block means leave out of it. Channels are all of one cost, so the largest set takes the least contributions first.

    Args:
        weight: float32 [O, C, k, k].
        spectrum: of the convolution's input.
        factor: block side.
        output_energy: sum of squares of the output over the same inputs, of one stride: as many pixels as the input.
        max_error: accepted relative error.

    Returns:
        Channels, rising. Source: Parseval's theorem for the energies; the choice is the greedy one for equal weights.
    """
    contributions = weight.detach().double().square().sum(dim=(0, 2, 3)) * spectrum.residual[factor]
    order = torch.argsort(contributions, stable=True)
    within = torch.cumsum(contributions[order], 0) <= max_error**2 * output_energy
    return tuple(sorted(order[: int(within.sum())].tolist()))


@torch.no_grad()
def _choose(name: str, layer: nn.Conv2d, spectrum: Spectrum, config: FrequencySplitConfig) -> LayerReport:
    """Try the candidates of one layer."""
    samples = spectrum.samples
    exact = [_exact(layer, x) for x in samples]
    norm = sum(float(y.square().sum()) for y in exact) ** 0.5
    wide_cost = _cost(layer, None, samples, config)
    wide = Candidate(
        kind="wide", split=None, predicted_error=0.0, error=_error(layer, samples, exact, norm), cost=wide_cost
    )
    tried = [wide]
    for kind, split, foretold in _candidates(layer, spectrum, norm, config):
        module = FrequencySplitConv2d(layer, split)
        error = _error(module, samples, exact, norm)
        cost = _cost(module, split, samples, config)
        tried.append(Candidate(kind=kind, split=split, predicted_error=foretold, error=error, cost=cost))
    allowed = [candidate for candidate in tried if candidate is wide or candidate.error <= config.max_error]
    total = float(spectrum.radial.sum())
    return LayerReport(
        name=name,
        chosen=min(allowed, key=lambda candidate: candidate.cost),
        candidates=tuple(tried),
        low_share={factor: spectrum.low_share(factor) for factor in config.factors},
        radial=tuple((spectrum.radial / total if total > 0 else spectrum.radial).tolist()),
    )


def _candidates(
    layer: nn.Conv2d, spectrum: Spectrum, output_norm: float, config: FrequencySplitConfig
) -> Iterator[tuple[str, Split, float]]:
    """Give kind, split and foretold error of what is worth a try."""
    every = tuple(range(layer.in_channels))
    narrow = config.narrow_dtype
    # Two factors and the sum are rounded, independently, each with a standard deviation of at most u / sqrt(3).
    rounding = UNIT_ROUNDOFF[narrow]
    smallest = min(min(x.shape[2:]) for x in spectrum.samples)
    if "narrow" in config.kinds:
        yield "narrow", Split(kind="channels", factor=1, low_channels=every, low_dtype=narrow), rounding
    weight = layer.weight.detach().double()
    norms = weight.square().sum(dim=(0, 2, 3)) if layer.groups == 1 else None
    scale = spectrum.num_images / len(spectrum.samples)
    outputs = output_norm**2 * scale * layer.stride[0] * layer.stride[1]
    for factor in (factor for factor in config.factors if factor <= smallest):
        left_out = (1.0 - spectrum.low_share(factor)) ** 0.5
        if "terms" in config.kinds:
            yield "terms", Split(kind="terms", factor=factor, low_channels=every, low_dtype=narrow), rounding
        if "inverse_terms" in config.kinds:
            split = Split(kind="terms", factor=factor, low_channels=every, low_dtype="fp32", high_dtype=narrow)
            yield "inverse_terms", split, rounding * left_out
        if "channels" in config.kinds and norms is not None:
            room = max(config.max_error**2 - rounding**2, 0.0) ** 0.5
            low = low_channels_within(weight, spectrum, factor, outputs, room)
            if low:
                dropped = float((norms * spectrum.residual[factor])[list(low)].sum()) / outputs
                split = Split(kind="channels", factor=factor, low_channels=low, low_dtype=narrow)
                yield "channels", split, (dropped + rounding**2) ** 0.5


def _exact(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """The convolution in float64."""
    twin = copy.deepcopy(layer).double()
    result: torch.Tensor = twin(x.double())
    return result


def _error(module: nn.Module, samples: list[torch.Tensor], exact: list[torch.Tensor], norm: float) -> float:
    difference = sum(float((module(x).double() - y).square().sum()) for x, y in zip(samples, exact, strict=True)) ** 0.5
    return difference / norm if norm > 0 else difference


def _cost(module: nn.Module, split: Split | None, samples: list[torch.Tensor], config: FrequencySplitConfig) -> float:
    if config.cost == "operations":
        return operations(module, split, samples[0].shape[2:], config.narrow_speed)
    return median_seconds(lambda: [module(x) for x in samples], config.num_timings) / len(samples)


def operations(module: nn.Module, split: Split | None, size: Iterable[int], narrow_speed: float) -> float:
    """Count a convolution's multiplications, in units of those in fp32, and its passes over the input as one each.

    Args:
        module: the convolution or what it was made into.
        split: how it is split; None is not.
        size: pixels of the input, H and W.
        narrow_speed: how much faster 16 bits are taken to be.

    Returns:
        Operations an input.
    """
    height, width = size
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    stride = module.stride
    assert isinstance(stride, tuple)
    outputs = height * width / (stride[0] * stride[1]) * weight.shape[0]
    products = outputs * weight[0].numel()
    channels = weight.shape[1] * (module.groups if isinstance(module.groups, int) else 1)
    if split is None:
        return products
    speed = {dtype: 1.0 if dtype == "fp32" else narrow_speed for dtype in DTYPES}
    passes = channels * height * width + outputs
    if split.factor == 1:
        return products / speed[split.low_dtype] + passes
    share = len(split.low_channels) / channels
    assert isinstance(module, FrequencySplitConv2d)
    low = outputs * module.low_products() / speed[split.low_dtype]
    high = products * (1.0 if split.kind == "terms" else 1.0 - share) / speed[split.high_dtype]
    return low + high + 2 * passes


def median_seconds(run: Callable[[], object], num_timings: int) -> float:
    """Time a function.

    Args:
        run: is called once before, and then `num_timings` times.
        num_timings: at least one.

    Returns:
        The median.
    """
    run()
    times = []
    for _ in range(num_timings):
        started_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - started_s)
    return sorted(times)[len(times) // 2]


def _find(model: nn.Module, config: FrequencySplitConfig) -> tuple[dict[str, nn.Conv2d], dict[str, str]]:
    """Convolutions to look at, and those that stay, with the reason."""
    layers: dict[str, nn.Conv2d] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv3d | nn.modules.conv._ConvTransposeNd):
            left[name] = f"{type(module).__name__}: two dimensions only"
        if not isinstance(module, nn.Conv2d):
            continue
        if type(module) is not nn.Conv2d:
            left[name] = f"{type(module).__name__} computes its own way; put a plain nn.Conv2d in its place"
        elif module.weight.dtype != torch.float32:
            left[name] = f"weights in {module.weight.dtype}"
        elif module.groups == module.in_channels and module.groups > 1 and not config.depthwise:
            left[name] = "depthwise: it waits for memory, not for products"
        else:
            layers[name] = module
    return layers, left


def _replace(model: nn.Module, splits: Mapping[str, Split]) -> nn.Module:
    for name, split in splits.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            module = None
        if type(module) is not nn.Conv2d:
            raise ConfigError(f"a split for {name}", needed="the name of a plain nn.Conv2d of the model")
        split_module = FrequencySplitConv2d(module, split)
        if not name:
            return split_module
        model.set_submodule(name, split_module)
    return model


def _images(batches: Iterable[Any]) -> Iterator[torch.Tensor]:
    for batch in batches:
        images = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(images, torch.Tensor):
            raise ConfigError(f"a calibration batch of type {type(images).__name__}", needed="a tensor of images")
        yield images


def _plain(candidate: Candidate) -> dict[str, Any]:
    return {
        "kind": candidate.kind,
        "split": None if candidate.split is None else candidate.split.to_dict(),
        "predicted_error": candidate.predicted_error,
        "error": candidate.error,
        "cost": candidate.cost,
    }


def _check(config: FrequencySplitConfig) -> None:
    if not 0 <= config.max_error < 1:
        raise ConfigError(f"max_error {config.max_error}", needed="from 0 to less than 1")
    if any(factor < 2 for factor in config.factors):
        raise ConfigError(f"factors {config.factors}", needed="whole numbers from 2 on")
    if config.narrow_dtype not in DTYPES:
        raise ConfigError(f"narrow_dtype {config.narrow_dtype!r}", needed="one of " + ", ".join(DTYPES))
    if config.num_samples < 1 or config.num_timings < 1:
        raise ConfigError("no samples or no timings", needed="at least one")
    unknown = [kind for kind in config.kinds if kind not in CANDIDATE_KINDS]
    if unknown or config.cost not in ("seconds", "operations"):
        raise ConfigError(
            f"kinds {config.kinds}, cost {config.cost!r}", needed=f"{', '.join(CANDIDATE_KINDS)}; seconds or operations"
        )
