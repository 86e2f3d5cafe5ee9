"""What windows by head lose beside one window for all: `python -m benchmarks.experiments.head_windows`.

Runs SmolLM2 through the engine, bf16 weights and cache, over texts of 8,192 tokens other than the one the windows were
measured on: one window in all heads, then windows by head whose mean is at most as long. Each is compared with dense
attention, text by text, on the positions from 2,192 on.
"""

from __future__ import annotations

import argparse
import statistics

from benchmarks.experiments.patterns import Losses
from benchmarks.experiments.row_patterns import held_out_texts
from dseek.core.attention_pattern import AttentionPattern
from dseek.engine.window_calibration import measure_windows
from dseek.models.files import open_model
from dseek.models.window_choice import WindowChoice


def report(losses: Losses, name: str, patterns: tuple[AttentionPattern, ...]) -> None:
    """Measure and print patterns.

    Args:
        losses: measures them.
        name: of the patterns.
        patterns: layer by layer.
    """
    rise, error, accuracy = losses.of_all(patterns)
    skipped = statistics.fmean(losses.skipped(pattern) for pattern in patterns)
    kept = accuracy / losses.accuracy
    print(f"  {name:36} skips {skipped:6.1%}  loss {rise:+.4f} +- {error:.4f}  top-1 kept {kept:.2%}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", type=int, default=4, help="texts of 8,192 tokens (default: %(default)s)")
    parser.add_argument("--windows", type=int, nargs="+", default=(256, 512, 1024), metavar="N")
    arguments = parser.parse_args()
    losses = Losses(arguments.model, arguments.texts, held_out_texts)
    for window in arguments.windows:
        one = AttentionPattern(kind="window", window_tokens=(window,))
        report(losses, f"window {window}", (one,) * losses.num_layers)
        with open_model(arguments.model) as files:
            by_head = measure_windows(files, WindowChoice(mean_tokens=window))
        mean = statistics.fmean(tokens for layer in by_head for tokens in layer)
        patterns = tuple(AttentionPattern(kind="window", window_tokens=layer) for layer in by_head)
        report(losses, f"by head, {mean:.0f} in the mean", patterns)


if __name__ == "__main__":
    main()
