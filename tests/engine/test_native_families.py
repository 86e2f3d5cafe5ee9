"""The native engine against transformers, for every family and kind of rotation, on small random models.

Float32 must agree to 1e-4 in every logit. In bf16 a random model's two best tokens are often closer than the rounding
of any bf16 implementation, so the same choice is asked for where the reference's margin is above that rounding, and
closeness everywhere.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import dseek
from dseek.models.files import open_model
from tests.models import tiny

pytestmark = pytest.mark.native

BF16_ERROR = 0.05
"""Largest root mean square error of the logits, as a share of their spread; 4 times it counts as a clear margin."""


@pytest.mark.parametrize("case", tiny.CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    folder = tmp_path / case
    tiny.save(case, folder, dtype="bfloat16")
    with open_model(str(folder)) as files:
        vocab_size, longest = files.shape.vocab_size, files.shape.max_position_embeddings
    token_ids = np.random.default_rng(0).integers(3, vocab_size, min(200, longest)).tolist()
    expected = tiny.reference_logits(folder, token_ids)
    with dseek.load(str(folder), precision="fp32", context=len(token_ids)) as llm:
        assert np.abs(llm.logits(token_ids) - expected).max() < 1e-4
    with dseek.load(str(folder), precision="bf16", context=len(token_ids)) as llm:
        found = llm.logits(token_ids)
    error = np.sqrt(np.mean((found - expected) ** 2)) / expected.std()
    assert error < BF16_ERROR
    best = np.sort(expected, axis=-1)[:, -2:]
    clear = best[:, 1] - best[:, 0] > 4 * BF16_ERROR * expected.std()
    assert clear.any()
    same = found.argmax(-1) == expected.argmax(-1)
    assert same[clear].mean() >= 0.995
