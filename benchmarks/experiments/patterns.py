"""What attention to less than everything costs in quality: `python -m benchmarks.experiments.patterns`.

Runs SmolLM2 through the engine, bf16 weights and cache, over texts of 8,192 tokens: windows, then selected blocks with
and without far cells, in all layers; then two patterns in a few layers at a time. Each is compared with dense
attention, text by text, on the positions from 2,192 on. The figures of `dseek.plan.attention_loss` come from here;
those of selection by rows from `benchmarks.experiments.row_patterns`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sysconfig
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.peers.attention_pairs import WatchedRunner
from benchmarks.text import MODULES
from dseek import load, plan
from dseek.core.attention_pattern import DENSE, AttentionPattern
from dseek.engine.evaluate import score
from dseek.engine.native_runner import NativeRunner
from dseek.models.files import open_model
from dseek.models.tokenizer import Tokenizer
from dseek.plan.attention_loss import attention_loss
from dseek.plan.attention_wish import AttentionWish, patterns_text
from dseek.plan.plan import Plan
from dseek.plan.selection import skipped_share

TOKENS = 8192
FIRST = 2192
"""First position that is counted: earlier ones see little more than the patterns do."""
PART = TOKENS // 2
"""A text is two modules, of each the beginning."""
SEGMENT = 5
"""Layers that are changed together where depth is looked at."""
WINDOW = 256
TOP_BLOCKS = (4, 8, 9, 16, 32)


class Losses:
    """Losses of one model on the same texts.

    Args:
        model: its name.
        num_texts: texts of `TOKENS` tokens.
        read: makes so many texts with a tokenizer.
    """

    def __init__(
        self, model: str, num_texts: int, read: Callable[[Tokenizer, int], list[list[int]]] | None = None
    ) -> None:
        self.model = model
        with open_model(model) as files:
            objective = plan.Objective(context_tokens=TOKENS, batch=1)
            self.plan = plan.make(
                files.shape,
                plan.this_machine(),
                objective,
                encodings=files.encodings(),
                precision="bf16",
                cache_dtype="bf16",
                attention=AttentionWish(kind="dense"),
            )
            self.texts = (read or two_modules_each)(files.tokenizer(), num_texts)
        self.base, self.accuracy = self._run(self.plan, model)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.plan.shape.num_layers

    def _run(
        self, tried: Plan, model: str, look: Callable[[WatchedRunner], None] | None = None
    ) -> tuple[np.ndarray, float]:
        """Mean negative log likelihood in nats of each text, and the share of likeliest tokens over all."""
        losses, right = [], []
        with load(model, plan=tried) as llm:
            runner = llm.engine.runner
            assert isinstance(runner, NativeRunner), "patterns run on the native kernels alone"
            watched = llm.engine.runner = WatchedRunner(runner)
            for text in self.texts:
                log_likelihoods, is_right = score(llm, text)
                # Entry t is the prediction that position t makes.
                losses.append(-log_likelihoods[FIRST:].mean())
                right.append(is_right[FIRST:].mean())
                if look is not None:
                    look(watched)
        return np.array(losses), float(np.mean(right))

    def of(self, pattern: AttentionPattern, layers: Collection[int]) -> tuple[float, float, float]:
        """Measure a pattern in some layers.

        Args:
            pattern: the pattern.
            layers: those that have it; the others are dense.

        Returns:
            Rise of the mean negative log likelihood over dense attention in nats, its standard error over the texts,
            and the share of tokens that were the likeliest.
        """
        return self.of_all(tuple(pattern if layer in layers else DENSE for layer in range(self.num_layers)))

    def of_all(
        self, patterns: tuple[AttentionPattern, ...], look: Callable[[WatchedRunner], None] | None = None
    ) -> tuple[float, float, float]:
        """Measure patterns.

        Args:
            patterns: layer by layer.
            look: called after each text with the runner that still has what was selected.

        Returns:
            As `of`.
        """
        rises, accuracy = self.rises(patterns, look=look)
        return *mean_and_error(rises), accuracy

    def rises(
        self,
        patterns: tuple[AttentionPattern, ...],
        *,
        model: str | None = None,
        look: Callable[[WatchedRunner], None] | None = None,
    ) -> tuple[np.ndarray, float]:
        """Measure patterns text by text.

        Args:
            patterns: layer by layer.
            model: a copy of the model with another gate beside it; None is the model itself.
            look: called after each text with the runner that still has what was selected.

        Returns:
            Rise of each text's mean negative log likelihood over dense attention in nats, and the share of tokens that
            were the likeliest.
        """
        tried = dataclasses.replace(self.plan, attention_patterns=patterns)
        losses, accuracy = self._run(tried, model or self.model, look)
        return losses - self.base, accuracy

    def skipped(self, pattern: AttentionPattern) -> float:
        """Share of the pairs of a counted position and one before it that a layer does not look at."""
        return skipped_share(pattern, TOKENS, self.plan.shape.num_kv_heads, first_token=FIRST)


def two_modules_each(tokenizer: Tokenizer, num_texts: int) -> list[list[int]]:
    """Make texts of two modules each.

    Args:
        tokenizer: the model's.
        num_texts: how many.
    """
    parts = _modules(tokenizer, 2 * num_texts)
    return [one + other for one, other in zip(parts[::2], parts[1::2], strict=True)]


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean, and its standard error over the texts (NaN for one text).

    Args:
        values: one a text.
    """
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()), error


