"""Folders of compressed-tensors: what the package itself packs is read exactly, and nothing broken gets by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dseek.core.errors import ConfigError, FileFormatError, UnsupportedModelError
from dseek.models.encoding import to_float32
from dseek.models.files import open_model
from dseek.models.folder_files import SINGLE_NAME
from tests.models import tiny

NAME = "model.layers.0.mlp.up_proj.weight"
WEIGHTS: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
ACTIVATIONS: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def settings(weights: dict[str, Any], activations: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if activations else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        **others,
    }


def packed_by_the_package(weight: torch.Tensor, weights: dict[str, Any], activations: dict[str, Any] | None) -> Any:
    """State of one linear module as the package compresses it, and what it decompresses that to."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = QuantizationArgs(**weights)
    rows, inputs = weight.shape
    width = weights.get("group_size") or inputs
    groups = weight.view(rows, -1, width)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=arguments,
        input_activations=None if activations is None else QuantizationArgs(**activations),
    )
    compressor = BaseCompressor.get_value_from_registry("int-quantized" if activations else "pack-quantized")
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    packed = compressor.compress(state, scheme)
    return packed, compressor.decompress(dict(packed), scheme)["weight"]


def compress(folder: Path, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> torch.Tensor:
    """Put one packed projection into a folder; gives the weight it stands for."""
    tensors = load_file(str(folder / SINGLE_NAME))
    state, wide = packed_by_the_package(tensors.pop(NAME), weights, activations)
    tensors |= {NAME.removesuffix("weight") + key: value.contiguous() for key, value in state.items()}
    save_file(tensors, str(folder / SINGLE_NAME))
    configure(folder, settings(weights, activations))
    return wide


def configure(folder: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save("llama-odd-sizes", tmp_path / "m")


CHANNEL: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


@pytest.mark.parametrize(
    ("weights", "activations", "encoding"),
    [
        (CHANNEL, ACTIVATIONS, "I8_CHANNEL"),
        (CHANNEL | {"symmetric": False}, ACTIVATIONS, "F32"),
        (CHANNEL, None, "F32"),  # 80 inputs are no multiple of 32
        (WEIGHTS | {"group_size": 16}, None, "F32"),
        (WEIGHTS | {"num_bits": 8, "group_size": 16, "symmetric": False}, None, "F32"),
        (WEIGHTS | {"group_size": None, "strategy": "channel", "symmetric": False}, None, "F32"),
    ],
    ids=str,
)
def test_what_the_package_packs_is_read_exactly(
    weights: dict[str, Any], activations: dict[str, Any] | None, encoding: str, folder: Path
) -> None:
    wide = compress(folder, weights, activations)
    with open_model(str(folder)) as files:
        assert files.tensor_encoding(NAME) == encoding and files.tensor_shape(NAME) == tuple(wide.shape)
        np.testing.assert_array_equal(to_float32(files.tensor(NAME)), wide.numpy())
        assert sum(files.encodings().values()) == files.shape.num_parameters()


@pytest.mark.parametrize(
    ("weights", "encoding"),
    [
        (WEIGHTS, "Q4_0"),
        (WEIGHTS | {"group_size": 64}, "Q4_0"),
        (WEIGHTS | {"group_size": 64, "symmetric": False}, "Q4_1"),
        (WEIGHTS | {"num_bits": 8}, "Q8_0"),
        (CHANNEL, "Q8_0"),
    ],
    ids=str,
)
def test_groups_of_whole_blocks_become_blocks(weights: dict[str, Any], encoding: str, tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "m", dtype="float32")
    wide = compress(folder, weights)
    with open_model(str(folder)) as files:
        assert files.tensor_encoding(NAME) == encoding
        tensor = files.tensor(NAME)
        assert tensor.encoding == encoding
        # The package's scales are float32 here; blocks keep halves, and beside zero points a minimum of up to 15 steps.
        largest = 15 * 2.0**-11 * float(wide.abs().max()) if encoding == "Q4_1" else 2.0**-11 * np.abs(wide.numpy())
        assert (np.abs(to_float32(tensor) - wide.numpy()) <= largest + 1e-9).all()


def test_scales_that_no_half_holds_are_widened_and_what_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "m")
    wide = compress(folder, WEIGHTS)
    tensors = load_file(str(folder / SINGLE_NAME))
    tensors[NAME + "_scale"] *= 1e-6
    save_file(tensors, str(folder / SINGLE_NAME))
    with open_model(str(folder)) as files:
        tensor = files.tensor(NAME)
        assert tensor.encoding == "F32"
        np.testing.assert_allclose(to_float32(tensor), wide.numpy() * 1e-6, rtol=1e-6)
    for wrong in (float("nan"), float("inf")):
        tensors[NAME + "_scale"][5, 1] = wrong
        save_file(tensors, str(folder / SINGLE_NAME))
        with open_model(str(folder)) as files, pytest.raises(FileFormatError, match=r"up_proj\.weight', row 5"):
            files.tensor(NAME)


Change = Callable[[dict[str, torch.Tensor]], None]


def _drop(part: str) -> Change:
    return lambda tensors: tensors.pop(NAME + part)


def _put(part: str, value: torch.Tensor) -> Change:
    return lambda tensors: tensors.__setitem__(NAME + part, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("_scale"), "has no scale|no tensor"),
        (_drop("_packed"), "is missing beside its scale"),
        (_drop("_shape"), "is missing"),
        (_put("_shape", torch.tensor([192])), r"needed: I64 \(2,\)"),
        (_put("_shape", torch.tensor([96, 64], dtype=torch.int8)), r"needed: I64 \(2,\)"),
        (_put("_shape", torch.tensor([-1, 128])), "sizes of a weight"),
        (_put("_shape", torch.tensor([1 << 40, 1 << 40])), "sizes of a weight"),
        (_put("_shape", torch.tensor([192, 256])), "for 4 bits"),
        (_put("_packed", torch.zeros(192, 15, dtype=torch.int32)), "for 4 bits"),
        (_put("_packed", torch.zeros(192, 16, dtype=torch.int64)), "for 4 bits"),
        (_put("_scale", torch.ones(192, 5)), "has the shape"),
        (_put("_scale", torch.ones(7, 4)), "has the shape"),
        (_put("_scale", torch.ones(192, 4, dtype=torch.int32)), "is I32"),
        (_put("_zero_point", torch.zeros(192, 4, dtype=torch.int32)), "needed: I32"),
        (_put("_zero_point", torch.zeros(3, dtype=torch.int8)), "needed: I32"),
        (_put("_g_idx", torch.zeros(128, dtype=torch.int32)), "another order"),
        (_put("", torch.zeros(192, 128, dtype=torch.int8)), None),
        (lambda tensors: tensors.__setitem__("model.norm.weight", torch.ones(128, dtype=torch.int8)), "has no scale"),
    ],
)
def test_tensors_that_do_not_fit_together(change: Change, message: str | None, tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "m")
    compress(folder, WEIGHTS)
    tensors = load_file(str(folder / SINGLE_NAME))
    change(tensors)
    save_file(tensors, str(folder / SINGLE_NAME))
    if message is None:  # the packed one counts
        open_model(str(folder)).close()
        return
    with pytest.raises((FileFormatError, UnsupportedModelError), match=message):
        open_model(str(folder))


