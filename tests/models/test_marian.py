"""Marian models: transformers reads what is written here and the other way round, and bad folders are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dseek.core.errors import ConfigError, DseekError, FileFormatError, UnsupportedModelError
from dseek.models.files import open_model
from dseek.models.marian_files import is_marian, open_marian, open_tokenizer
from dseek.models.marian_shape import MarianShape, marian_shape
from tests.models.tiny_marian import SENTENCES, pad, tiny_folder

CONFIG = MarianShape(vocab_size=50).config()


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_transformers_reads_what_is_written_and_computes_the_same(tmp_path: Path, activation: str) -> None:
    from transformers import AutoTokenizer, MarianMTModel

    model = tiny_folder(tmp_path, activation=activation)
    theirs = MarianMTModel.from_pretrained(tmp_path).eval()
    tokenizer, our_tokenizer = AutoTokenizer.from_pretrained(tmp_path), open_tokenizer(tmp_path)
    sources = [our_tokenizer.encode(sentence) for sentence in SENTENCES[:2]]
    assert sources == tokenizer(list(SENTENCES[:2])).input_ids
    assert [our_tokenizer.decode(source) for source in sources] == list(SENTENCES[:2])
    ids, mask = pad(sources)
    target = torch.randint(3, 50, (2, 7))
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=target).logits
        torch.testing.assert_close(model(ids, target, mask), expected, rtol=0, atol=2e-5)


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    from transformers import MarianConfig, MarianMTModel

    sizes: dict[str, Any] = {"d_model": 32, "vocab_size": 60, "decoder_start_token_id": 59, "pad_token_id": 59}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 1, "decoder_layers": 3}
    sizes |= {"encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "activation_function": "swish", "scale_embedding": True}
    theirs = MarianMTModel(MarianConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    model = open_marian(tmp_path)
    ids, target = torch.randint(0, 58, (3, 9)), torch.randint(0, 58, (3, 4))
    with torch.no_grad():
        expected = theirs(input_ids=ids, decoder_input_ids=target).logits
        torch.testing.assert_close(model(ids, target), expected, rtol=0, atol=1e-5)
    assert model.shape.start_id == 59 and model.shape.activation == "silu"


def test_decoding_with_a_past_is_decoding_at_once(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path)
    ids, mask = pad([[5, 6, 7, 1], [9, 1]])
    target = torch.tensor([[0, 5, 6, 9], [0, 8, 7, 4]])
    with torch.no_grad():
        expected = model(ids, target, mask)
        source, past = model.source_cache(model.encode(ids, mask)), None
        for step in range(4):
            hidden, past = model.decode(target[:, step : step + 1], source, mask, past)
            torch.testing.assert_close(model.head(hidden)[:, 0], expected[:, step], rtol=0, atol=1e-5)


def test_models_with_a_decoder_alone_are_told_apart(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    assert is_marian(tmp_path)
    with pytest.raises(UnsupportedModelError, match="marian"):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model_type": "bart"}, UnsupportedModelError, "bart"),
        ({"d_model": -4}, ConfigError, "d_model"),
        ({"d_model": 1 << 40}, ConfigError, "d_model"),
        ({"d_model": "256"}, ConfigError, "d_model"),
        ({"encoder_attention_heads": 5}, ConfigError, "divisor"),
        ({"decoder_ffn_dim": 7}, UnsupportedModelError, "both sides"),
        ({"activation_function": "tanh"}, ConfigError, "relu"),
        ({"eos_token_id": 50}, ConfigError, "eos_token_id"),
        ({"pad_token_id": None}, ConfigError, "pad_token_id"),
        ({"tie_word_embeddings": False}, UnsupportedModelError, "tie_word_embeddings"),
        ({"normalize_before": True}, UnsupportedModelError, "normalize_before"),
        ({"quantization_config": {"bits": 4}}, UnsupportedModelError, "quantization_config"),
        ({"max_position_embeddings": 0}, ConfigError, "max_position_embeddings"),
        ({"encoder_layers": 10**9}, ConfigError, "encoder_layers"),
    ],
)
def test_a_configuration_is_not_trusted(change: dict[str, Any], error: type[DseekError], says: str) -> None:
    with pytest.raises(error, match=says):
        marian_shape(CONFIG | change)


@pytest.mark.parametrize("words", [[[1, 2]], [[60]], [["a"]], [[True]], "no", [1]])
def test_forbidden_tokens_are_not_trusted(words: Any) -> None:
    with pytest.raises(ConfigError, match="bad_words_ids"):
        marian_shape(CONFIG, {"bad_words_ids": words})


def test_a_shape_survives_its_configuration() -> None:
    shape = MarianShape(vocab_size=50, activation="gelu", suppressed_ids=(0, 7), num_decoder_layers=5)
    written = json.loads(json.dumps([shape.config(), shape.generation_config()]))
    assert marian_shape(*written) == shape


@pytest.mark.parametrize("damage", ["missing", "shape", "unknown", "untied", "cut"])
def test_damaged_weights_are_refused(tmp_path: Path, damage: str) -> None:
    tiny_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.decoder.layers.1.fc2.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    elif damage == "unknown":
        tensors["model.decoder.layers.9.fc2.weight"] = tensors[name].clone()
    elif damage == "untied":
        tensors["lm_head.weight"] = tensors["model.shared.weight"] + 1
    save_file(tensors, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises((FileFormatError, UnsupportedModelError)):
        open_marian(tmp_path)
