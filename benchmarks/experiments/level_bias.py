"""What biases of far cells are worth: `python -m benchmarks.experiments.level_bias --out DIR`.

Learns the biases of SmolLM2 on the part of the standard library that may be trained on, then runs the model through the
engine, bf16 weights and cache, over held-out sequences of 8,192 tokens: a window and selected blocks in all layers,
without far cells, with them and no bias, and with the biases as learned and as read from a gate file. Each is compared
with dense attention, and with no far cells, text by text, on the positions from 2,192 on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks import standard_library
from benchmarks.experiments.patterns import TOKENS, WINDOW, Losses, mean_and_error
from dseek.core.attention_pattern import AttentionPattern
from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from dseek.models.gate_file import FILE_NAME, FORMAT, SHIPPED, fingerprint
from dseek.models.tokenizer import Tokenizer
from dseek.train.level_bias import LevelBiasTraining, learn_level_biases

SEED = 0
"""Of the order of files."""


def sequences(tokenizer: Tokenizer, names: Iterable[str], count: int) -> list[list[int]]:
    """Join whole files to sequences of `TOKENS` tokens, in an order that the seed draws.

    Args:
        tokenizer: the model's.
        names: files of the standard library.
        count: sequences.
    """
    files: list[list[int]] = []
    num_tokens = 0
    for name in standard_library.shuffled(names, SEED):
        if num_tokens > 3 * count * TOKENS:  # whole files fill less than all of it
            break
        files.append(tokenizer.encode(standard_library.read(name), add_special_tokens=False))
        num_tokens += len(files[-1])
    return standard_library.joined(files, TOKENS, count)


def biased_model(model: str, biases: Sequence[torch.Tensor], folder: Path) -> str:
    """Put the model, and its shipped gate with biases beside it, into a folder.

    Args:
        model: its name; a single file with a shipped gate.
        biases: [H, M] of each layer.
        folder: where it goes.

    Returns:
        The name of the copy, which is a link.
    """
    with open_model(model) as files:
        shipped = next(SHIPPED.glob(f"*-{fingerprint(files)}.safetensors"))
        metadata = {"format": FORMAT, "theta": repr(files.shape.rope.theta), "model": fingerprint(files)}
        target = folder / "model.gguf"
        target.unlink(missing_ok=True)
        target.symlink_to(files.path.resolve())
    tensors = load_file(shipped) | {f"layers.{layer}.level_bias": bias for layer, bias in enumerate(biases)}
    save_file(tensors, target.with_suffix("." + FILE_NAME), metadata)
    return str(target)


def show_progress(what: str, done: int, total: int, figures: dict[str, float]) -> None:
    """Print a finished layer.

    Args:
        what: of what.
        done: how much of it.
        total: how much there is.
        figures: worth showing.
    """
    print(f"{what} {done}/{total}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()), flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", required=True, type=Path, help="folder for the biases; goes on in it")
    parser.add_argument("--texts", type=int, default=4, help="held-out sequences (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=4, help="sequences to learn from (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=512, help="rows of each that count (default: %(default)s)")
    parser.add_argument("--top-blocks", type=int, nargs="+", default=[8], metavar="K", help="blocks (default: 8)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    config = LevelBiasTraining(window_tokens=WINDOW, num_texts=arguments.samples, num_rows=arguments.rows)
    with open_model(arguments.model) as files:
        tokenizer = files.tokenizer()
        training = sequences(tokenizer, standard_library.training_files(), arguments.samples)
        held_out = sequences(tokenizer, standard_library.held_out_files(), arguments.texts)
        decoder = Decoder.from_files(files, torch.bfloat16).requires_grad_(False)
    texts = [torch.tensor(ids) for ids in training]
    state_file = arguments.out / "level_bias.safetensors"
    biases = learn_level_biases(decoder, texts, state_file, config, show_progress)
    del decoder
    for level, of_level in enumerate(torch.stack(biases).unbind(-1)):
        quarters = of_level.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        print(f"bias of level {level}: least, quartiles, largest " + " ".join(f"{value:.2f}" for value in quarters))
    biased = biased_model(arguments.model, biases, arguments.out)

    losses = Losses(arguments.model, arguments.texts, lambda _, count: held_out[:count])
    print(f"dense: perplexity {math.exp(losses.base.mean()):.4f}, top-1 {losses.accuracy:.2%}", flush=True)
    without = losses.base
    for count in arguments.top_blocks:
        for name, far, model in (
            ("no far cells", False, arguments.model),
            ("far cells, no bias", True, arguments.model),
            ("far cells, learned bias", True, biased),
        ):
            pattern = AttentionPattern(kind="dynamic", window_tokens=(WINDOW,), top_blocks=count, far=far)
            rises, accuracy = losses.rises((pattern,) * losses.num_layers, model=model)
            without = rises if not far else without
            (rise, error), (more, its_error) = mean_and_error(rises), mean_and_error(rises - without)
            print(
                f"  K = {count}, {name:24} {100 * rise:+7.3f} % +- {100 * error:.3f}  top-1 {accuracy:.2%}  "
                f"over no far cells {100 * more:+.3f} % +- {100 * its_error:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
