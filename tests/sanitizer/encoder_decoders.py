"""Small random encoder-decoders straight from the compiled class, and right arguments for its methods."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from tests.sanitizer.decoders import FORMATS

HIDDEN, INNER, VOCABULARY, POSITIONS, LAYERS = 32, 35, 67, 24, 2
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_heads": 2,
    "num_encoder_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_positions": POSITIONS,
    "start_id": 0,
    "end_id": 1,
    "epsilon": 1e-5,
    "activation": "gelu",
}
_QKV, _SQUARE, _INNER, _OUTER = (3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
_SOURCE, _HEAD = (2 * HIDDEN * LAYERS, HIDDEN), (VOCABULARY, HIDDEN)


def build(native: ModuleType, rng: np.random.Generator) -> Any:
    """Build a complete encoder-decoder; each projection takes a format of its own.

    Args:
        native: the compiled module.
        rng: draws weights and formats.
    """
    model = native.EncoderDecoder(**SIZES)
    for method in ("add_encoder_layer", "add_decoder_layer"):
        for _ in range(LAYERS):
            getattr(model, method)(**arguments(native, f"EncoderDecoder.{method}", rng))
    model.set_tables(**arguments(native, "EncoderDecoder.set_tables", rng))
    return model


def arguments(native: ModuleType, name: str, rng: np.random.Generator) -> dict[str, Any]:
    """Make arguments that are right.

    Args:
        native: the compiled module.
        name: `EncoderDecoder`, or one of its methods behind a point.
        rng: draws them.
    """

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    def projection(rows: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
        return native.pack(str(rng.choice(FORMATS)), floats(rows, inputs), False), floats(-(-rows // 16) * 16)

    method = name.rpartition(".")[2]
    if method == "EncoderDecoder":
        return dict(SIZES)
    if method in ("add_encoder_layer", "add_decoder_layer"):
        is_decoder = method == "add_decoder_layer"
        shapes = [_QKV, _SQUARE, *([_SQUARE, _SQUARE] if is_decoder else []), _INNER, _OUTER]
        norms = [(floats(HIDDEN), floats(HIDDEN)) for _ in range(3 if is_decoder else 2)]
        return {"projections": [projection(*shape) for shape in shapes], "norms": norms}
    if method == "set_tables":
        tables = {"embedding": floats(VOCABULARY, HIDDEN), "positions": floats(POSITIONS, HIDDEN)}
        return {**tables, "source_key_values": projection(*_SOURCE), "head": projection(*_HEAD)}
    if method == "translate":
        lengths = rng.integers(1, POSITIONS + 1, int(rng.integers(1, 7)))
        limits = rng.integers(1, POSITIONS + 1, len(lengths)).astype(np.int32)
        given: dict[str, Any] = {
            "source_ids": rng.integers(0, VOCABULARY, int(lengths.sum())).astype(np.int32),
            "starts": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            "limits": limits,
        }
        if rng.random() < 0.5:
            given["forced"] = rng.integers(0, VOCABULARY, (len(limits), int(limits.max()))).astype(np.int32)
        return given
    return {}
