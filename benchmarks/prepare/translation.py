"""Train a translation model from English to German on Multi30k, from random weights.

    python -m benchmarks.prepare.translation --data FOLDER --out FOLDER [--seed N] [--passes N]

Writes a model folder that transformers reads (`MarianMTModel`). Stopped, it goes on with the pass it was in.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress as Bar

from benchmarks import multi30k
from dseek.core.errors import DseekError
from dseek.models.marian import Marian
from dseek.models.marian_files import save_marian
from dseek.models.marian_shape import MarianShape
from dseek.train.translation import TranslationTraining, train_translation
from dseek.train.translation_text import encode_pairs, tokenizer_config, train_vocabulary

MAX_TOKENS = 96
"""Longest sentence that is trained on."""


def train(data: Path, out: Path, shape: MarianShape, config: TranslationTraining, num_pairs: int | None = None) -> None:
    """Train a model and write its folder.

    Args:
        data: folder of Multi30k.
        out: where the model goes; the training's state is kept in it.
        shape: sizes; `vocab_size` is what the vocabulary may have at most.
        config: how it is trained.
        num_pairs: pairs that are used, the first ones; None for all.
    """
    english, german = multi30k.read_part(data, "train")
    english, german = english[:num_pairs], german[:num_pairs]
    backend = train_vocabulary([*english, *german], shape.vocab_size)
    pairs = encode_pairs(backend, english, german, MAX_TOKENS)
    validation = encode_pairs(backend, *multi30k.read_part(data, "validation"), shape.max_positions)
    sizes = asdict(shape) | {"vocab_size": backend.get_vocab_size()}
    torch.manual_seed(config.seed)
    model = Marian(MarianShape(**sizes))
    out.mkdir(parents=True, exist_ok=True)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(pairs)} pairs, {model.shape.vocab_size} tokens, {count / 1e6:.2f}M weights", file=sys.stderr)
    with Bar(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("pass 1")

        def progress(what: str, done: int, total: int, figures: dict[str, float]) -> None:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            if what == "passes":
                print(f"pass {done} of {total}: {shown}", file=sys.stderr, flush=True)
            else:
                bar.update(task, description=f"{what}: {shown}", completed=done, total=total)

        losses = train_translation(model, pairs, validation, out / "training.safetensors", config, progress)
    files = {
        "tokenizer.json": backend.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(tokenizer_config(model.shape.max_positions), indent=2) + "\n",
    }
    save_marian(model, out, files, {"training": asdict(config) | {"validation_losses": losses}})


def main(arguments: list[str]) -> int:
    """Run from the command line.

    Args:
        arguments: without the program's name.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare.translation", description=__doc__)
    defaults = TranslationTraining()
    parser.add_argument("--data", type=Path, required=True, help="folder of Multi30k")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--passes", type=int, default=defaults.num_passes)
    parser.add_argument("--vocabulary", type=int, default=5000, help="most tokens of the vocabulary")
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16, for processors that are quick at it")
    parser.add_argument("--pairs", type=int, default=None, help="use the first pairs only")
    options = parser.parse_args(arguments)
    try:
        config = TranslationTraining(seed=options.seed, num_passes=options.passes, low_precision=options.bf16)
        train(options.data, options.out, MarianShape(vocab_size=options.vocabulary), config, options.pairs)
    except DseekError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
