"""Train a translation model from English to German on Multi30k: from random weights, or on with rounding.

    python -m benchmarks.prepare.translation --data FOLDER --out FP32 [--seed N] [--passes N]
    python -m benchmarks.prepare.translation --data FOLDER --start FP32 --out QAT [--seed N] [--passes N]

The second form is quantisation-aware training of what the first one made (see `dseek.compress.qat`). Each writes a
model folder that transformers reads (`MarianMTModel`). Stopped, it goes on with the pass it was in.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import Progress as Bar

from benchmarks import multi30k
from benchmarks.errors import BenchmarkError
from dseek.compress import qat
from dseek.core.errors import DseekError
from dseek.models.marian import Marian
from dseek.models.marian_files import open_marian, save_marian
from dseek.models.marian_shape import MarianShape
from dseek.train.translation import TranslationTraining, train_translation
from dseek.train.translation_text import Pair, encode_pairs, tokenizer_config, train_vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

MAX_TOKENS = 96
"""Longest sentence that is trained on."""
QAT_PASSES = 2
"""Passes with rounding, unless somebody asks for another number."""
QAT_TRAINING = TranslationTraining(learning_rate=2e-4, warm_up_steps=50, decay_share=0.8, dropout=0.1)
"""How training goes on with rounding: gently, from weights that are good already."""


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
    _run(model, backend, pairs, validation, out, config)


def train_rounded(
    data: Path, start: Path, out: Path, config: TranslationTraining, num_pairs: int | None = None
) -> None:
    """Go on with a trained model while its products are rounded as int8 kernels round them, and write the result.

    Every linear layer rounds, the head among them: weights to a scale an output channel, inputs to a scale a token.
    Scales come from the largest magnitude, so the folder is an ordinary model, which int8 kernels round the same way.

    Args:
        data: folder of Multi30k.
        start: folder of the trained model.
        out: where the new one goes; the training's state is kept in it.
        config: how it is trained.
        num_pairs: pairs that are used, the first ones; None for all.
    """
    from tokenizers import Tokenizer

    english, german = multi30k.read_part(data, "train")
    backend = Tokenizer.from_file(str(start / "tokenizer.json"))
    pairs = encode_pairs(backend, english[:num_pairs], german[:num_pairs], MAX_TOKENS)
    plain = open_marian(start)
    validation = encode_pairs(backend, *multi30k.read_part(data, "validation"), plain.shape.max_positions)
    model = qat.prepare(plain, qat.QatConfig(estimator="ste", activations="dynamic"))
    assert isinstance(model, Marian)
    _run(model, backend, pairs, validation, out, config)


def _run(
    model: Marian,
    backend: Backend,
    pairs: Sequence[Pair],
    validation: Sequence[Pair],
    out: Path,
    config: TranslationTraining,
) -> None:
    """Train and write."""
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
    restored = qat.restore(model)
    assert isinstance(restored, Marian)
    save_marian(restored, out, files, {"training": asdict(config) | {"validation_losses": losses}})


def main(arguments: list[str]) -> int:
    """Run from the command line.

    Args:
        arguments: without the program's name.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prepare.translation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = TranslationTraining()
    parser.add_argument("--data", type=Path, required=True, help="folder of Multi30k")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--start", type=Path, help="folder of a trained model: go on from it, with rounding")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--passes", type=int, help=f"{defaults.num_passes}, with rounding {QAT_PASSES}")
    parser.add_argument("--vocabulary", type=int, default=5000, help="most tokens of the vocabulary")
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16, where that is quick")
    parser.add_argument("--pairs", type=int, default=None, help="use the first pairs only")
    options = parser.parse_args(arguments)
    try:
        if options.start is None:
            passes = options.passes or defaults.num_passes
            config = TranslationTraining(seed=options.seed, num_passes=passes, low_precision=options.bf16)
            train(options.data, options.out, MarianShape(vocab_size=options.vocabulary), config, options.pairs)
        else:
            passes = options.passes or QAT_PASSES
            config = replace(QAT_TRAINING, seed=options.seed, num_passes=passes, low_precision=options.bf16)
            train_rounded(options.data, options.start, options.out, config, options.pairs)
    except (DseekError, BenchmarkError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
