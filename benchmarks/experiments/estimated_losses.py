"""How well estimated losses agree with measured ones: `python -m benchmarks.experiments.estimated_losses`.

SmolLM2 with its weights moved off its 4-bit grid, in PyTorch: the estimate that `dseek calibrate --sensitivity` makes
of every projection in a format, and what each of some layers' projections is measured to lose alone, on the same
tokens.
"""

from __future__ import annotations

import argparse
import math

import torch

from benchmarks import models
from benchmarks.text import standard_library_text
from dseek.compress.sensitivity import FORMATS, Sensitivity, scaled
from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from dseek.models.tensor_names import ROLE_MODULES


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", choices=FORMATS, default="i4g", help="weight format (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens, in windows of 512 (default: %(default)s)")
    parser.add_argument("--every", type=int, default=4, help="measure every so many layers (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the factors that move the weights (%(default)s)")
    parser.add_argument("--spread", type=float, default=1.25, help="the largest of them (default: %(default)s)")
    arguments = parser.parse_args()
    name = arguments.format
    folder = str(models.off_grid_folder(models.SMOLLM2, arguments.seed, arguments.spread))
    with open_model(folder) as files:
        ids = files.tokenizer().encode(standard_library_text(12 * arguments.tokens), add_special_tokens=False)
        decoder = Decoder.from_files(files, torch.float32).requires_grad_(False)
    windows = [torch.tensor(ids[start : start + 512]) for start in range(0, arguments.tokens, 512)]
    sums = Sensitivity(decoder, windows)
    layers = range(decoder.shape.num_layers)
    expected = sums.expected([name], lambda what, done, total: None)
    levels = {(name, role): sums.divergence({(layer, role): name for layer in layers}) for role in ROLE_MODULES}
    estimated = scaled(expected, levels)[name]
    print("role       all layers at once   Fisher's information alone")
    for role in ROLE_MODULES:
        print(f"{role:10} {levels[name, role]:18.6f}   {sum(expected[name][role]):.6f}")
    print("\nlayer  role        measured   estimated   ratio")
    ratios = []
    for layer in reversed(layers[(len(layers) - 1) % arguments.every :: arguments.every]):
        for role in ROLE_MODULES:
            measured = sums.divergence({(layer, role): name})
            ratios.append(math.log(estimated[role][layer] / measured))
            print(f"{layer:5}  {role:10} {measured:9.6f}   {estimated[role][layer]:9.6f}   {math.exp(ratios[-1]):.2f}")
    spread = math.exp(math.sqrt(sum(ratio * ratio for ratio in ratios) / len(ratios)))
    within = sum(abs(ratio) < math.log(1.5) for ratio in ratios)
    print(
        f"\ntypical factor {spread:.2f}; {within} of {len(ratios)} within 1.5; "
        f"worst {math.exp(max(map(abs, ratios))):.2f}"
    )


if __name__ == "__main__":
    main()
