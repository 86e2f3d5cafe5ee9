"""Text of a translation's training: a vocabulary for both languages, and pairs cut into batches of like length.

Batches are formed by length, so that little of them is padding, and drawn anew for every pass from the seed and the
pass's number alone, so that training that was stopped goes on as it would have gone. B pairs, S source and T target
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dseek.core.errors import RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
SPECIAL_TOKENS = (PAD, END, UNKNOWN)
"""Their places in the list are their ids."""


def train_vocabulary(texts: Sequence[str], vocab_size: int) -> Backend:
    """Learn pieces of words by byte-pair encoding, one vocabulary for all texts.

    Punctuation is cut off words first, so that `Hund` and `Hund.` share their pieces; spaces are kept in the pieces, so
    that decoding gives the text back.

    Args:
        texts: training text only, both languages.
        vocab_size: tokens, special ones included; fewer where the texts are too small for as many.

    Returns:
        A tokenizer that ends every text with the end token.

    Source: Sennrich et al. 2016, Neural Machine Translation of Rare Words with Subword Units, section 3.2.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE(unk_token=UNKNOWN, fuse_unk=True))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), min_frequency=2, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    end = SPECIAL_TOKENS.index(END)
    backend.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
    return backend


def tokenizer_config(max_positions: int) -> dict[str, Any]:
    """Write what tokenizer_config.json says beside the tokenizer's own file.

    Args:
        max_positions: longest text of the model, in tokens.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": UNKNOWN,
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }


@dataclass(frozen=True, slots=True)
class Pair:
    """A sentence and its translation as token ids, both with the end token.

    Args:
        source: what is read.
        target: what is to be written.
    """

    source: list[int]
    target: list[int]


def encode_pairs(backend: Backend, sources: Sequence[str], targets: Sequence[str], max_tokens: int) -> list[Pair]:
    """Cut pairs into tokens; pairs with an empty side or one that is too long are left out.

    Args:
        backend: of `train_vocabulary`.
        sources: sentences.
        targets: their translations, in the same order.
        max_tokens: longest side that is kept.

    Returns:
        The pairs.

    Raises:
        RequestError: the two have different lengths.
    """
    if len(sources) != len(targets):
        raise RequestError(
            f"{len(sources)} sentences beside {len(targets)} translations", needed="a translation of each sentence"
        )
    both = (backend.encode_batch(list(sources)), backend.encode_batch(list(targets)))
    pairs = [Pair(source.ids, target.ids) for source, target in zip(*both, strict=True)]
    return [
        pair
        for pair in pairs
        if 1 < len(pair.source) and 1 < len(pair.target) and max(len(pair.source), len(pair.target)) <= max_tokens
    ]


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Pairs side by side, padded.

    Args:
        source: int64 [B, S].
        source_mask: bool [B, S], true where there is a token.
        inputs: int64 [B, T], the target behind the start token.
        labels: int64 [B, T], the target; -100 where it is padded.
        num_labels: target tokens.
    """

    source: torch.Tensor
    source_mask: torch.Tensor
    inputs: torch.Tensor
    labels: torch.Tensor
    num_labels: int


def make_batch(pairs: Sequence[Pair], pad_id: int, start_id: int) -> PairBatch:
    """Put pairs side by side.

    Args:
        pairs: at least one.
        pad_id: fills short rows.
        start_id: stands before each target.
    """
    source = torch.full((len(pairs), max(len(pair.source) for pair in pairs)), pad_id)
    inputs = torch.full((len(pairs), max(len(pair.target) for pair in pairs)), pad_id)
    labels = torch.full_like(inputs, -100)
    mask = torch.zeros(source.shape, dtype=torch.bool)
    for row, pair in enumerate(pairs):
        source[row, : len(pair.source)] = torch.tensor(pair.source)
        mask[row, : len(pair.source)] = True
        inputs[row, : len(pair.target)] = torch.tensor([start_id, *pair.target[:-1]])
        labels[row, : len(pair.target)] = torch.tensor(pair.target)
    return PairBatch(source, mask, inputs, labels, int((labels >= 0).sum()))


def batches(pairs: Sequence[Pair], tokens_per_batch: int, seed: int | None) -> Iterator[list[Pair]]:
    """Form batches of like length, in drawn order.

    Args:
        pairs: all of them.
        tokens_per_batch: most target tokens of a batch, padding included.
        seed: of the order and of which pairs of equal length meet; None goes by length without drawing.

    Yields:
        Pairs of a batch, at least one.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    order = list(range(len(pairs)))
    if generator is not None:
        order = torch.randperm(len(pairs), generator=generator).tolist()
    order.sort(key=lambda index: (len(pairs[index].target), len(pairs[index].source)))
    groups: list[list[Pair]] = []
    longest = 0
    for index in order:
        pair = pairs[index]
        longest = max(longest, len(pair.target), len(pair.source))
        if not groups or (len(groups[-1]) + 1) * longest > tokens_per_batch:
            groups.append([])
            longest = max(len(pair.target), len(pair.source))
        groups[-1].append(pair)
    if generator is not None:
        groups = [groups[index] for index in torch.randperm(len(groups), generator=generator).tolist()]
    yield from groups
