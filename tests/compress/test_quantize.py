"""`dseek quantize`: the folder gives transformers the numbers that were rounded, the GGUF file gives them to `gguf`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from dseek.cli.main import main
from dseek.models.decoder import Decoder
from dseek.models.encoding import to_float32
from dseek.models.files import open_model
from tests.models import tiny

CASES = {
    "int8": ["int8"],
    "int8-groups": ["int8", "--group-size", "32", "--dtype", "bfloat16"],
    "int4": ["int4", "--method", "awq+gptq"],
    "int4-64": ["int4", "--group-size", "64", "--no-act-order", "--method", "gptq", "--ignore", "*.0.mlp.up_proj"],
    "int4-zero": ["int4", "--no-symmetric"],
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox answers a small question, and then it stops.\n" * 40, encoding="utf-8")
    return str(path)


def quantize(model: Path | str, out: Path, *options: str) -> int:
    return main(["quantize", str(model), "--out", str(out), "--enable_quantization", *options])


def their_rows(x_TK: torch.Tensor) -> torch.Tensor:
    """Activations as the package rounds them: steps of max / 127.5, where the kernels' are max / 127."""
    scale = x_TK.abs().amax(-1, keepdim=True) / 127.5
    return torch.clamp(torch.round(x_TK / scale), -128, 127) * scale


def module_logits(folder: Path, ids: list[int], *, rounded: bool) -> np.ndarray:
    """Our torch module on the widened folder, the inputs of W8A8 projections rounded by token or not."""
    with open_model(str(folder)) as files:
        decoder = Decoder.from_files(files)
        if rounded:
            for name, module in decoder.named_modules():
                if name.endswith("_proj") and files.tensor_encoding(name + ".weight") == "I8_CHANNEL":
                    module.register_forward_pre_hook(lambda _, inputs: (their_rows(inputs[0][0])[None],))
    with torch.inference_mode():
        return decoder(torch.tensor([ids]))[0].numpy()


