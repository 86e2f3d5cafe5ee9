"""Positions beyond the trained length: equal to transformers with the same `rope_scaling`, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dseek.cli.options import ROPE_SCALINGS
from dseek.core.errors import ConfigError
from dseek.core.shape import ModelShape, RopeShape
from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from dseek.models.long_positions import AUTO, MAX_EXTENDED_POSITIONS, SCALINGS, extend_positions
from dseek.models.rope import rope_table, yarn_attention_factor
from tests.models import tiny
from tests.plan.machines import shape_of

TRAINED, LONG = 256, 768
"""Positions of the small models, and so many more."""


def rescaled(folder: Path, kind: str) -> Path:
    """Write a folder's configuration as a user of transformers would, for `LONG` positions."""
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    scaling = {"rope_type": kind, "factor": LONG / TRAINED, "rope_theta": config["rope_parameters"]["rope_theta"]}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = TRAINED
    if kind != "dynamic":  # which takes the trained length from max_position_embeddings
        config["max_position_embeddings"] = LONG
    path.write_text(json.dumps(config | {"rope_parameters": scaling}))
    return folder


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "linear"])
@pytest.mark.parametrize("case", ["llama", "mistral-window", "qwen3-128-tied"])
def test_logits_equal_transformers(case: str, kind: str, tmp_path: Path) -> None:
    folder = tiny.save(case, tmp_path)
    token_ids = tiny.token_ids(LONG - 68, seed=1)
    with open_model(str(folder)) as files:
        assert files.shape.max_position_embeddings == TRAINED
        files.shape = extend_positions(files.shape, LONG, kind)
        decoder = Decoder.from_files(files).requires_grad_(False)
    plain = tiny.reference_logits(folder, token_ids)
    expected = tiny.reference_logits(rescaled(folder, kind), token_ids)
    found = decoder(torch.tensor([token_ids]))[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.abs(plain - expected).max() > 0.01


def test_a_shape_as_transformers_would_have_it() -> None:
    shape = shape_of(max_position_embeddings=8192)
    yarn = extend_positions(shape, 32768, "yarn")
    assert yarn.max_position_embeddings == 32768
    assert (yarn.rope.kind, yarn.rope.factor, yarn.rope.original_max_position_embeddings) == ("yarn", 4.0, 8192)
    assert yarn.rope.theta == shape.rope.theta
    assert yarn_attention_factor(yarn.rope) == pytest.approx(1.138629436)
    assert (
        extend_positions(shape, 32768, "auto") == extend_positions(shape, 32768) == extend_positions(shape, 32768, AUTO)
    )


def test_no_scaling_turns_further_positions_by_the_same_angles() -> None:
    shape = shape_of(max_position_embeddings=300)
    longer = extend_positions(shape, 900, "none")
    assert longer.max_position_embeddings == 900 and longer.rope == shape.rope
    np.testing.assert_array_equal(rope_table(longer, 900, 900)[0], rope_table(shape, 900, 300)[0])


def test_dynamic_changes_nothing_up_to_the_trained_length() -> None:
    shape = shape_of(max_position_embeddings=300)
    longer = extend_positions(shape, 900, "dynamic")
    np.testing.assert_array_equal(rope_table(longer, 300, 300)[0], rope_table(shape, 300)[0])
    assert not np.array_equal(rope_table(longer, 301, 301)[0], rope_table(shape, 301)[0])


@pytest.mark.parametrize(
    "rope",
    [
        RopeShape(kind="yarn", factor=4.0, original_max_position_embeddings=64),
        RopeShape(kind="yarn", factor=4.0),
        RopeShape(kind="llama3", factor=8.0),
        RopeShape(kind="linear", factor=2.0),
        RopeShape(kind="dynamic", factor=2.0),
    ],
)
def test_a_scaled_model_keeps_its_scaling_where_that_is_said(rope: RopeShape) -> None:
    shape = shape_of(max_position_embeddings=256, rope=rope)
    for scaling in (None, "auto"):
        with pytest.raises(ConfigError, match="--rope-scaling none"):
            extend_positions(shape, 512, scaling)
    longer = extend_positions(shape, 512, "none")
    assert longer.rope.kind == rope.kind
    np.testing.assert_array_equal(rope_table(longer, 256, 256)[0], rope_table(shape, 256, 256)[0])


def test_what_a_named_scaling_replaces() -> None:
    yarn = RopeShape(kind="yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.5)
    shape = shape_of(max_position_embeddings=256, rope=yarn)
    assert extend_positions(shape, 512, "yarn").rope == RopeShape(
        kind="yarn", factor=8.0, original_max_position_embeddings=64
    )
    assert extend_positions(shape, 512, "dynamic").rope.factor == 8.0
    for rope in (
        RopeShape(kind="llama3", factor=8.0, original_max_position_embeddings=64),
        RopeShape(kind="linear", factor=2.0),
        RopeShape(frequency_divisors=(1.0,) * 32),
    ):
        with pytest.raises(ConfigError, match="was trained with"):
            extend_positions(shape_of(max_position_embeddings=256, rope=rope), 512, "yarn")


def test_dynamic_of_the_models_own_goes_on_as_in_transformers(tmp_path: Path) -> None:
    folder = tiny.save("llama-dynamic", tmp_path)
    token_ids = tiny.token_ids(150)
    with open_model(str(folder)) as files:
        files.shape = extend_positions(files.shape, 200, "none")
        decoder = Decoder.from_files(files).requires_grad_(False)
    found = decoder(torch.tensor([token_ids]))[0].numpy()
    np.testing.assert_allclose(found, tiny.reference_logits(folder, token_ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("positions", "scaling", "message"),
    [
        (8191, None, "8192, what the model was made for, to 16777216; to do: limit a run with --context"),
        (MAX_EXTENDED_POSITIONS + 1, None, "16777216$"),
        (16384, "ntk", "one of auto, yarn, dynamic, linear, none"),
        (None, "yarn", "--max-position-embeddings N"),
    ],
)
def test_what_is_refused(positions: int | None, scaling: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        extend_positions(shape_of(max_position_embeddings=8192), positions, scaling)


def test_the_models_own_limit_changes_nothing() -> None:
    shape: ModelShape = shape_of(max_position_embeddings=8192)
    assert extend_positions(shape, None) is shape
    for scaling in SCALINGS:
        assert extend_positions(shape, 8192, scaling) is shape


def test_the_command_line_offers_them_all() -> None:
    assert ROPE_SCALINGS == SCALINGS
