"""What attention loses where every query selects for itself: `python -m benchmarks.experiments.row_patterns`.

Runs SmolLM2 through the engine, bf16 weights and cache, over texts of 8,192 tokens that the gate was not trained on:
least shares with two windows, followed by mean keys and by the trained gate with its least shares by head. Each is
compared with dense attention, text by text, on the positions from 2,192 on; pairs and opened blocks are counted in the
selections themselves. The figures of `dseek.plan.attention_loss` and `dseek.core.attention_pattern` come from here.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np

from benchmarks import standard_library
from benchmarks.experiments.patterns import FIRST, TOKENS, Losses
from benchmarks.peers.attention_pairs import WatchedRunner, count_skipped
from dseek.core.attention_pattern import BLOCK_TOKENS, AttentionPattern
from dseek.engine.head_facts import head_facts
from dseek.models.files import open_model
from dseek.models.tokenizer import Tokenizer
from dseek.ops.attention.row_selection import STRIP_ROWS
from dseek.plan.attention_wish import MOST_BLOCKS, SEARCHED_SHARES, AttentionWish
from dseek.plan.head_facts import HeadFacts

WINDOWS = (64, 256)


def held_out_texts(tokenizer: Tokenizer, num_texts: int) -> list[list[int]]:
    """Join files of the standard library that nothing is trained on.

    Args:
        tokenizer: the model's.
        num_texts: texts of `TOKENS` tokens to make.
    """
    names = standard_library.shuffled(standard_library.held_out_files(), 0)
    files = [tokenizer.encode(standard_library.read(name), add_special_tokens=False) for name in names]
    return standard_library.joined(files, TOKENS, num_texts)


def opened_blocks(runner: WatchedRunner, patterns: Sequence[AttentionPattern], num_kv_heads: int) -> list[int]:
    """Count what strips of queries opened beside the window, the first block and their own.

    Args:
        runner: the runner, after a text was computed.
        patterns: layer by layer.
        num_kv_heads: key-value heads.

    Returns:
        Blocks of each strip from `FIRST` on, in all layers and heads that do not see everything.
    """
    assert runner.pages is not None
    counts = []
    for layer, pattern in enumerate(patterns):
        for head, near in enumerate(pattern.near_blocks(num_kv_heads)):
            if head in pattern.dense_heads:
                continue
            for row in range(-(-FIRST // STRIP_ROWS) * STRIP_ROWS, runner.num_tokens, STRIP_ROWS):
                newest = min(row + STRIP_ROWS, runner.num_tokens) - 1
                blocks, _ = runner.runner.row_selection(layer, head, runner.pages, newest)
                counts.append(sum(0 < block < row // BLOCK_TOKENS - near for block in blocks))
    return counts


def report(losses: Losses, name: str, patterns: tuple[AttentionPattern, ...]) -> None:
    """Measure and print patterns.

    Args:
        losses: measures them.
        name: of the patterns.
        patterns: layer by layer.
    """
    shares: list[float] = []
    opened: list[int] = []
    plan = dataclasses.replace(losses.plan, attention_patterns=patterns)

    def look(runner: WatchedRunner) -> None:
        total, skipped = count_skipped(runner, plan, FIRST)
        shares.append(skipped / total)
        opened.extend(opened_blocks(runner, patterns, plan.shape.num_kv_heads))

    rise, error, accuracy = losses.of_all(patterns, look)
    foreseen = statistics.fmean(losses.skipped(pattern) for pattern in patterns)
    spread = "/".join(f"{np.percentile(opened, part):.0f}" for part in (50, 90, 99))
    print(
        f"  {name:30} skips {statistics.fmean(shares):6.1%} (foreseen {foreseen:6.1%})  loss {rise:+.4f} +- {error:.4f}"
        f"  top-1 kept {accuracy / losses.accuracy:.2%}  opened {statistics.fmean(opened):.2f} ({spread})",
        flush=True,
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", type=int, default=4, help="texts of 8,192 tokens (default: %(default)s)")
    parser.add_argument(
        "--windows", type=int, nargs="+", default=WINDOWS, metavar="N", help="windows beside the blocks"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=SEARCHED_SHARES, metavar="S", help="least shares")
    arguments = parser.parse_args()
    losses = Losses(arguments.model, arguments.texts, held_out_texts)
    with open_model(arguments.model) as files:
        from_gate = head_facts(files, AttentionWish(kind="dynamic"))
    for gated in (True, False) if from_gate.gate else (False,):
        print(
            f"\nfollowed by {'the trained gate, with its least shares by head' if gated else 'mean keys'}", flush=True
        )
        for window in arguments.windows:
            for share in arguments.shares:
                pattern = AttentionPattern(
                    kind="dynamic", window_tokens=(window,), top_blocks=MOST_BLOCKS, min_share=share
                )
                facts = from_gate if gated else HeadFacts()
                patterns = facts.fitted(pattern, losses.num_layers, own_windows=False)
                report(losses, f"window {window}, shares from {share:g}", patterns)


if __name__ == "__main__":
    main()
