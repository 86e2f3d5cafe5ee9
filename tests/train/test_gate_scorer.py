"""The scorer of a gate file gives the scores of the gate that was trained."""

from __future__ import annotations

import torch

from dseek.core.attention_pattern import BLOCK_TOKENS
from dseek.models.gate_file import LEARNED_PARTS, Gates, LayerGate
from dseek.models.gate_scorer import GateRowScorer
from dseek.train.gate import Gate, pool_means, pool_statistics
from dseek.train.gate_samples import key_statistics


def test_scores_are_those_of_the_trained_gate() -> None:
    torch.manual_seed(0)
    groups, heads, width, num_tokens = 2, 3, 16, 9 * 512 + 100
    gate = Gate(groups * heads, groups, width, gate_dim=32, num_levels=2, theta=5e3).requires_grad_(False)
    for part in (gate.query_gain, gate.key_gain, gate.scale, gate.own, gate.own_bias):
        part.normal_()
    arrays = [getattr(gate, part).numpy() for part in LEARNED_PARTS]
    layer = LayerGate(*arrays, dense=torch.zeros(groups).numpy())
    unused = LayerGate(*(0 * array for array in arrays), dense=torch.zeros(groups).numpy())
    q, k = torch.randn(num_tokens, groups * heads, width), torch.randn(num_tokens, groups, width)
    rotated_q, rotated_k = torch.randn(q.shape), torch.randn(k.shape)
    scorer = GateRowScorer(Gates((unused, layer), 5e3, "any"), 1, q, rotated_q, k, rotated_k)

    num_blocks = num_tokens // BLOCK_TOKENS
    statistics = key_statistics(k[: num_blocks * BLOCK_TOKENS])
    means = rotated_k[: num_blocks * BLOCK_TOKENS].unflatten(0, (num_blocks, BLOCK_TOKENS)).mean(1)
    rows = torch.tensor([3210, 4607, 4700])
    own = gate.own_block(q[rows])
    for level, indices in ((0, [1, 7, 30]), (1, [0, 2, 5])):
        cells = pool_statistics(statistics, level), pool_means(means, level)
        expected = gate(q[rows], rotated_q[rows], rows // BLOCK_TOKENS, *cells, level)
        for place, row in enumerate(rows.tolist()):
            for group in range(groups):
                members = slice(group * heads, (group + 1) * heads)
                found = scorer.cells(row, group, level, indices)
                torch.testing.assert_close(found, expected[place, members][:, indices], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(scorer.own_block(row, group), own[place, members])
