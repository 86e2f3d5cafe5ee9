"""`SentencePieceCodec`: SentencePiece's BPE, from pieces and scores as GGUF files store them.

Neighbouring pieces are merged as long as some pair's joined text is a piece, the highest score first and the leftmost
of equal ones; a character that ends up outside the vocabulary becomes its UTF-8 bytes. No merge list is needed, and
building one (which other readers do) would not keep the leftmost-first rule.

Source: Kudo and Richardson 2018, SentencePiece; the algorithm of `bpe_model.cc` in google/sentencepiece.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from enum import IntEnum

from dseek.models.tokenizer import TokenCodec

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""Stands for a space inside pieces."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MAX_CACHED_WORDS = 1 << 16
_MAX_CACHED_CHARS = 64


class PieceKind(IntEnum):
    """Kinds of tokens, numbered as in GGUF (and in SentencePiece's own files)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class SentencePieceCodec(TokenCodec):
    """A SentencePiece BPE vocabulary.

    Args:
        vocabulary: piece to id.
        pieces: id to piece.
        scores: one a piece; higher is merged earlier.
        kinds: one a piece, of `PieceKind`.
        unknown_id: stands for what the vocabulary cannot spell, or None.
        add_space_prefix: a text starts as if a space came before it.
        prefix_ids: put before a text by `add_special_tokens`.
        suffix_ids: put after it.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        pieces: Sequence[str],
        scores: Sequence[float],
        kinds: Sequence[int],
        *,
        unknown_id: int | None,
        add_space_prefix: bool,
        prefix_ids: Sequence[int] = (),
        suffix_ids: Sequence[int] = (),
    ) -> None:
        self._vocabulary = vocabulary
        self._pieces = pieces
        self.vocab_size = len(pieces)
        self._kinds = kinds
        self._unknown_id = unknown_id
        self._add_space_prefix = add_space_prefix
        self._prefix_ids = list(prefix_ids)
        self._suffix_ids = list(suffix_ids)

        plain = (PieceKind.NORMAL, PieceKind.USER_DEFINED)
        self._scores = {piece: scores[index] for index, piece in enumerate(pieces) if kinds[index] in plain}
        self._byte_ids: dict[int, int] = {}
        whole: list[str] = []
        for index, kind in enumerate(kinds):
            if kind == PieceKind.BYTE:
                match = _BYTE_PIECE.fullmatch(pieces[index])
                if match is not None:
                    self._byte_ids[int(match[1], 16)] = index
            elif kind in (PieceKind.CONTROL, PieceKind.USER_DEFINED) and pieces[index]:
                whole.append(pieces[index])
        self._id_bytes = {index: byte for byte, index in self._byte_ids.items()}
        self._whole = set(whole)
        pattern = "|".join(re.escape(piece) for piece in sorted(whole, key=len, reverse=True))
        self._whole_pattern = re.compile(f"({pattern})") if pattern else None
        # Where no piece has a space behind other text, no merge crosses a word's start: words can be cut one by one.
        crossing = re.compile(f"[^{SPACE}]{SPACE}")
        self._word_pattern = (
            None
            if any(crossing.search(piece) for piece in self._scores)
            else re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
        )
        self._cache: dict[str, list[int]] = {}

    def token_id(self, token: str) -> int | None:
        return self._vocabulary.get(token)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        text.encode("utf-8")
        ids = list(self._prefix_ids) if add_special_tokens else []
        prefix = self._add_space_prefix
        for part in self._whole_pattern.split(text) if self._whole_pattern else (text,):
            if not part:
                continue
            if part in self._whole:
                ids.append(self._vocabulary[part])
                prefix = self._add_space_prefix
                continue
            escaped = part.replace(" ", SPACE)
            self._encode_plain(SPACE + escaped if prefix else escaped, ids)
            prefix = False
        if add_special_tokens:
            ids += self._suffix_ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        data = bytearray()
        for token_id in token_ids:
            if token_id >= len(self._pieces):
                continue
            kind = self._kinds[token_id]
            if kind == PieceKind.BYTE and token_id in self._id_bytes:
                data.append(self._id_bytes[token_id])
            elif kind not in (PieceKind.CONTROL, PieceKind.UNKNOWN):
                data += self._pieces[token_id].replace(SPACE, " ").encode("utf-8")
            elif not skip_special_tokens:
                data += self._pieces[token_id].encode("utf-8")
        text = data.decode("utf-8", errors="replace")
        return text[1:] if self._add_space_prefix and text.startswith(" ") else text

    def _encode_plain(self, text: str, ids: list[int]) -> None:
        """Append the ids of text without special tokens, its spaces escaped."""
        words = self._word_pattern.findall(text) if self._word_pattern else (text,)
        for word in words:
            found = self._cache.get(word)
            if found is None:
                found = self._encode_word(word)
                if len(word) <= _MAX_CACHED_CHARS:
                    if len(self._cache) >= _MAX_CACHED_WORDS:
                        self._cache.clear()
                    self._cache[word] = found
            ids += found

    def _encode_word(self, word: str) -> list[int]:
        ids: list[int] = []
        for piece in self._merge(word):
            if piece in self._scores:
                ids.append(self._vocabulary[piece])
                continue
            encoded = piece.encode("utf-8")
            if all(byte in self._byte_ids for byte in encoded):
                ids.extend(self._byte_ids[byte] for byte in encoded)
            elif self._unknown_id is not None:
                ids.append(self._unknown_id)
        return ids

    def _merge(self, word: str) -> list[str]:
        """Merge characters into pieces, highest score first, leftmost first among equal ones."""
        symbols = list(word)
        following = list(range(1, len(symbols) + 1))
        preceding = list(range(-1, len(symbols) - 1))
        scores = self._scores
        queue: list[tuple[float, int, str]] = []
        for left in range(len(symbols) - 1):
            joined = symbols[left] + symbols[left + 1]
            if joined in scores:
                queue.append((-scores[joined], left, joined))
        heapq.heapify(queue)
        while queue:
            _, left, joined = heapq.heappop(queue)
            right = following[left]
            # One of the two may have been merged since: its text then is another (a merged-away symbol is empty).
            if not symbols[left] or right >= len(symbols) or symbols[left] + symbols[right] != joined:
                continue
            symbols[left], symbols[right] = joined, ""
            after = following[left] = following[right]
            if after < len(symbols):
                preceding[after] = left
                longer = joined + symbols[after]
                if longer in scores:
                    heapq.heappush(queue, (-scores[longer], left, longer))
            before = preceding[left]
            if before >= 0:
                longer = symbols[before] + joined
                if longer in scores:
                    heapq.heappush(queue, (-scores[longer], before, longer))
        return [symbol for symbol in symbols if symbol]
