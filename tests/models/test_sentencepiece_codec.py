"""SentencePiece BPE from pieces and scores, against the sentencepiece library on a model trained here."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from dseek.core.errors import FileFormatError
from dseek.models.files import open_model
from dseek.models.tokenizer import Tokenizer
from tests.models import texts
from tests.models.gguf_building import write_model

sentencepiece = pytest.importorskip("sentencepiece")


@pytest.fixture(scope="module", params=[True, False], ids=["words", "across words"])
def processor(request: pytest.FixtureRequest) -> Any:
    """A model trained with the settings of Llama 2 (no normalisation, digits split, bytes as fallback)."""
    stream = io.BytesIO()
    lines = [line for text in texts.source_files(12, 20_000) for line in text.splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=stream,
        vocab_size=1500,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        split_by_whitespace=request.param,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<tool>"],
        minloglevel=2,
        num_threads=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())


def metadata_of(processor: Any, **changes: Any) -> dict[str, Any]:
    """GGUF metadata of a sentencepiece model, as llama.cpp's converter writes it."""
    ids = range(processor.get_piece_size())
    kinds = []
    for i in ids:
        kind = 4 if processor.id_to_piece(i) == "<tool>" else 1
        kind = 3 if processor.is_control(i) else 2 if processor.is_unknown(i) else kind
        kinds.append(6 if processor.is_byte(i) else kind)
    entries = {
        "model": "llama",
        "tokens": [processor.id_to_piece(i) for i in ids],
        "scores": [float(processor.get_score(i)) for i in ids],
        "token_type": kinds,
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "unknown_token_id": processor.unk_id(),
    }
    entries |= changes
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items() if value is not None}


def open_tokenizer(path: Path, metadata: dict[str, Any]) -> Tokenizer:
    """Write a GGUF file with this vocabulary and open its tokenizer."""
    write_model(path, tokenizer=metadata)
    with open_model(str(path)) as files:
        return files.tokenizer()


def test_equals_the_sentencepiece_library(tmp_path: Path, processor: Any) -> None:
    tokenizer = open_tokenizer(tmp_path / "m.gguf", metadata_of(processor))
    for text in texts.PLAIN + texts.random_texts(100) + texts.source_files(6) + ["a <tool> b", "aaaaaaa", "=" * 77]:
        # The library drops NUL bytes while it trains, and then does not know them as text.
        text = text.replace("\0", "")
        ids = tokenizer.encode(text, add_special_tokens=False)
        # A text that is split at a user's symbol starts anew behind it, with a space of its own, as in llama.cpp.
        expected = processor.encode(text)
        if "<tool>" not in text:
            assert ids == expected, text[:60]
        assert tokenizer.encode(text) == [processor.bos_id(), *ids]
        decoded = tokenizer.decode(ids)
        if "<tool>" not in text and "\ufffd" not in text:
            assert decoded == processor.decode(ids)
            assert decoded == text.replace("▁", " ")
        stream = tokenizer.stream()
        assert "".join(stream.push(token_id) for token_id in ids) + stream.flush() == decoded


def test_special_tokens_in_the_text(tmp_path: Path, processor: Any) -> None:
    tokenizer = open_tokenizer(tmp_path / "m.gguf", metadata_of(processor))
    ids = tokenizer.encode("<s>x</s>", add_special_tokens=False)
    assert (ids[0], ids[-1]) == (processor.bos_id(), processor.eos_id())
    assert tokenizer.decode(ids) == "x"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s> x</s>"
    assert tokenizer.eos_token_ids == (processor.eos_id(),)
    assert tokenizer.vocab_size == processor.get_piece_size()
    stream = tokenizer.stream()
    assert "".join(stream.push(token_id) for token_id in ids) + stream.flush() == "x"


def test_no_space_is_put_before_where_the_metadata_says_so(tmp_path: Path, processor: Any) -> None:
    tokenizer = open_tokenizer(tmp_path / "m.gguf", metadata_of(processor, add_space_prefix=False))
    ids = tokenizer.encode("def", add_special_tokens=False)
    assert tokenizer.decode(ids) == "def"
    assert ids != processor.encode("def")
    assert tokenizer.decode(tokenizer.encode(" def")) == " def"


def test_unknown_characters_without_byte_pieces(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -4.0, -5.0, -6.0, -1.0, -2.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1],
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = open_tokenizer(tmp_path / "m.gguf", metadata)
    assert tokenizer.encode("abcab") == [7, 0, 6]
    assert tokenizer.decode([7, 0, 6]) == "abab"


@pytest.mark.parametrize("changes", [{"scores": [0.5]}, {"scores": None}, {"scores": [float("nan")] * 1500}])
def test_scores_must_fit(tmp_path: Path, processor: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(FileFormatError, match="score"):
        open_tokenizer(tmp_path / "m.gguf", metadata_of(processor, **changes))


def test_a_long_word_is_cut_in_reasonable_time(tmp_path: Path, processor: Any) -> None:
    tokenizer = open_tokenizer(tmp_path / "m.gguf", metadata_of(processor))
    text = "ab" * 50_000
    assert tokenizer.decode(tokenizer.encode(text)) == text
