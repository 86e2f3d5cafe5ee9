"""How to run beyond the trained length: `python -m benchmarks.experiments.long_positions`.

Runs SmolLM2 (trained for 8,192 tokens) through the engine over windows of 16,384, once for each way to rotate the
positions beyond, and prints the perplexity of the positions by quarters of the window: a way that does not extrapolate
shows in the upper quarters, what it costs the positions that needed no help in the lower ones. The first row is the
model as it is, over the same tokens in windows of its own length: a longer text is of use where it beats that row.
`dseek.models.long_positions.AUTO` comes from here.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dseek import load, plan
from dseek.core.shape import ModelShape, RopeShape
from dseek.engine.evaluate import score
from dseek.models.files import open_model
from dseek.models.long_positions import extend_positions

BUCKETS = 4

SOURCES = ("_pydecimal", "test/datetimetester", "test/test_socket", "test/test_typing")
"""Modules whose source alone fills a window of 16,384 tokens."""


def texts(own: Sequence[str]) -> dict[str, list[str]]:
    """Read the texts.

    Args:
        own: files of the user's; the standard library's source and manual where there are none.

    Returns:
        Name of a kind of text to its texts; no window reaches over two of them.
    """
    if own:
        return {Path(name).name: [Path(name).read_text(encoding="utf-8")] for name in own}
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    sources = [root / f"{name}.py" for name in SOURCES]  # some distributions leave out the tests
    return {
        "source": [path.read_text(encoding="utf-8") for path in sources if path.exists()],
        "manual": ["\n".join(topics.values())],
    }


def windows(folder: str, pieces: Sequence[str], num_tokens: int, num_windows: int) -> list[list[int]]:
    """Cut texts into windows.

    Args:
        folder: the model, for its tokenizer.
        pieces: texts.
        num_tokens: tokens of a window.
        num_windows: at most so many, taken from the texts in turn.

    Returns:
        Token ids of each window.
    """
    with open_model(folder) as files:
        ids = [files.tokenizer().encode(piece, add_special_tokens=False) for piece in pieces]
    cut = [
        piece[start : start + num_tokens]
        for start in range(0, max(map(len, ids)), num_tokens)
        for piece in ids
        if start + num_tokens <= len(piece)
    ]
    return cut[:num_windows]


def ways(shape: ModelShape, num_tokens: int) -> dict[str, RopeShape]:
    """List the rotations to compare.

    Args:
        shape: the model as it is.
        num_tokens: positions to reach.

    Returns:
        Name and rotary embedding of each.
    """
    factor = num_tokens / shape.max_position_embeddings
    extended = {kind: extend_positions(shape, num_tokens, kind).rope for kind in ("none", "linear", "dynamic", "yarn")}
    yarn, dynamic = extended["yarn"], extended["dynamic"]
    found = {f"{kind}, factor {rope.factor:g}": rope for kind, rope in extended.items()}
    found["dynamic, factor 1"] = dataclasses.replace(dynamic, factor=1.0)
    found[f"dynamic, factor {2 * factor:g}"] = dataclasses.replace(dynamic, factor=2 * factor)
    found[f"yarn, factor {1.5 * factor:g}"] = dataclasses.replace(yarn, factor=1.5 * factor)
    found[f"yarn, factor {2 * factor:g}"] = dataclasses.replace(yarn, factor=2 * factor)
    found[f"yarn, factor {factor:g}, attention factor 1"] = dataclasses.replace(yarn, attention_factor=1.0)
    return found


def losses(folder: str, rope: RopeShape, num_tokens: int, precision: str, cut: Sequence[Sequence[int]]) -> np.ndarray:
    """Score windows with one rotary embedding.

    Args:
        folder: the model.
        rope: the rotary embedding.
        num_tokens: positions and context.
        precision: of the weights.
        cut: token ids of the windows, `num_tokens` each.

    Returns:
        Negative log likelihoods in nats, float64 [windows, num_tokens - 1].
    """
    files = open_model(folder)
    files.shape = dataclasses.replace(
        files.shape, max_position_embeddings=max(num_tokens, files.shape.max_position_embeddings), rope=rope
    )
    with load(files, precision=precision, context=num_tokens, batch=1, machine=plan.this_machine()) as llm:
        return np.array([-score(llm, window)[0] for window in cut])


def report(name: str, nats: np.ndarray, base: np.ndarray | None, bounds: Sequence[int]) -> None:
    """Print a row: perplexities by bucket and of the whole, and the change of the whole against the base.

    Args:
        name: what was measured.
        nats: negative log likelihoods [windows, T - 1]; NaN where a token was not predicted.
        base: the same of what it is compared with, or None.
        bounds: first position of each bucket, and the end.
    """
    parts = [np.nanmean(nats[:, first:last]) for first, last in itertools.pairwise(bounds)]
    row = " ".join(f"{math.exp(part):9.4f}" for part in [*parts, np.nanmean(nats)])
    if base is not None:
        rises = np.nanmean(nats - base, axis=1)
        error = rises.std(ddof=1) / math.sqrt(len(rises)) if len(rises) > 1 else math.nan
        row += f"  {100 * rises.mean():+7.2f} % +- {100 * error:.2f}"
    print(f"  {name:36} {row}", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=2, help="windows of each kind of text (default: %(default)s)")
    parser.add_argument("--precision", default="bf16", help="of the weights (default: %(default)s)")
    parser.add_argument("--text", nargs="*", default=[], metavar="FILE", help="other texts, UTF-8")
    parser.add_argument("--only", nargs="*", default=[""], metavar="NAME", help="only ways whose name begins so")
    arguments = parser.parse_args()
    folder, num_tokens = arguments.model, arguments.tokens
    with open_model(folder) as files:
        shape = files.shape
    trained = shape.max_position_embeddings
    if num_tokens % trained:
        parser.error(f"--tokens must be a multiple of the trained length, {trained}")
    bounds = [num_tokens * part // BUCKETS for part in range(BUCKETS)] + [num_tokens - 1]
    for kind, pieces in texts(arguments.text).items():
        cut = windows(folder, pieces, num_tokens, arguments.windows)
        print(f"\n{kind}: {len(cut)} windows of {num_tokens} tokens; perplexity from {bounds[:-1]} and of all")
        # As it is, the model sees a window in parts; the first token of a part has nothing before it.
        parts = [window[start : start + trained] for window in cut for start in range(0, num_tokens, trained)]
        short = losses(folder, shape.rope, trained, arguments.precision, parts)
        gap = np.full((len(parts), 1), np.nan)
        base = np.hstack([short, gap]).reshape(len(cut), -1)[:, :-1]
        report(f"as it is, windows of {trained}", base, None, bounds)
        for name, rope in ways(shape, num_tokens).items():
            if name.startswith(tuple(arguments.only)):
                report(name, losses(folder, rope, num_tokens, arguments.precision, cut), base, bounds)


if __name__ == "__main__":
    main()
