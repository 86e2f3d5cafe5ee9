"""Tokenizers against transformers, from GGUF and from a folder; streaming; the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dseek.core.errors import FileFormatError, RequestError, UnsupportedModelError
from dseek.models.files import open_model
from dseek.models.folder_tokenizer import tokenizer_from_folder
from dseek.models.tokenizer import Tokenizer
from tests.models import gguf_building, texts, tiny
from tests.models.gguf_building import write_model

CHAT = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "Hi 🙂"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Why?"},
]


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> str:
    """Decode token by token."""
    stream = tokenizer.stream(skip_special_tokens)
    return "".join(stream.push(token_id) for token_id in ids) + stream.flush()


@pytest.fixture(scope="module")
def smollm(embedded_model: Path) -> Tokenizer:
    return open_model(str(embedded_model)).tokenizer()


@pytest.fixture(scope="module")
def reference(embedded_model: Path) -> Any:
    """transformers' tokenizer of the same file, its word pattern corrected.

    transformers does not know the `smollm` pattern and uses that of GPT-2, which leaves a space before a digit to the
    digit; the model's own tokenizer.json cuts digits off first.
    """
    transformers = pytest.importorskip("transformers")
    from tokenizers import pre_tokenizers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(embedded_model.parent), gguf_file=embedded_model.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def test_embedded_tokenizer_equals_transformers(smollm: Tokenizer, reference: Any) -> None:
    special = ["<|im_start|>user\nhi<|im_end|>\n", "x<|endoftext|> y", "<|im_start", "<repo_name>a<filename>"]
    for text in texts.PLAIN + special + texts.random_texts(200) + texts.source_files(20):
        ids = smollm.encode(text)
        assert ids == reference.encode(text), text[:80]
        for skip in (True, False):
            assert smollm.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)
            assert streamed(smollm, ids, skip) == smollm.decode(ids, skip)
    assert smollm.vocab_size == 49_152
    assert (smollm.bos_token_id, smollm.eos_token_ids) == (1, (2, 0))
    assert smollm.apply_chat_template(CHAT) == reference.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )


def test_any_ids_stream_like_they_decode(smollm: Tokenizer) -> None:
    import random

    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(300) if rng.random() < 0.7 else rng.randrange(49_152) for _ in range(rng.randrange(12))]
        text = smollm.decode(ids)
        # Nine broken bytes in a row may be cut differently: they stay broken either way.
        assert streamed(smollm, ids).replace("\ufffd", "") == text.replace("\ufffd", "")


def test_stream_never_shows_half_a_character(smollm: Tokenizer) -> None:
    stream = smollm.stream()
    pieces = [stream.push(token_id) for token_id in smollm.encode("naïve 🙂 日本語 👩‍👩‍👧")]
    assert all("\ufffd" not in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 8
    half = smollm.encode("🙂")[:1]
    assert (stream.push(half[0]), stream.flush()) == ("", "\ufffd")


def test_bad_ids_and_texts_are_refused(smollm: Tokenizer) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        smollm.encode("a\ud800b")
    with pytest.raises(RequestError, match="-1"):
        smollm.decode([3, -1])
    assert smollm.decode([10**6]) == ""
    assert smollm.encode("") == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save("llama", tmp_path / "model")


def test_folder_tokenizer_equals_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    with open_model(str(folder)) as files:
        ours = files.tokenizer()
        assert files.tokenizer() is ours
        assert files.chat_template == tiny.CHAT_TEMPLATE
    for text in [*texts.PLAIN, "<|start|>user\nhi<|end|>", *texts.random_texts(50)]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == streamed(ours, ids)
    assert ours.apply_chat_template(CHAT) == theirs.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )
    assert (ours.bos_token_id, ours.eos_token_ids) == (1, (2,))
    assert ours.token_id("<|end|>") == 2 and ours.token_id("no such token") is None


def test_end_tokens_come_from_every_file(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3, 10**9]}))
    assert tokenizer_from_folder(folder, config).eos_token_ids == (0, 3, 2)
    (folder / "generation_config.json").unlink()
    assert tokenizer_from_folder(folder, config | {"eos_token_id": [3, True, "x"]}).eos_token_ids == (3, 2)
    (folder / "tokenizer_config.json").unlink()
    assert tokenizer_from_folder(folder, config).eos_token_ids == (2,)


def test_chat_template_is_found_where_checkpoints_keep_it(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values["chat_template"] = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    values["eos_token"] = {"content": "<|end|>", "special": True}
    path.write_text(json.dumps(values))
    tokenizer = tokenizer_from_folder(folder, {})
    assert tokenizer.chat_template == "D" and tokenizer.eos_token_ids == (2,)
    (folder / "chat_template.jinja").write_text("J{{ eos_token }}")
    assert tokenizer_from_folder(folder, {}).apply_chat_template([]) == "J<|end|>"


def test_truncation_and_padding_of_tokenizer_json_have_no_effect(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["truncation"] = {"max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    assert len(tokenizer_from_folder(folder, {}).encode("one two three four")) > 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}', '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_broken_tokenizer_json_is_refused(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(FileFormatError, match=r"tokenizer\.json"):
        tokenizer_from_folder(folder, {})
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileFormatError, match=r"no tokenizer\.json"):
        tokenizer_from_folder(folder, {})


def _gguf_tokenizer(path: Path, **changes: Any) -> Tokenizer:
    """The tokenizer of a GGUF file with some metadata changed (`ggml` keys)."""
    entries = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    vocabulary = gguf_building.byte_level_metadata() | entries
    write_model(path, tokenizer={key: value for key, value in vocabulary.items() if value is not None})
    with open_model(str(path)) as files:
        return files.tokenizer()


@pytest.mark.parametrize(
    ("pre", "family"), [("smollm", None), ("gpt-2", None), (None, None), ("llama-bpe", "llama3"), ("qwen2", "qwen2")]
)
def test_word_patterns(tmp_path: Path, pre: str | None, family: str | None) -> None:
    """Each kind against a tokenizer put together from the pattern that the family publishes."""
    from tokenizers import Regex, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    ours = _gguf_tokenizer(tmp_path / "m.gguf", pre=pre, add_bos_token=False)
    theirs = Backend.from_str(tiny.tokenizer_json())
    if family is not None:
        digits = {"llama3": r"\p{N}{1,3}", "qwen2": r"\p{N}"}[family]
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
            + digits
            + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        theirs.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if family == "qwen2":
        theirs.normalizer = normalizers.NFC()
    if pre == "smollm":
        theirs.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    for text in texts.PLAIN + texts.random_texts(50, seed=2):
        assert ours.encode(text) == theirs.encode(text).ids, text


def test_start_and_end_tokens_as_the_metadata_says(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    plain = _gguf_tokenizer(path).encode("the")
    assert _gguf_tokenizer(path, add_bos_token=True, add_eos_token=True).encode("the") == [1, *plain, 2]
    assert _gguf_tokenizer(path, add_bos_token=True).encode("the", add_special_tokens=False) == plain
    assert _gguf_tokenizer(path, pre="llama-bpe").encode("the") == [1, *plain]
    assert _gguf_tokenizer(path, bos_token_id=0xFFFF_FFFF, add_bos_token=True).encode("the") == plain


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "bert"}, UnsupportedModelError, "bert"),
        ({"pre": "jais"}, UnsupportedModelError, "jais"),
        ({"merges": None}, FileFormatError, "no merges"),
        ({"merges": ["t h", "th"]}, FileFormatError, "merge"),
        ({"merges": ["t h", "qq zz"]}, FileFormatError, "do not fit together"),
        ({"token_type": [1, 2]}, FileFormatError, "token_type"),
        ({"eos_token_id": 100_000}, FileFormatError, "eos_token_id"),
        ({"eos_token_id": "2"}, FileFormatError, "eos_token_id"),
        ({"tokens": ["same"] * 384}, FileFormatError, "twice"),
        ({"tokens": list(range(384))}, FileFormatError, "tokens"),
    ],
)
def test_inconsistent_vocabularies_are_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        _gguf_tokenizer(tmp_path / "m.gguf", **changes)
