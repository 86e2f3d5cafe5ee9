"""Documents, rows and labels: every place can be gone on from, and what is wrong with a file is said with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dseek.core.config import from_mapping
from dseek.core.errors import ConfigError
from dseek.models.files import open_model
from dseek.models.tokenizer import Tokenizer
from dseek.train import document_files
from dseek.train.batches import StepData, make_batch
from dseek.train.config import DataConfig
from dseek.train.documents import Corpus, Piece
from dseek.train.encoding import IGNORED, Encoder
from dseek.train.packing import PackedRows, Row
from tests.models import tiny
from tests.train.trainings import write_texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    with open_model(str(tiny.save("llama-16-mqa-tied", tmp_path_factory.mktemp("models")))) as files:
        return files.tokenizer()


def data_of(*files: Path, **changes: Any) -> DataConfig:
    return from_mapping(DataConfig, {"train": [str(file) for file in files], "max_length": 32} | changes)


def corpus_of(*files: Path, seed: int = 0, **changes: Any) -> Corpus:
    config = data_of(*files, **changes)
    return Corpus(config.train, config, seed=seed, shuffle=config.shuffle)


def pieces_of(corpus: Corpus, epoch: int = 0) -> list[Piece]:
    found, position = [], corpus.start(epoch)
    while (piece := corpus.read(position)) is not None:
        found.append(piece)
        assert piece.after is not None
        position = piece.after
    return found


def rows_of(corpus: Corpus, tokenizer: Tokenizer, *, packing: str = "auto", separate: bool = True) -> PackedRows:
    encoder = Encoder(tokenizer, assistant_only_loss=True, vocab_size=384)
    return PackedRows(corpus, encoder, max_length=32, packing=packing, separate=separate)


def take(rows: PackedRows, count: int) -> list[Row]:
    stream = rows.rows(rows.start(), repeat=True)
    return [next(stream) for _ in range(count)]


def texts_in(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def write_parquet(path: Path, texts: list[str | None]) -> Path:
    pyarrow.parquet.write_table(
        pyarrow.table({"number": list(range(len(texts))), "text": texts}), path, row_group_size=7
    )
    return path


def test_files_of_every_kind_give_their_documents(tmp_path: Path) -> None:
    lines = write_texts(tmp_path / "a.jsonl", 20)
    texts = texts_in(lines)
    (tmp_path / "b.txt").write_text("\ufefffirst line\nsecond line\n\n\nother paragraph\n")
    assert [piece.content for piece in pieces_of(corpus_of(lines))] == texts
    parquet = write_parquet(tmp_path / "c.parquet", [*texts, None, ""])
    assert [piece.content for piece in pieces_of(corpus_of(parquet))] == texts
    cases = {"document": 1, "paragraph": 2, "line": 3}
    for sample_by, count in cases.items():
        found = pieces_of(corpus_of(tmp_path / "b.txt", sample_by=sample_by))
        assert len(found) == count and found[0].content.startswith("first line")
    both = corpus_of(tmp_path / "*.txt", parquet, lines)
    assert len(pieces_of(both)) == 1 + 2 * len(texts)


def test_a_long_text_comes_in_pieces_that_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_files, "PIECE_BYTES", 64)
    text = "".join(f"line {number}: naïve café, 東京 🙂\n" for number in range(30)) + "🙂" * 50
    (tmp_path / "long.txt").write_text(text)
    for shuffle in (False, True):
        pieces = pieces_of(corpus_of(tmp_path / "long.txt", shuffle=shuffle))
        assert "".join(piece.content for piece in pieces) == text
        assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "lines"])
def test_a_shuffled_order_has_every_document_once(tmp_path: Path, kind: str) -> None:
    texts = texts_in(write_texts(tmp_path / "a.jsonl"))
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    write_parquet(tmp_path / "a.parquet", list(texts))
    file = tmp_path / {"jsonl": "a.jsonl", "parquet": "a.parquet", "lines": "a.txt"}[kind]
    orders = [
        [piece.content for piece in pieces_of(corpus_of(file, seed=seed, shuffle=True, sample_by="line"), epoch)]
        for seed, epoch in ((1, 0), (1, 1), (2, 0))
    ]
    assert all(sorted(order) == sorted(texts) != order for order in orders)
    assert orders[0] != orders[1] and orders[0] != orders[2]


@pytest.mark.parametrize("packing", ["wrapped", "whole"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_rows_go_on_from_any_place(tmp_path: Path, tokenizer: Tokenizer, packing: str, shuffle: bool) -> None:
    file = write_texts(tmp_path / "a.jsonl", 9)
    rows = rows_of(corpus_of(file, shuffle=shuffle), tokenizer, packing=packing)
    all_rows = take(rows, 40)
    assert all_rows[-1].after.position.epoch >= 2
    for place in range(0, 39, 3):
        again = rows_of(corpus_of(file, shuffle=shuffle), tokenizer, packing=packing)
        assert next(again.rows(all_rows[place].after, repeat=True)) == all_rows[place + 1]
    assert all(len(row.token_ids) == len(row.labels) == len(row.documents) == 32 for row in all_rows)


def test_wrapped_rows_hold_every_token_and_whole_ones_every_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_texts(tmp_path / "a.jsonl", 9)
    encoded = [[*tokenizer.encode(text, add_special_tokens=False), 2] for text in texts_in(file)]
    wrapped = rows_of(corpus_of(file), tokenizer, separate=False)
    rows = list(wrapped.rows(wrapped.start(), repeat=False))
    flat = [token for row in rows for token in row.token_ids]
    tokens = [token for ids in encoded for token in ids]
    assert flat[: len(tokens)] == tokens and len(flat) - len(tokens) < 32
    whole = rows_of(corpus_of(file), tokenizer, packing="whole")
    rows = list(whole.rows(whole.start(), repeat=False))
    found = []
    for row in rows:
        for document in sorted(set(row.documents)):
            found.append([token for token, of in zip(row.token_ids, row.documents, strict=True) if of == document])
    assert all(ids[:32] in found for ids in encoded)
    for row in rows:
        firsts = [place for place in range(1, 32) if row.documents[place] != row.documents[place - 1]]
        assert all(row.labels[place] == IGNORED for place in firsts)


def test_a_document_with_padding_behind_it_needs_no_mask(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file, long = tmp_path / "a.jsonl", ""
    while len(tokenizer.encode(long, add_special_tokens=False)) < 29:
        long += "x"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("fox", "dog", long)))
    whole = rows_of(corpus_of(file), tokenizer, packing="whole")
    rows = list(whole.rows(whole.start(), repeat=False))
    learned = [{of for of, label in zip(row.documents, row.labels, strict=True) if label != IGNORED} for row in rows]
    for row, documents in zip(rows, learned, strict=True):
        assert (make_batch([row], separate=True).documents is None) == (documents == {0})
        assert make_batch([row], separate=False).documents is None
    assert learned == [{0, 1}, {0}]


def test_any_number_of_ranks_shares_the_same_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_texts(tmp_path / "a.jsonl")

    def steps(batch_size: int, world_size: int) -> list[list[list[int]]]:
        found: list[list[list[int]]] = [[], []]
        for rank in range(world_size):
            rows = rows_of(corpus_of(file), tokenizer)
            shared = {"batch_size": batch_size, "num_batches": 2, "rank": rank, "world_size": world_size}
            data = StepData(rows, rows.start(), separate=True, **shared)
            for step in found:
                step += [row for batch in data.next().batches for row in batch.token_ids.tolist()]
            data.close()
        return [sorted(step) for step in found]

    assert steps(4, 1) == steps(2, 2) == steps(1, 4)


def test_conversations_are_learned_by_their_answers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "a small question"},
        {"role": "assistant", "content": "the answer"},
        {"role": "user", "content": "again?"},
        {"role": "assistant", "content": "and then it stops"},
    ]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    piece = pieces_of(corpus_of(tmp_path / "chat.jsonl"))[0]
    encoded = Encoder(tokenizer, assistant_only_loss=True, vocab_size=384).encode(piece)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    assert tokenizer.decode(encoded.token_ids, skip_special_tokens=False) == text
    learned = [label for label in encoded.labels if label != IGNORED]
    assert tokenizer.decode(learned, skip_special_tokens=False) == "the answer<|end|>and then it stops<|end|>"
    everything = Encoder(tokenizer, assistant_only_loss=False, vocab_size=384).encode(piece)
    assert sum(label == IGNORED for label in everything.labels) == 2  # the line ends behind the answers


def test_what_is_wrong_with_a_conversation_is_said(tmp_path: Path, tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer, assistant_only_loss=True, vocab_size=384)

    def refused(messages: object, message: str) -> None:
        file = tmp_path / "bad.jsonl"
        file.write_text("\n" + json.dumps({"messages": messages}) + "\n")
        with pytest.raises(ConfigError, match=message):
            encoder.encode(pieces_of(corpus_of(file))[0])

    refused([{"role": "assistant", "content": "first"}], r"bad\.jsonl.*begins with an answer")
    refused([{"role": "user", "content": "?"}], "has no answer")
    refused([{"content": "no role"}], r"line 2.*no conversation")
    refused("text", r"line 2.*no conversation")
    with pytest.raises(ConfigError, match="beyond the model's vocabulary"):
        Encoder(tokenizer, assistant_only_loss=True, vocab_size=50).encode(Piece("zzz", True, True, "here", None))


def test_hostile_files_are_refused_with_their_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = json.dumps({"text": "good"}) + "\n"

    def refused(name: str, content: bytes, message: str, **changes: Any) -> None:
        file = tmp_path / name
        file.write_bytes(content)
        for shuffle in (False, True):
            with pytest.raises(ConfigError, match=message):
                pieces_of(corpus_of(file, shuffle=shuffle, **changes))

    refused("a.jsonl", (good * 2 + "{no json\n").encode(), r"a\.jsonl, line 3 is no JSON")
    refused("a.jsonl", (good + "[" * 100_000 + "\n").encode(), r"line 2 is no JSON")
    refused("a.jsonl", (good + "\n[1]\n").encode(), r"line 3 holds a list")
    refused("a.jsonl", (good + '{"txt": ""}\n').encode(), r"line 2 has the keys txt.*'text' or 'messages'")
    refused("a.jsonl", b'{"text": 7}\n', r"line 1.*is a int")
    refused("a.jsonl", good.encode() + b'{"text": "\xff"}\n', r"line 2: byte 0xff is not UTF-8")
    refused("a.txt", b"good\n\xc3\n", r"line 2: byte 0xc3 is not UTF-8")
    refused("a.parquet", b"PAR1 no parquet", "cannot be read as parquet")
    refused("a.txt.gz", b"\x1f\x8b", "is compressed")
    write_parquet(tmp_path / "b.parquet", ["text"])
    with pytest.raises(ConfigError, match="has the columns number, text"):
        corpus_of(tmp_path / "b.parquet", text_column="content")
    with pytest.raises(ConfigError, match="no file matches"):
        corpus_of(tmp_path / "nothing-*.txt")
    monkeypatch.setattr(document_files, "MAX_UNIT_BYTES", 1000)
    refused("a.jsonl", (good + '{"text": "' + "x" * 1000 + '"}\n').encode(), r"line 2: a line has more than")


def test_files_without_text_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name, content in (("a.txt", " \n\n"), ("b.jsonl", '{"text": ""}\n\n'), ("c.jsonl", "")):
        (tmp_path / name).write_text(content)
        for shuffle in (False, True):
            with pytest.raises(ConfigError, match="there is no text in"):
                take(rows_of(corpus_of(tmp_path / name, shuffle=shuffle), tokenizer), 1)
