"""A small encoder-decoder with random weights, and a folder of it with a vocabulary of its own."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dseek.models.marian import Marian
from dseek.models.marian_files import save_marian
from dseek.models.marian_shape import MarianShape
from dseek.train.translation_text import tokenizer_config, train_vocabulary

SENTENCES = (
    "A man walks his dog.",
    "Two dogs run over the wet street!",
    "Ein Mann geht mit seinem Hund.",
    "Zwei Hunde rennen über die nasse Straße!",
)


def tiny_marian(seed: int = 0, **sizes: object) -> Marian:
    """Every vector is drawn too, or biases would be zeros and norms ones."""
    torch.manual_seed(seed)
    given = {"vocab_size": 203, "hidden_size": 96, "num_heads": 2, "intermediate_size": 130, "max_positions": 40}
    shape = MarianShape(**{**given, "num_encoder_layers": 2, "num_decoder_layers": 2, **sizes})  # type: ignore[arg-type]
    model = Marian(shape).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.final_logits_bias.normal_()
    return model


def tiny_folder(folder: Path, **sizes: object) -> Marian:
    backend = train_vocabulary(SENTENCES * 3, 120)
    model = tiny_marian(**{"vocab_size": backend.get_vocab_size(), **sizes})
    files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": json.dumps(tokenizer_config(40))}
    save_marian(model, folder, files)
    return model


def pad(sources: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask."""
    longest = max(map(len, sources))
    ids = torch.tensor([[*source, *[0] * (longest - len(source))] for source in sources])
    return ids, torch.arange(longest) < torch.tensor([len(source) for source in sources])[:, None]