def _modules(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """The first `PART` tokens of modules of the standard library that have so many."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[list[int]] = []
    for name in MODULES:
        ids = tokenizer.encode((root / f"{name}.py").read_text(encoding="utf-8"), add_special_tokens=False)
        if len(ids) >= PART:
            found.append(ids[:PART])
        if len(found) == count:
            return found
    raise SystemExit(f"only {len(found)} modules have {PART} tokens: take fewer texts")


def report(title: str, losses: Losses, choices: Iterable[tuple[str, AttentionPattern, Sequence[int]]]) -> None:
    """Measure and print some choices.

    Args:
        title: what they have in common.
        losses: measures them.
        choices: name, pattern and the layers that have it.
    """
    print(f"\n{title}", flush=True)
    total = 0.0
    for name, pattern, layers in choices:
        rise, error, accuracy = losses.of(pattern, layers)
        total += rise
        share = losses.skipped(pattern) * len(layers) / losses.num_layers
        print(
            f"  {name:36} skips {share:6.1%}  {100 * rise:+8.3f} % +- {100 * error:.3f}  top-1 {accuracy:.2%}",
            flush=True,
        )
    print(f"  {'sum':36} {'':13}  {100 * total:+8.3f} %", flush=True)


def report_plans(losses: Losses, accepted: Sequence[float]) -> None:
    """Measure what the planner makes of accepted losses.

    Args:
        losses: measures them.
        accepted: losses to accept, fractions.
    """
    print("\nplans, their loss as accepted, and that of attention as foreseen and as measured", flush=True)
    shape = losses.plan.shape
    with open_model(losses.model) as files:
        encodings = files.encodings()
    for limit in accepted:
        objective = plan.Objective(context_tokens=TOKENS, batch=1, max_quality_loss=limit)
        made = plan.make(
            shape, plan.this_machine(), objective, encodings=encodings, precision="bf16", cache_dtype="bf16"
        )
        foreseen = attention_loss(shape, made.attention_patterns, TOKENS)
        rise, error, accuracy = losses.of_all(made.attention_patterns)
        loss = f"{100 * rise:+.2f} % +- {100 * error:.2f}, top-1 {accuracy:.2%}"
        print(f"  {100 * limit:g} %, {100 * foreseen:.2f} %, {loss}: {patterns_text(made.attention_patterns)}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", type=int, default=4, help="texts of 8,192 tokens (default: %(default)s)")
    parser.add_argument("--by-layer", action="store_true", help="measure one layer at a time, too")
    parser.add_argument("--accepted", type=float, nargs="+", metavar="X", help="measure plans for these losses instead")
    arguments = parser.parse_args()
    losses = Losses(arguments.model, arguments.texts)
    everywhere = range(losses.num_layers)
    print(f"dense: perplexity {math.exp(losses.base.mean()):.4f}, top-1 {losses.accuracy:.2%}")
    if arguments.accepted:
        report_plans(losses, arguments.accepted)
        return
    windows = [AttentionPattern(kind="window", window_tokens=(window,)) for window in (256, 512, 1024, 2048)]
    report("windows", losses, [(f"window {pattern.window_tokens[0]}", pattern, everywhere) for pattern in windows])
    for far in (False, True):
        title = f"window {WINDOW} and K blocks, far cells {'by their means' if far else 'left out'}"
        report(title, losses, [(f"K = {count}", _dynamic(count, far), everywhere) for count in TOP_BLOCKS])
    segments = [range(start, min(start + SEGMENT, losses.num_layers)) for start in everywhere[::SEGMENT]]
    depths = [(f"layers {part[0]} to {part[-1]}", part) for part in segments]
    if arguments.by_layer:
        depths += [(f"layer {layer}", range(layer, layer + 1)) for layer in everywhere]
    for name, pattern in (("window 256", windows[0]), ("K = 8", _dynamic(8, False))):
        report(f"{name}, in some layers", losses, [(part, pattern, layers) for part, layers in depths])


def _dynamic(top_blocks: int, far: bool) -> AttentionPattern:
    return AttentionPattern(kind="dynamic", window_tokens=(WINDOW,), top_blocks=top_blocks, far=far)


if __name__ == "__main__":
    main()
