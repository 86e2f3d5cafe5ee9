"""What a Hadamard rotation does for int8 weights and activations: `python -m benchmarks.experiments.rotation`.

Rounds the projections of SmolLM2 in PyTorch, in several ways, and prints the perplexity on the source of the standard
library. The kernels are not involved: this is how their format was chosen.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from rich.progress import track

from benchmarks.text import standard_library_text
from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from dseek.ops.linear.reference import rotate, round_groups, round_rows

Rounding = Callable[[torch.Tensor], torch.Tensor]


class RoundedLinear(torch.nn.Module):
    """A projection whose weight and activations are rounded.

    Args:
        linear: the projection.
        weight: rounding of the weight's rows.
        activations: rounding of each input row.
    """

    def __init__(self, linear: torch.nn.Module, weight: Rounding, activations: Rounding) -> None:
        super().__init__()
        self.register_buffer("weight", weight(linear.weight.detach()))
        self.activations = activations

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply; x is [..., K]."""
        rows = self.activations(x.reshape(-1, x.shape[-1]))
        return torch.nn.functional.linear(rows, self.weight).reshape(*x.shape[:-1], -1)


def _keep(x: torch.Tensor) -> torch.Tensor:
    return x


def _rotate_and_round(x: torch.Tensor) -> torch.Tensor:
    return round_rows(rotate(x))


WAYS: dict[str, tuple[Rounding, Rounding]] = {
    "fp32": (_keep, _keep),
    "int8: a scale a channel and a token": (round_rows, round_rows),
    "the same, weights only": (round_rows, _keep),
    "the same, activations only": (_keep, round_rows),
    "int8: scales for groups of 32": (round_groups, round_groups),
    "int8: rotated, a scale a channel and a token": (_rotate_and_round, _rotate_and_round),
}


@torch.inference_mode()
def perplexity(decoder: Decoder, windows: torch.Tensor) -> float:
    """Perplexity of next tokens inside windows.

    Args:
        decoder: the model.
        windows: int64 [num_windows, T].

    Returns:
        exp of the mean negative log-likelihood in nats.
    """
    total = 0.0
    for window in windows:
        logits = decoder(window[None])[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(total / (windows.numel() - len(windows)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--windows", type=int, default=8, help="windows of 1,024 tokens")
    arguments = parser.parse_args()
    with open_model(arguments.model) as files:
        token_ids = files.tokenizer().encode(standard_library_text(arguments.windows * 8000), add_special_tokens=False)
        windows = torch.tensor(token_ids[: arguments.windows * 1024]).view(-1, 1024)
        base = None
        for name, (weight, activations) in track(WAYS.items(), description="rounding"):
            decoder = Decoder.from_files(files, torch.float32).eval()
            for layer in decoder.model.layers:
                for part in (layer.self_attn, layer.mlp):
                    for child, linear in list(part.named_children()):
                        if child.endswith("_proj"):
                            setattr(part, child, RoundedLinear(linear, weight, activations))
            found = perplexity(decoder, windows)
            base = base or found
            print(f"{name:48} {found:8.4f}  {100 * (found / base - 1):+.2f} %", flush=True)


if __name__ == "__main__":
    main()
