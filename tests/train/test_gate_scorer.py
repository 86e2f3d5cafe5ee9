"""The scorer of a gate file gives the scores of the gate that was trained."""

from __future__ import annotations

import pytest
import torch

from dseek.core.attention_pattern import BLOCK_TOKENS
from dseek.models.gate_file import Gates, LayerGate
from dseek.models.gate_scorer import gate_scorer
from dseek.ops.attention.pyramid import build_pyramid
from dseek.train.gate import Gate, pool_statistics
from dseek.train.gate_samples import key_statistics


def test_scores_are_those_of_the_trained_gate() -> None:
    torch.manual_seed(0)
    groups, heads, width, dim, num_tokens = 2, 3, 16, 32, 9 * 512 + 100
    gate = Gate(groups, heads * width, 3 * width, gate_dim=dim, num_levels=2, theta=5e3).requires_grad_(False)
    gate.query_gain.normal_()
    gate.key_gain.normal_()
    layer = LayerGate(*(value.numpy() for value in (gate.query, gate.key, gate.query_gain, gate.key_gain)))
    unused = LayerGate(*(0 * value for value in (layer.query, layer.key, layer.query_gain, layer.key_gain)))
    q_THd, k_TGd = torch.randn(num_tokens, groups * heads, width), torch.randn(num_tokens, groups, width)
    pyramid = build_pyramid(torch.zeros_like(k_TGd), plain_k_SGd=k_TGd)
    score = gate_scorer(Gates((unused, layer), 5e3, "any"), 1, q_THd, pyramid)

    num_blocks = num_tokens // BLOCK_TOKENS
    queries_BGE = q_THd[::BLOCK_TOKENS][:num_blocks].reshape(num_blocks, groups, -1)
    statistics_BGS = key_statistics(k_TGd[: num_blocks * BLOCK_TOKENS])
    for level, indices in ((0, [1, 7, 30]), (1, [0, 2, 5])):
        expected_BGC = gate(queries_BGE, pool_statistics(statistics_BGS, level), level) * dim**0.5
        for query_block, group in ((50, 0), (72, 1)):
            expected = expected_BGC[query_block, group, indices].tolist()
            assert score(query_block, group, level, indices) == pytest.approx(expected, abs=1e-3)
    # The largest cells have no gate of their own here and are scored by that of the level below.
    gate.key.data = torch.cat((gate.key, gate.key[1:]))
    gate.key_gain.data = torch.cat((gate.key_gain, gate.key_gain[1:]))
    expected_BGC = gate(queries_BGE, pool_statistics(statistics_BGS, 2), 2) * dim**0.5
    assert score(72, 1, 2, [0]) == pytest.approx(expected_BGC[72, 1].tolist(), abs=1e-3)
