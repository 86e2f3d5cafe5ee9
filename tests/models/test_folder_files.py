"""Hugging Face folders: one file and shards, names, and what an index may not do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dseek.core.errors import ConfigError, FileFormatError, UnsupportedModelError
from dseek.models.encoding import to_float32
from dseek.models.files import ModelFiles, open_model
from dseek.models.folder_files import INDEX_NAME, SINGLE_NAME
from tests.models import tiny


def assert_weights(files: ModelFiles, folder: Path) -> None:
    """Every tensor equals what the safetensors package reads."""
    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(str(path), "pt") as theirs:
            for name in theirs.keys():  # noqa: SIM118 (no mapping)
                names.add(name)
                ours = files.tensor(name)
                np.testing.assert_array_equal(to_float32(ours), theirs.get_tensor(name).float().numpy(), err_msg=name)
    assert set(files.tensor_names()) == names


@pytest.mark.parametrize("case", ["llama", "llama-16-mqa-tied", "llama-bias", "mistral-window", "qwen2", "qwen3"])
def test_every_family_opens(tmp_path: Path, case: str) -> None:
    folder = tiny.save(case, tmp_path / "m", dtype="bfloat16")
    with open_model(str(folder)) as files:
        assert files.shape.family == tiny.CASES[case]["family"]
        assert files.path == folder and files.name == str(folder)
        assert set(files.encodings()) == {"BF16"}
        assert sum(files.encodings().values()) == files.shape.num_parameters() == files.num_bytes // 2
        assert_weights(files, folder)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_shards(tmp_path: Path, dtype: str) -> None:
    folder = tiny.save("qwen2", tmp_path / "m", dtype=dtype, shards=3)
    with open_model(str(folder)) as files:
        assert set(files.encodings()) == {"F32" if dtype == "float32" else "F16"}
        assert_weights(files, folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save("llama", tmp_path / "m")


def test_names_without_the_model_prefix_and_old_buffers(folder: Path) -> None:
    tensors = load_file(str(folder / SINGLE_NAME))
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    renamed["layers.0.self_attn.rotary_emb.inv_freq"] = tensors["model.norm.weight"].clone()
    save_file(renamed, str(folder / SINGLE_NAME))
    with open_model(str(folder)) as files:
        assert set(files.tensor_names()) == set(tensors)


def test_the_only_safetensors_file_may_have_any_name(folder: Path) -> None:
    (folder / SINGLE_NAME).rename(folder / "weights.safetensors")
    open_model(str(folder)).close()


def test_a_tied_head_may_be_stored_too(tmp_path: Path) -> None:
    folder = tiny.save("llama-16-mqa-tied", tmp_path / "m")
    tensors = load_file(str(folder / SINGLE_NAME))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, str(folder / SINGLE_NAME))
    with open_model(str(folder)) as files:
        assert files.shape.tie_word_embeddings and not files.has("lm_head.weight")


def test_missing_wrong_and_strange_tensors(folder: Path) -> None:
    tensors = load_file(str(folder / SINGLE_NAME))
    missing = dict(tensors)
    del missing["model.layers.1.mlp.up_proj.weight"]
    save_file(missing, str(folder / SINGLE_NAME))
    with pytest.raises(FileFormatError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        open_model(str(folder))
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"][:5].clone()}, str(folder / SINGLE_NAME))
    with pytest.raises(FileFormatError, match=r"model\.norm\.weight has the shape \(5,\)"):
        open_model(str(folder))
    save_file(tensors | {"model.layers.0.experts.0.w": tensors["model.norm.weight"].clone()}, str(folder / SINGLE_NAME))
    with pytest.raises(UnsupportedModelError, match="experts"):
        open_model(str(folder))


def _index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "no weight_map"),
        ({}, "no weight_map"),
        ([1], "no weight_map"),
        ({"a": 1}, "names the file"),
        ({"a": "x.bin"}, "names the file"),
        ({"a": "../secret.safetensors"}, "outside its folder"),
        ({"a": "/etc/x.safetensors"}, "outside its folder"),
        ({"a": "sub/x.safetensors"}, "outside its folder"),
        ({"a": "..\\x.safetensors"}, "outside its folder"),
        ({"a": "x\0.safetensors"}, "names the file"),
        ({"a": "absent.safetensors"}, "is missing"),
        ({str(i): f"{i}.safetensors" for i in range(5000)}, "names 5000 files"),
    ],
)
def test_an_index_may_not_lead_elsewhere(folder: Path, weight_map: object, message: str) -> None:
    (folder.parent / "secret.safetensors").write_bytes((folder / SINGLE_NAME).read_bytes())
    _index(folder, weight_map)
    with pytest.raises(FileFormatError, match=message):
        open_model(str(folder))


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    (folder / "copy.safetensors").write_bytes((folder / SINGLE_NAME).read_bytes())
    _index(folder, {"a": SINGLE_NAME, "b": "copy.safetensors"})
    with pytest.raises(FileFormatError, match="twice"):
        open_model(str(folder))


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    (folder / SINGLE_NAME).rename(folder / "pytorch_model.bin")
    with pytest.raises(FileFormatError, match="convert the pickled weights"):
        open_model(str(folder))


@pytest.mark.parametrize("text", ["", "[1]", "{", "\ud800", '{"a":' * 50_000])
def test_broken_configurations_are_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(FileFormatError, match=r"config\.json"):
        open_model(str(folder))


def test_wrong_values_in_the_configuration_are_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": -1}))
    with pytest.raises(ConfigError, match="hidden_size"):
        open_model(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(UnsupportedModelError, match="mamba"):
        open_model(str(folder))