def test_integers_are_not_read_where_nothing_says_what_they_mean(folder: Path) -> None:
    tensors = load_file(str(folder / SINGLE_NAME))
    save_file(tensors | {NAME: torch.zeros(112, 80, dtype=torch.int8)}, str(folder / SINGLE_NAME))
    with pytest.raises(UnsupportedModelError, match="dtype 'I8'"):
        open_model(str(folder))


def _changed(weights: dict[str, Any] | None = None, activations: Any = ACTIVATIONS, **others: Any) -> dict[str, Any]:
    return settings(CHANNEL | (weights or {}), activations, **others)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (_changed({"num_bits": 2}), "num_bits"),
        (_changed({"num_bits": True}), "num_bits"),
        (_changed({"num_bits": "8"}), "num_bits"),
        (_changed({"type": "float"}), "type"),
        (_changed({"strategy": "block"}), "strategy"),
        (_changed({"dynamic": True}), "dynamic"),
        (_changed({"actorder": "group"}), "actorder"),
        (_changed({"block_structure": [128, 128]}), "block_structure"),
        (_changed({"twist": 3}), "twist"),
        (_changed(activations=ACTIVATIONS | {"dynamic": False}), "dynamic"),
        (_changed(activations=ACTIVATIONS | {"strategy": "tensor"}), "strategy"),
        (_changed(activations=ACTIVATIONS | {"symmetric": False}), "symmetric"),
        (_changed(activations=ACTIVATIONS | {"num_bits": 4}), "num_bits"),
        (_changed(format="marlin-24"), "format"),
        (_changed(format="float-quantized"), "format"),
        (_changed(quantization_status="frozen"), "quantization_status"),
        (_changed(kv_cache_scheme=ACTIVATIONS), "kv_cache_scheme"),
        (_changed(transform_config={"config_groups": {"a": {}}}), "transform_config"),
        (_changed(sparsity_config={"format": "sparse-24-bitmask"}), "format"),
        (_changed(surprise=1), "surprise"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_are_not_computed_are_refused_by_name(
    quantization: dict[str, Any], message: str, folder: Path
) -> None:
    configure(folder, quantization)
    with pytest.raises(UnsupportedModelError, match=message):
        open_model(str(folder))


@pytest.mark.parametrize(
    "groups", [None, {}, [], {"g": None}, {"g": {}}, {"g": {"weights": 4}}, {str(i): {} for i in range(100)}], ids=str
)
def test_groups_of_nonsense_are_refused(groups: Any, folder: Path) -> None:
    configure(folder, _changed() | {"config_groups": groups})
    with pytest.raises((ConfigError, UnsupportedModelError), match="config_groups"):
        open_model(str(folder))
