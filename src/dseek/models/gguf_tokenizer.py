"""Builds the tokenizer that a GGUF file's metadata describes.

Two kinds are known: `gpt2` (byte-level BPE with merges) and `llama` (SentencePiece, pieces with scores). A GGUF file
does not carry the rules for cutting text into words, only their name (`tokenizer.ggml.pre`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dseek.core.errors import FileFormatError, UnsupportedModelError
from dseek.core.shape import ModelShape
from dseek.models.config_values import shorten
from dseek.models.gguf_strings import StringArray
from dseek.models.hf_codec import HuggingFaceCodec, add_tokens, byte_level_backend
from dseek.models.sentencepiece_codec import PieceKind, SentencePieceCodec
from dseek.models.tokenizer import TokenCodec, Tokenizer

PRE_TOKENIZERS: dict[str, str] = {
    "default": "gpt2",
    "gpt-2": "gpt2",
    "gpt2": "gpt2",
    "smollm": "smollm",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "falcon3": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "tekken": "tekken",
}
"""`tokenizer.ggml.pre` to a key of `dseek.models.hf_codec.SPLITS`."""

_BOS_BY_DEFAULT = ("llama3", "tekken")
_END_OF_ANSWER = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>")
"""Control tokens that end an answer, whatever the metadata names as the one end token (as llama.cpp does)."""


def tokenizer_from_gguf(metadata: Mapping[str, Any], path: Path, shape: ModelShape) -> Tokenizer:
    """Build a tokenizer.

    Args:
        metadata: of the file.
        path: the file, for messages.
        shape: the model's shape; its `eos_token_ids` are kept.

    Returns:
        The tokenizer.

    Raises:
        FileFormatError: the vocabulary is missing or inconsistent.
        UnsupportedModelError: a kind of tokenizer that is not known here.
    """
    return _Builder(metadata, path, shape).build()


class _Builder:
    """Reads the parts of a tokenizer from metadata."""

    def __init__(self, metadata: Mapping[str, Any], path: Path, shape: ModelShape) -> None:
        self._metadata = metadata
        self._path = path
        self._shape = shape
        self._tokens = self._strings("tokenizer.ggml.tokens")
        if not self._tokens:
            raise FileFormatError(f"{path} has no vocabulary", needed="tokenizer.ggml.tokens")
        self._kinds = self._numbers("tokenizer.ggml.token_type", np.int64, PieceKind.NORMAL)

    def build(self) -> Tokenizer:
        model = self._get("tokenizer.ggml.model", str, None)
        if model == "gpt2":
            codec: TokenCodec = self._byte_level()
        elif model == "llama":
            codec = self._sentencepiece()
        else:
            raise UnsupportedModelError(
                f"{self._path} has a tokenizer of the kind {shorten(model)}",
                needed="gpt2 or llama (tokenizer.ggml.model)",
            )
        names = {}
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        ):
            token_id = self._special_id(key)
            if token_id is not None:
                names[name] = self._tokens[token_id]
        return Tokenizer(
            codec,
            bos_token_id=self._special_id("bos"),
            eos_token_ids=self._end_ids(),
            chat_template=self._get("tokenizer.chat_template", str, None),
            special_tokens=names,
        )

    def _byte_level(self) -> HuggingFaceCodec:
        pre = self._get("tokenizer.ggml.pre", str, "default")
        if pre not in PRE_TOKENIZERS:
            raise UnsupportedModelError(
                f"{self._path} cuts words in the way {shorten(pre)} (tokenizer.ggml.pre)",
                needed="one of " + ", ".join(PRE_TOKENIZERS),
            )
        kind = PRE_TOKENIZERS[pre]
        merges = self._metadata.get("tokenizer.ggml.merges")
        if isinstance(merges, list):
            pairs = [_split_pair(merge, self._path) for merge in merges]
        elif isinstance(merges, StringArray):
            pairs = merges.to_pairs()
        else:
            raise FileFormatError(f"{self._path} has no merges", needed="tokenizer.ggml.merges, a list of pairs")
        vocabulary = self._vocabulary()
        backend = byte_level_backend(vocabulary, pairs, kind=kind, ignore_merges=kind in _BOS_BY_DEFAULT)
        for special, token_kind in ((True, PieceKind.CONTROL), (False, PieceKind.USER_DEFINED)):
            found = (self._tokens[index] for index in np.flatnonzero(self._kinds == token_kind))
            add_tokens(backend, (token for token in found if token), special=special)
        return HuggingFaceCodec(backend, *self._around(kind in _BOS_BY_DEFAULT))

    def _sentencepiece(self) -> SentencePieceCodec:
        scores = self._numbers("tokenizer.ggml.scores", np.float64, None)
        if not np.isfinite(scores).all():
            raise FileFormatError(f"{self._path} has a score that is not finite", needed="finite tokenizer.ggml.scores")
        prefix_ids, suffix_ids = self._around(True)
        return SentencePieceCodec(
            self._vocabulary(),
            self._tokens,
            scores.tolist(),
            self._kinds.tolist(),
            unknown_id=self._special_id("unknown"),
            add_space_prefix=self._get("tokenizer.ggml.add_space_prefix", bool, True),
            prefix_ids=prefix_ids,
            suffix_ids=suffix_ids,
        )

    def _around(self, bos_by_default: bool) -> tuple[list[int], list[int]]:
        """Ids that start and end every text."""
        bos, eos = self._special_id("bos"), self._special_id("eos")
        add_bos = self._get("tokenizer.ggml.add_bos_token", bool, bos_by_default)
        add_eos = self._get("tokenizer.ggml.add_eos_token", bool, False)
        return ([bos] if add_bos and bos is not None else [], [eos] if add_eos and eos is not None else [])

    def _end_ids(self) -> tuple[int, ...]:
        ids = dict.fromkeys(self._shape.eos_token_ids)
        eos = self._special_id("eos")
        if eos is not None:
            ids[eos] = None
        for index in np.flatnonzero(self._kinds == PieceKind.CONTROL).tolist():
            if self._tokens[index] in _END_OF_ANSWER:
                ids[index] = None
        return tuple(ids)

    def _vocabulary(self) -> dict[str, int]:
        vocabulary = dict(zip(self._tokens, range(len(self._tokens)), strict=True))
        if len(vocabulary) != len(self._tokens):
            raise FileFormatError(
                f"{self._path} has {len(self._tokens)} tokens, of which {len(vocabulary)} differ",
                needed="a vocabulary in which no token appears twice",
            )
        return vocabulary

    def _get(self, key: str, kind: type, default: Any) -> Any:
        value = self._metadata.get(key)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise FileFormatError(f"{self._path}: {key} is {shorten(value)}", needed=f"a value of type {kind.__name__}")
        return value

    def _strings(self, key: str) -> list[str]:
        value = self._metadata.get(key)
        if isinstance(value, StringArray):
            return value.to_list()
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return value
        raise FileFormatError(f"{self._path}: {key} is missing or no list of strings", needed="a list of strings")

    def _numbers(self, key: str, dtype: type, default: int | None) -> np.ndarray:
        """One number a token."""
        value = self._metadata.get(key)
        if value is None and default is not None:
            return np.full(len(self._tokens), default, dtype=dtype)
        if not isinstance(value, (list, np.ndarray)) or len(value) != len(self._tokens):
            raise FileFormatError(
                f"{self._path}: {key} is missing or not as long as the vocabulary",
                needed=f"{len(self._tokens)} numbers",
            )
        array = np.asarray(value)
        if array.dtype.kind not in "iuf":
            raise FileFormatError(f"{self._path}: {key} holds no numbers", needed=f"{len(self._tokens)} numbers")
        return array.astype(dtype)

    def _special_id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        token_id: int | None = self._get(key, int, None)
        if token_id is None or 0 <= token_id < len(self._tokens):
            return token_id
        if token_id in (0xFFFF_FFFF, -1):  # writers' way to say that there is none
            return None
        raise FileFormatError(f"{self._path}: {key} is {token_id}", needed=f"an id from 0 to {len(self._tokens) - 1}")


def _split_pair(merge: Any, path: Path) -> tuple[str, str]:
    parts: Sequence[str] = merge.split(" ") if isinstance(merge, str) else ()
    if len(parts) != 2:
        raise FileFormatError(f"{path} has the merge {shorten(merge)}", needed="two tokens with one space between")
    return parts[0], parts[1]
