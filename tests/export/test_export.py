"""`dseek export`: transformers, `gguf` and llama.cpp read what was written, and compute what the source does."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dseek.cli.main import main
from dseek.models.decoder import Decoder
from dseek.models.encoding import to_float32
from dseek.models.files import open_model
from tests.compress.test_llamacpp import ROUNDING, likeliest
from tests.models import tiny


def export(model: Path, out: Path, *options: str) -> int:
    return main(["export", str(model), "--out", str(out), *options])


def logits(model: Path, ids: list[int]) -> np.ndarray:
    """Our torch module in float32."""
    with open_model(str(model)) as files:
        decoder = Decoder.from_files(files)
    with torch.inference_mode():
        return decoder(torch.tensor([ids]))[0].numpy()


@pytest.mark.parametrize("case", ["llama-nine-heads", "qwen3-128-tied", "qwen2", "mistral-full"])
def test_a_model_comes_back_from_gguf_as_it_was(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file, folder = tiny.save(case, tmp_path / "m"), tmp_path / "out.gguf", tmp_path / "back"
    assert export(model, file, "--dtype", "float32", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"out": str(file), "format": "gguf", "dtype": "float32", "num_bytes": file.stat().st_size}
    assert export(file, folder) == 0
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"
    ids = tiny.token_ids(40)
    np.testing.assert_allclose(tiny.reference_logits(folder, ids), tiny.reference_logits(model, ids), atol=2e-5)
    with open_model(str(folder)) as back, open_model(str(model)) as source:
        assert back.tokenizer().encode("a small model") == source.tokenizer().encode("a small model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "m", "out.gguf"]


@pytest.mark.parametrize(("dtype", "kind"), [("float16", "F16"), ("bfloat16", "BF16")])
def test_weights_of_16_bits_are_the_nearest_ones(dtype: str, kind: str, tmp_path: Path) -> None:
    model, file, folder = tiny.save("llama-64-mha", tmp_path / "m"), tmp_path / "out.gguf", tmp_path / "out"
    assert export(model, file, "--dtype", dtype) == 0 and export(model, folder, "--dtype", dtype) == 0
    source = load_file(str(model / "model.safetensors"))
    written = load_file(str(folder / "model.safetensors"))
    assert written.keys() == source.keys()
    for name, values in source.items():
        assert torch.equal(written[name], values.to(getattr(torch, dtype))), name
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(str(file)).tensors}
    assert {kinds.pop(name) for name in list(kinds) if name.endswith("norm.weight")} == {"F32"}
    assert set(kinds.values()) == {kind}
    with open_model(str(file)) as files:
        for name, values in source.items():
            wanted = values.to(getattr(torch, dtype)) if values.dim() == 2 else values
            assert np.array_equal(to_float32(files.tensor(name)), wanted.float().numpy()), name


def test_llamacpp_computes_what_was_exported(tmp_path: Path) -> None:
    model, file = tiny.save("llama-llama3", tmp_path / "m"), tmp_path / "out.gguf"
    assert export(model, file) == 0
    ids = tiny.token_ids(40, seed=3)
    wanted = torch.from_numpy(logits(model, ids)[-1]).log_softmax(-1)
    found = likeliest(file, ids, 5)
    assert len(found) == 5
    for token_id, log_probability in found.items():
        assert abs(log_probability - float(wanted[token_id])) < ROUNDING


def test_integers_become_the_numbers_they_stand_for(tmp_path: Path) -> None:
    model, rounded, wide = tiny.save("llama-64-mha", tmp_path / "m"), tmp_path / "int4", tmp_path / "wide"
    assert export(model, rounded, "--enable_quantization", "int4", "--format", "safetensors") == 0
    assert "quantization_config" in json.loads((rounded / "config.json").read_text())
    assert export(rounded, wide, "--dtype", "float32") == 0
    assert "quantization_config" not in json.loads((wide / "config.json").read_text())
    ids = tiny.token_ids(40)
    np.testing.assert_allclose(tiny.reference_logits(wide, ids), logits(rounded, ids), atol=2e-5)
    assert np.abs(logits(rounded, ids) - logits(model, ids)).max() > 1e-3
    file = tmp_path / "int8.gguf"
    assert export(model, file, "--enable_quantization", "int8") == 0
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(str(file)).tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.save("llama-64-mha", tmp_path / "m")
    weights = load_file(str(model / "model.safetensors"))
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 4] = 1e5
    save_file(weights, model / "model.safetensors", {"format": "pt"})

    def refused(message: str, out: str, *options: str) -> None:
        before = sorted(path.name for path in tmp_path.iterdir())
        assert export(model, tmp_path / out, *options) == 2
        assert message in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == before

    refused(f"{name} holds 100000", "out", "--dtype", "float16")
    refused(f"{name} holds 100000", "out.gguf")
    refused("a .gguf file", "out", "--format", "gguf")
    refused("--method, --seed without --enable_quantization", "out", "--method", "gptq", "--seed", "3")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused("exists already", "full")