def theirs(folder: Path, ids: list[int], **options: object) -> np.ndarray:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="eager", **options
    )
    with torch.inference_mode():
        return model.eval()(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_what_we_do(
    case: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, CompressedTensorsConfig

    family = {"int8": "llama-nine-heads", "int4": "qwen2", "int4-zero": "mistral-full"}.get(case, "llama-64-mha")
    model = tiny.save(family, tmp_path / "m")
    out = tmp_path / "out"
    options = [*CASES[case], "--text", text, "--samples", "4", "--tokens", "48", "--json"]
    assert quantize(model, out, *options) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["out"] == str(out) and 0 < told["num_bytes"] and told["output_error"]
    assert not out.with_name("out.partial").exists()
    ids = tiny.token_ids(40)
    ours = module_logits(out, ids, rounded=False)
    if case != "int8-groups":  # it widens in the dtype of the scales, and bfloat16 holds no product of a scale and 127
        found = theirs(out, ids, quantization_config=CompressedTensorsConfig(dequantize=True))
        np.testing.assert_allclose(found, ours, atol=2e-5)
    if case != "int4-zero":  # the package's own loader takes no packed zero points (version 0.20)
        expected = module_logits(out, ids, rounded=case == "int8")
        found = theirs(out, ids)
        # Beside rounded activations an input on a boundary may go either way, and what follows from that with it.
        allowed = 0.01 * expected.std() if case == "int8" else 2e-5
        assert np.sqrt(np.mean((found - expected) ** 2)) < allowed
        if case == "int8":
            assert np.median(np.abs(found - expected)) < 0.1 * np.median(np.abs(ours - expected))
    original = tiny.reference_logits(model, ids)
    cosine = float((ours * original).sum() / np.linalg.norm(ours) / np.linalg.norm(original))
    assert (0.99 if told["bits"] == 8 else 0.8) < cosine < 0.999999
    found_ids, wanted_ids = (
        AutoTokenizer.from_pretrained(str(folder))("a small model")["input_ids"] for folder in (out, model)
    )
    assert found_ids == wanted_ids
    assert (out / "tokenizer_config.json").read_bytes() == (model / "tokenizer_config.json").read_bytes()


@pytest.mark.parametrize(
    ("options", "kind"), [(["int8"], "Q8_0"), (["int4"], "Q4_1"), (["int4", "--symmetric"], "Q4_0")]
)
@pytest.mark.parametrize("case", ["llama-llama3", "qwen3-128-tied"])
def test_gguf_files_are_what_gguf_reads(
    options: list[str], kind: str, case: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tiny.save(case, tmp_path / "m"), tmp_path / "out.gguf"
    assert quantize(model, out, *options, "--text", text, "--samples", "2", "--tokens", "32") == 0
    capsys.readouterr()
    reader = gguf.GGUFReader(str(out))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {kinds[f"blk.0.{part}.weight"] for part in ("attn_q", "attn_output", "ffn_up", "ffn_down")} == {kind}
    with open_model(str(out)) as files, open_model(str(model)) as source:
        assert files.chat_template == source.chat_template
        assert files.shape.num_parameters() == source.shape.num_parameters()
        sample = "the quick brown fox, 東京 🙂"
        assert files.tokenizer().encode(sample) == source.tokenizer().encode(sample)
        for name in files.tensor_names():
            # Through our reader, which undoes llama.cpp's order of rows, every weight is near the source's.
            found, wanted = to_float32(files.tensor(name)), to_float32(source.tensor(name))
            cosine = (found * wanted).sum() / np.linalg.norm(found) / np.linalg.norm(wanted)
            assert cosine > (0.9995 if files.tensor_encoding(name) in ("F32", "Q8_0") else 0.97), name
    for tensor in reader.tensors:
        if tensor.tensor_type.name == kind:
            assert np.isfinite(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).all()


def test_a_gguf_source_keeps_its_metadata_and_becomes_a_folder(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    model, first = tiny.save("llama-16-mqa-tied", tmp_path / "m"), tmp_path / "first.gguf"
    assert quantize(model, first, "int8") == 0
    second, folder = tmp_path / "second.gguf", tmp_path / "folder"
    assert quantize(first, second, "int4", "--text", text, "--samples", "2", "--tokens", "32") == 0
    assert quantize(first, folder, "int4") == 0
    assert "rounded to nearest" in capsys.readouterr().err
    mine, copied = (gguf.GGUFReader(str(path)).fields for path in (first, second))
    assert mine.keys() == copied.keys()
    for name, field in mine.items():
        if not name.startswith("GGUF.") and name != "general.file_type":
            assert field.contents() == copied[name].contents(), name
    assert copied["general.file_type"].contents() == 3
    with open_model(str(folder)) as files, open_model(str(first)) as source:
        assert np.float32(files.shape.rms_norm_eps) == np.float32(source.shape.rms_norm_eps)
        assert dataclasses.replace(files.shape, rms_norm_eps=source.shape.rms_norm_eps) == source.shape
        assert files.tokenizer().encode("a café 12") == source.tokenizer().encode("a café 12")
        assert files.chat_template == source.chat_template
    theirs_ids = AutoTokenizer.from_pretrained(str(folder))("a café 12")["input_ids"]
    with open_model(str(model)) as original:
        assert theirs_ids == original.tokenizer().encode("a café 12")
    ids = tiny.token_ids(30)
    np.testing.assert_allclose(theirs(folder, ids), module_logits(folder, ids, rounded=False), atol=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["int8", "--format", "gguf"], "needed: a .gguf file"),
        (["int8", "--no-symmetric"], "zero points"),
        (["int4", "--group-size", "48"], "multiple of 32"),
        (["int4", "--group-size", "128", "--method", "rtn"], "no multiple of groups of 128"),
        (["int4", "--method", "gptq"], "needs texts"),
        (["int4", "--text", "absent.txt"], "absent.txt cannot be read"),
        (["int4", "--damping", "2"], "damping"),
    ],
    ids=str,
)
def test_refusals_leave_nothing(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.save("llama-nine-heads", tmp_path / "m")
    assert quantize(model, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.save("llama", tmp_path / "m")
    before = (model / "config.json").read_bytes()
    assert quantize(model, model, "int8") == 2
    assert "exists already" in capsys.readouterr().err and (model / "config.json").read_bytes() == before
