"""What the inputs of a model's convolutions look like in frequency: power by radius, and what block means leave out.

One pass over calibration images, streamed: only sums stay, and the first few inputs of each convolution, which the
choice of a split is tried on. C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dseek.core.errors import ConfigError

NUM_BINS = 32
"""Rings of the radial profile, from 0 to the corner of the spectrum at sqrt(1/2) cycles a pixel."""


@dataclass(slots=True)
class Spectrum:
    """Sums over the inputs of one convolution."""

    factors: tuple[int, ...]
    """Block sides that residuals are kept for."""
    radial: torch.Tensor = field(default_factory=lambda: torch.zeros(NUM_BINS, dtype=torch.float64))
    """Energy by ring, all channels."""
    energy: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """[C], sum of squares of each channel."""
    residual: dict[int, torch.Tensor] = field(default_factory=dict)
    """[C] for each factor: the part of `energy` that means of blocks leave out."""
    samples: list[torch.Tensor] = field(default_factory=list)
    """The first inputs, float32 [1, C, H, W]."""
    num_images: int = 0
    """Inputs that were summed."""

    def add(self, x: torch.Tensor) -> None:
        """Add inputs `x`, float32 [N, C, H, W]."""
        power = power_spectrum(x)
        power_C = power.sum(dim=(1, 2))
        if not self.num_images:
            self.energy = torch.zeros_like(power_C)
            self.residual = {factor: torch.zeros_like(power_C) for factor in self.factors}
        self.energy += power_C
        rows, columns = frequencies(x.shape[2], x.shape[3])
        for factor in self.factors:
            kept = (block_response(rows, factor) ** 2)[:, None] * block_response(columns, factor) ** 2
            self.residual[factor] += (power * (1 - kept)).sum(dim=(1, 2))
        radius = (rows[:, None] ** 2 + columns**2).sqrt()
        ring = (radius / 0.5**0.5 * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        self.radial.index_add_(0, ring.flatten(), power.sum(0).flatten())
        self.num_images += x.shape[0]

    def low_share(self, factor: int) -> float:
        """Share of the energy that means of blocks of a `factor` keep."""
        total = float(self.energy.sum())
        return 1.0 - float(self.residual[factor].sum()) / total if total > 0 else 1.0


def frequencies(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the frequencies of a half spectrum.

    Args:
        height, width: pixels of the image.

    Returns:
        Cycles a pixel, float64 [H] and [W // 2 + 1].
    """
    return torch.fft.fftfreq(height, dtype=torch.float64), torch.fft.rfftfreq(width, dtype=torch.float64)


def power_spectrum(x: torch.Tensor) -> torch.Tensor:
    """Compute the power of each channel by frequency, summed over images.

    Args:
        x: float32 [N, C, H, W].

    Returns:
        float64 [C, H, W // 2 + 1]; the sum over frequencies is the sum of squares of the channel (Parseval): columns
        that stand for two mirrored ones are counted twice.
    """
    height, width = x.shape[-2:]
    power = torch.fft.rfft2(x.double()).abs().square().sum(0) / (height * width)
    mirrored = slice(1, (width + 1) // 2)
    power[..., mirrored] *= 2
    return power


def block_response(cycles: torch.Tensor, factor: int) -> torch.Tensor:
    """Give the frequency response of the mean of neighbouring pixels.

    The means of blocks, put in their pixels' place, are a projection; averaged over the blocks' offset, its energy is
    that of the moving mean, sum |X|^2 |D|^2, so 1 - |D|^2 of the power is left out (rows times columns in 2D).

    Args:
        cycles: float64, cycles a pixel.
        factor: pixels of the mean, r.

    Returns:
        D = sin(pi f r) / (r sin(pi f)), 1 at f = 0. Source: Oppenheim and Schafer 2010, Discrete-Time Signal
        Processing, section 2.6 (moving average), and Parseval's theorem.
    """
    divisor = factor * torch.sin(torch.pi * cycles)
    response = torch.sin(torch.pi * factor * cycles) / torch.where(divisor == 0, 1.0, divisor)
    return torch.where(divisor == 0, torch.ones_like(response), response)


@torch.no_grad()
def measure_spectra(
    model: nn.Module,
    layers: Mapping[str, nn.Conv2d],
    batches: Iterable[torch.Tensor],
    *,
    factors: tuple[int, ...],
    num_samples: int,
) -> dict[str, Spectrum]:
    """Run a model over images and sum up what its convolutions are given.

    Args:
        model: called with each batch, in eval mode.
        layers: the convolutions, by name.
        batches: float32 images, as the model takes them.
        factors: block sides to keep residuals for.
        num_samples: inputs of each convolution to keep whole; memory for so many images' activations.

    Returns:
        A spectrum for each layer that was reached.

    Raises:
        ConfigError: there is no batch, or an input is not finite.
    """
    spectra: dict[str, Spectrum] = {}
    handles = []

    def listener(name: str) -> Any:
        def listen(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach()
            x = x[None] if x.dim() == 3 else x
            if not bool(torch.isfinite(x).all()):
                raise ConfigError(
                    f"the input of {name} is not finite", needed="finite activations", remedy="check model and images"
                )
            spectrum = spectra.setdefault(name, Spectrum(factors))
            spectrum.add(x)
            left = num_samples - len(spectrum.samples)
            spectrum.samples += [image[None].clone() for image in x[: max(left, 0)]]

        return listen

    was_training = model.training
    model.eval()
    num_batches = 0
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(listener(name)))
        for batch in batches:
            model(batch)
            num_batches += 1
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    if not num_batches:
        raise ConfigError("no calibration images", needed="at least one batch")
    return spectra
