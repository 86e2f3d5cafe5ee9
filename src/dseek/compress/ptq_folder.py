"""Writes a rounded model as a Hugging Face folder in the layout of `compressed-tensors`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dseek.compress.compressed_layout import layout_of, pack_words, pack_zero_points, quantization_config
from dseek.compress.ptq import PROJECTIONS, PtqConfig, RoundedLayer, read_layer
from dseek.models.files import ModelFiles
from dseek.models.folder_writer import DTYPES, to_bytes, wide_tensor, write_model_folder
from dseek.models.safetensors_writer import StreamTensor


def write_folder(files: ModelFiles, config: PtqConfig, dtype: str, work: Path, target: Path) -> None:
    """Write the folder.

    Args:
        files: the opened source.
        config: how it was rounded.
        dtype: float32, float16 or bfloat16, of what stays wide and of scales.
        work: where the finished layers lie.
        target: the folder, which exists.

    Raises:
        UnsupportedModelError: the tokenizer or the rotation of a GGUF source cannot be written.
        OSError: something cannot be written.
    """
    shape = files.shape
    wide = [
        f"model.layers.{layer}.{name}"
        for layer in range(shape.num_layers)
        for name in PROJECTIONS
        if config.keeps_wide(f"model.layers.{layer}.{name}")
    ]
    act_order = config.method.endswith("gptq") and config.gptq.act_order
    more = {"quantization_config": quantization_config(config.scheme, [*wide, "lm_head"], act_order)}
    write_model_folder(files, list(_tensors(files, config, dtype, work)), dtype, target, more)


def _tensors(files: ModelFiles, config: PtqConfig, dtype: str, work: Path) -> Iterator[StreamTensor]:
    """All tensors in the order of the file; a layer is read when its first tensor is asked for."""
    shape = files.shape
    yield wide_tensor(files, "model.embed_tokens.weight", dtype)

    @functools.lru_cache(maxsize=1)
    def layer_of(layer: int) -> RoundedLayer:
        return read_layer(work, layer)

    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        for name in (name for name in files.tensor_names() if name.startswith(prefix)):
            sizes = files.tensor_shape(name)
            module = name.removesuffix(".weight")
            if module.removeprefix(prefix) in PROJECTIONS and not config.keeps_wide(module):
                yield from _integers(name, sizes, layer, layer_of, config, dtype)
            else:
                yield _wide(name, sizes, layer, layer_of, dtype)
    yield wide_tensor(files, "model.norm.weight", dtype)
    if not shape.tie_word_embeddings:
        yield wide_tensor(files, "lm_head.weight", dtype)


def _wide(
    name: str, sizes: tuple[int, ...], layer: int, layer_of: Callable[[int], RoundedLayer], dtype: str
) -> StreamTensor:
    """A norm, a bias or a projection that was left out."""
    return StreamTensor(
        name=name, dtype=DTYPES[dtype], shape=sizes, make=lambda: to_bytes(layer_of(layer).wide[name], dtype)
    )


def _integers(
    name: str,
    sizes: tuple[int, ...],
    layer: int,
    layer_of: Callable[[int], RoundedLayer],
    config: PtqConfig,
    dtype: str,
) -> Iterator[StreamTensor]:
    """The stored tensors of one quantised weight."""
    scheme = config.scheme
    rows, inputs = sizes
    num_groups = inputs // scheme.width(inputs)

    def values() -> np.ndarray:
        return layer_of(layer).rounded[name].values.numpy()

    def zero_points() -> np.ndarray:
        zero = layer_of(layer).rounded[name].grid.zero
        assert zero is not None
        return pack_zero_points(zero.numpy(), scheme.num_bits)

    if layout_of(scheme) == "int-quantized":
        yield StreamTensor(
            name=name, dtype="I8", shape=sizes, make=lambda: np.ascontiguousarray(values()).view(np.uint8).reshape(-1)
        )
    else:
        yield StreamTensor(
            name=name + "_packed",
            dtype="I32",
            shape=(rows, -(-inputs * scheme.num_bits // 32)),
            make=lambda: pack_words(values(), scheme.num_bits).reshape(-1),
        )
        yield StreamTensor(
            name=name + "_shape",
            dtype="I64",
            shape=(2,),
            make=lambda: np.array([rows, inputs], dtype="<i8").view(np.uint8),
        )
        if not scheme.symmetric:
            words = -(-rows * scheme.num_bits // 32)
            yield StreamTensor(name=name + "_zero_point", dtype="I32", shape=(words, num_groups), make=zero_points)
    yield StreamTensor(
        name=name + "_scale",
        dtype=DTYPES[dtype],
        shape=(rows, num_groups),
        make=lambda: to_bytes(layer_of(layer).rounded[name].grid.scale, dtype),
    )
