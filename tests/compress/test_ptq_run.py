"""Whole models: layer by layer, stopped and gone on with, and what is refused before work begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dseek.compress.ptq import METHODS, PtqConfig, layer_path, quantize_layers, read_layer
from dseek.compress.ptq_rounding import Scheme
from dseek.core.errors import ConfigError
from dseek.models.files import ModelFiles, open_model
from tests.models import tiny

W8A8 = Scheme(num_bits=8, activation_bits=8)
W4 = Scheme(num_bits=4, group_size=32)


def quiet(*_: object) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelFiles]:
    with open_model(str(tiny.save("qwen2-window", tmp_path_factory.mktemp("m")))) as opened:
        yield opened


@pytest.fixture(scope="module")
def texts() -> torch.Tensor:
    return torch.tensor([tiny.token_ids(40, seed=seed) for seed in range(3)])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_whole_layers(method: str, files: ModelFiles, texts: torch.Tensor, tmp_path: Path) -> None:
    scheme = W4 if method.startswith("awq") else W8A8
    quantize_layers(files, PtqConfig(scheme=scheme, method=method), texts, tmp_path / "work", quiet)
    names = set()
    for layer in range(files.shape.num_layers):
        found = read_layer(tmp_path / "work", layer)
        assert len(found.rounded) == 7 and not found.rounded.keys() & found.wide.keys()
        assert set(found.errors) == (set() if method == "rtn" else set(found.rounded))
        assert all(0 < error < 0.05 for error in found.errors.values())
        names |= found.rounded.keys() | found.wide.keys()
    tables = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert names | tables == set(files.tensor_names())
    assert not (tmp_path / "work" / "hidden.bin").exists()


def test_a_stopped_run_goes_on_to_the_same_result(files: ModelFiles, texts: torch.Tensor, tmp_path: Path) -> None:
    config = PtqConfig(scheme=W8A8, method="smoothquant+gptq")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    quantize_layers(files, config, texts, whole, quiet)

    def stop(what: str, done: int, total: int, figures: dict[str, float]) -> None:
        if what == "texts of the layer" and layer_path(stopped, 1).is_file():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_layers(files, config, texts, stopped, stop)
    assert layer_path(stopped, 1).is_file() and not layer_path(stopped, 2).is_file()
    finished = layer_path(stopped, 1).stat().st_mtime_ns
    quantize_layers(files, config, texts, stopped, quiet)
    assert layer_path(stopped, 1).stat().st_mtime_ns == finished
    for layer in range(files.shape.num_layers):
        first, second = read_layer(whole, layer), read_layer(stopped, layer)
        for name, weight in first.rounded.items():
            assert torch.equal(weight.values, second.rounded[name].values), name
            assert torch.equal(weight.grid.scale, second.rounded[name].grid.scale), name
        for name, value in first.wide.items():
            assert torch.equal(value, second.wide[name]), name


def test_work_of_other_settings_or_texts_is_not_gone_on_with(
    files: ModelFiles, texts: torch.Tensor, tmp_path: Path
) -> None:
    quantize_layers(files, PtqConfig(scheme=W8A8), None, tmp_path, quiet)
    quantize_layers(files, PtqConfig(scheme=W8A8), None, tmp_path, quiet)
    for config, other in ((PtqConfig(scheme=W4), None), (PtqConfig(scheme=W8A8), texts)):
        with pytest.raises(ConfigError, match="other settings"):
            quantize_layers(files, config, other, tmp_path, quiet)


def test_a_damaged_layer_is_named(files: ModelFiles, tmp_path: Path) -> None:
    quantize_layers(files, PtqConfig(scheme=W8A8), None, tmp_path, quiet)
    path = layer_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="layer-00001"):
        read_layer(tmp_path, 1)


def test_projections_may_stay_wide(files: ModelFiles, texts: torch.Tensor, tmp_path: Path) -> None:
    config = PtqConfig(scheme=W8A8, method="smoothquant", ignore=("*.down_proj", "model.layers.0.*"))
    quantize_layers(files, config, texts, tmp_path, quiet)
    assert not read_layer(tmp_path, 0).rounded
    found = read_layer(tmp_path, 1)
    assert len(found.rounded) == 6 and "model.layers.1.mlp.down_proj.weight" in found.wide


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "gptq"}, "needs texts"),
        ({"ignore": ("*.gate",)}, "fits no projection"),
        ({"ignore": ("*",)}, "every projection is left out"),
        ({"method": "magic"}, "one of rtn"),
        ({"scale_dtype": "int8"}, "float16, bfloat16"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_first(
    settings: dict[str, object], message: str, files: ModelFiles, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize_layers(files, PtqConfig(scheme=W8A8, **settings), None, tmp_path / "work", quiet)
    assert not (tmp_path / "work").exists()
