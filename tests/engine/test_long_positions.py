"""Runs beyond the trained length: both engines against transformers, whatever the chunks, and plans that know of it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

import dseek
from dseek import plan as planning
from dseek.core.errors import ConfigError
from dseek.models.files import open_model
from dseek.plan import Plan
from tests.models import tiny
from tests.models.test_long_positions import LONG, rescaled
from tests.plan.machines import machine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama of 256 positions."""
    return tiny.save("llama", tmp_path / "model")


def plan_for(folder: Path, kernels: str, kind: str, context: int = LONG, chunk: int = 64) -> Plan:
    """Plan for long positions on a made-up machine."""
    from dseek.models.long_positions import extend_positions

    with open_model(str(folder)) as files:
        return planning.make(
            extend_positions(files.shape, LONG, kind),
            machine(with_torch=True),
            planning.Objective(context_tokens=context, batch=1),
            encodings=files.encodings(),
            precision="fp32",
            kernels=kernels,
            num_threads=1,
            prefill_chunk_tokens=chunk,
        )


@pytest.mark.parametrize("kernels", ["torch", pytest.param("native", marks=pytest.mark.native)])
@pytest.mark.parametrize("kind", ["yarn", "dynamic", "linear"])
def test_logits_equal_transformers(kernels: str, kind: str, folder: Path) -> None:
    token_ids = tiny.token_ids(LONG, seed=2)
    with dseek.load(str(folder), plan=plan_for(folder, kernels, kind)) as llm:
        found = llm.logits(token_ids)
    np.testing.assert_allclose(found, tiny.reference_logits(rescaled(folder, kind), token_ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "linear", "none"])
def test_a_plan_carries_its_positions(kind: str, folder: Path, tmp_path: Path) -> None:
    plan = plan_for(folder, "torch", kind)
    plan.save(tmp_path / "plan.json")
    for options in ({}, {"max_position_embeddings": LONG, "rope_scaling": kind}):
        with dseek.load(str(folder), plan=tmp_path / "plan.json", **options) as llm:
            assert llm.plan == plan
            assert llm.shape == plan.shape
            assert len(llm.logits(tiny.token_ids(LONG))) == LONG


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_position_embeddings": 2 * LONG, "rope_scaling": "yarn"}, "max_position_embeddings is 768; .* is 1536"),
        ({"max_position_embeddings": 512, "rope_scaling": "yarn"}, "max_position_embeddings is 768; .* is 512"),
        ({"max_position_embeddings": 256}, "max_position_embeddings is 768; .* is 256"),
        ({"max_position_embeddings": LONG, "rope_scaling": "dynamic"}, "the plan is for .* whose rope is"),
        ({"rope_scaling": "yarn"}, "without a number of positions"),
    ],
)
def test_a_plan_for_other_positions_is_refused(options: dict[str, object], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        dseek.load(str(folder), plan=plan_for(folder, "torch", "yarn"), **options)  # type: ignore[arg-type]


def test_positions_that_the_context_does_not_reach_are_warned_about(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"machine": machine(with_torch=True), "precision": "fp32", "threads": 1, "batch": 1}
    options |= {"max_position_embeddings": LONG, "rope_scaling": "yarn"}
    with caplog.at_level(logging.WARNING):
        with dseek.load(str(folder), context=257, **options) as llm:  # type: ignore[arg-type]
            assert llm.shape.rope.kind == "yarn"
        assert not caplog.records
        dseek.load(str(folder), context=256, **options).close()  # type: ignore[arg-type]
    assert "the context is 256 tokens, for which the model's own 256 suffice" in caplog.text
