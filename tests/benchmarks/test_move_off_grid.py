"""Moved weights compute the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.prepare.move_off_grid import move_off_grid
from tests.models import tiny


@pytest.mark.parametrize("case", ["llama", "llama-nine-heads", "llama-64-mha"])
def test_the_function_stays_and_the_weights_move(case: str, tmp_path: Path) -> None:
    source, target = tiny.save(case, tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    move_off_grid(source, target, 3, 1.25)
    ids = tiny.token_ids(100, seed=2)
    np.testing.assert_allclose(tiny.reference_logits(target, ids), tiny.reference_logits(source, ids), atol=2e-4)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, target))
    assert before.keys() == after.keys()
    for name, weight in after.items():
        moved = not np.allclose(weight, before[name], rtol=1e-3)
        assert moved == (name.endswith("_proj.weight") or "layers" in name)
