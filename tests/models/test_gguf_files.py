"""Whole models in GGUF: row order, parts, checks against the shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dseek.core.errors import DseekError, FileFormatError, UnsupportedModelError
from dseek.models.encoding import to_float32
from dseek.models.files import ModelFiles, open_model
from tests.models import gguf_building
from tests.models.gguf_building import write_model


def assert_weights(files: ModelFiles, expected: dict[str, np.ndarray]) -> None:
    """Every tensor of the model is there, in Hugging Face's layout."""
    assert files.tensor_names() == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(to_float32(files.tensor(name)), values, err_msg=name)


@pytest.mark.parametrize("encoding", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_weights_come_back_in_hugging_face_order(tmp_path: Path, architecture: str, encoding: str) -> None:
    expected = write_model(tmp_path / "m.gguf", architecture, encoding=encoding, tied=architecture != "qwen2")
    with open_model(str(tmp_path / "m.gguf")) as files:
        assert files.shape.family == architecture
        assert files.shape.qkv_bias is (architecture == "qwen2")
        assert_weights(files, expected)
        assert set(files.encodings()) == {"F32", encoding}
        assert sum(files.encodings().values()) == sum(values.size for values in expected.values())
        assert files.num_bytes == sum(len(files.tensor(name).data) for name in expected)
        assert files.has("model.norm.weight") and not files.has("blk.0.attn_q.weight")


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # of qwen3 transformers reads only heads of 128
def test_small_models_equal_transformers(tmp_path: Path, architecture: str) -> None:
    """The weights are those that transformers reads from the same file, the rotary row order included."""
    import transformers

    path = tmp_path / "m.gguf"
    write_model(path, architecture, encoding="Q8_0", tied=architecture == "llama")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file=path.name, dtype="float32"
    ).state_dict()
    with open_model(str(path)) as files:
        for name in files.tensor_names():
            np.testing.assert_allclose(to_float32(files.tensor(name)), theirs[name].numpy(), atol=1e-6, err_msg=name)
        assert set(theirs) - {"lm_head.weight"} == set(files.tensor_names()) - {"lm_head.weight"}


def test_embedded_model_opens(embedded_model: Path) -> None:
    with open_model(str(embedded_model)) as files:
        assert files.shape.tie_word_embeddings
        assert files.shape.num_parameters() == sum(files.encodings().values()) == 134_515_008
        assert files.encodings() == {"Q8_0": 28_311_552, "F32": 35_136, "Q4_1": 106_168_320}
        assert files.num_bytes < embedded_model.stat().st_size


def test_parts(tmp_path: Path) -> None:
    expected = write_model(tmp_path / "m.gguf", parts=3)
    first = tmp_path / "m-00001-of-00003.gguf"
    with open_model(str(first)) as files:
        assert_weights(files, expected)
        assert files.tokenizer().vocab_size == gguf_building.SIZES["vocab"]
    with open_model(str(tmp_path)) as files:  # the folder holds one model
        assert_weights(files, expected)
    with pytest.raises(FileFormatError, match=r"part 2 of 3.*m-00001-of-00003"):
        open_model(str(tmp_path / "m-00002-of-00003.gguf"))
    (tmp_path / "m-00003-of-00003.gguf").write_bytes((tmp_path / "m-00002-of-00003.gguf").read_bytes())
    with pytest.raises(FileFormatError, match="does not say that it is part 3"):
        open_model(str(first))
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(FileFormatError, match=r"00003-of-00003\.gguf is missing"):
        open_model(str(first))
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(FileFormatError, match="not named so"):
        open_model(str(tmp_path / "renamed.gguf"))


def test_frequency_divisors_reach_the_shape(tmp_path: Path) -> None:
    divisors = np.linspace(1, 8, gguf_building.SIZES["head_dim"] // 2, dtype=np.float32)
    write_model(tmp_path / "m.gguf", extra={"rope_freqs.weight": divisors})
    with open_model(str(tmp_path / "m.gguf")) as files:
        assert files.shape.rope.frequency_divisors == pytest.approx(tuple(divisors))
        assert not files.has("rope_freqs.weight")
    write_model(tmp_path / "m.gguf", extra={"rope_freqs.weight": divisors[:3]})
    with pytest.raises(FileFormatError, match="rope_freqs"):
        open_model(str(tmp_path / "m.gguf"))
    write_model(tmp_path / "m.gguf", extra={"rope_factors_long.weight": divisors})
    with pytest.raises(UnsupportedModelError, match="rope_factors_long"):
        open_model(str(tmp_path / "m.gguf"))


def test_what_does_not_fit_the_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    weights = gguf_building.random_weights(gguf_building.shape_of())
    cases: list[tuple[dict[str, object], type[DseekError], str]] = [
        ({"metadata": {"llama.block_count": 3}}, FileFormatError, "model.layers.2"),
        ({"metadata": {"llama.block_count": 1}}, UnsupportedModelError, "model.layers.1"),
        ({"metadata": {"llama.block_count": 1024}}, FileFormatError, "1024 layers"),
        ({"metadata": {"llama.feed_forward_length": 64}}, FileFormatError, "has the shape"),
        ({"metadata": {"llama.block_count": None}}, FileFormatError, "block_count"),
        ({"metadata": {"llama.attention.head_count": 0}}, FileFormatError, "head_count"),
        ({"extra": {"blk.0.ffn_gate_inp.weight": np.ones(4)}}, UnsupportedModelError, "ffn_gate_inp"),
        ({"weights": {k: v for k, v in weights.items() if "norm" not in k}}, FileFormatError, "no tensor"),
    ]
    for arguments, error, message in cases:
        write_model(path, **arguments)  # type: ignore[arg-type]
        with pytest.raises(error, match=message):
            open_model(str(path))


def test_unknown_architecture_is_named(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "mamba")
    writer.add_tensor("blk.0.ssm_in.weight", np.ones((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"mamba.*llama, qwen2, qwen3"):
        open_model(str(tmp_path / "m.gguf"))


def test_tensors_outlive_the_files(tmp_path: Path) -> None:
    expected = write_model(tmp_path / "m.gguf")
    files = open_model(str(tmp_path / "m.gguf"))
    tensor = files.tensor("model.embed_tokens.weight")
    files.close()
    np.testing.assert_array_equal(to_float32(tensor), expected["model.embed_tokens.weight"])
