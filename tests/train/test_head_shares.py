"""What heads cost where they see less, and the choice between them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from dseek.core.attention_pattern import BLOCK_TOKENS
from dseek.core.errors import ConfigError
from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from dseek.models.projections import project
from dseek.ops.attention.rotary import rotate
from dseek.train import head_shares
from dseek.train.gate import Gate
from dseek.train.head_shares import FACTORS, HeadCosts, HeadShares, choose_shares, measure_heads, text_costs
from tests.models import tiny

TOKENS = 8 * BLOCK_TOKENS
CONFIG = HeadShares(min_share=0.1, seed=3)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A small Llama, two layers of four heads in two groups."""
    with open_model(str(tiny.save("llama", tmp_path_factory.mktemp("models") / "tiny"))) as files:
        return Decoder.from_files(files, torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def gates(decoder: Decoder) -> torch.nn.ModuleList:
    """Untrained gates: they score by mean keys."""
    torch.manual_seed(0)
    shape = decoder.shape
    return torch.nn.ModuleList(
        Gate(shape.num_heads, shape.num_kv_heads, shape.head_dim, gate_dim=16, num_levels=2, theta=1e4)
        for _ in range(shape.num_layers)
    )


def text(seed: int, num_tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(3, 380, (num_tokens,), generator=torch.Generator().manual_seed(seed))


def test_the_cheapest_choice_within_the_density_is_found() -> None:
    torch.manual_seed(0)
    size = 1 + len(FACTORS)
    density = torch.rand(1, 4, size).sort(descending=True).values
    divergence = torch.rand(1, 4, size).sort().values
    density[..., 0], divergence[..., 0] = 1.0, 0.0
    best = {}
    for choice in itertools.product(range(size), repeat=4):
        mean = sum(float(density[0, head, place]) for head, place in enumerate(choice)) / 4
        best[mean] = min(
            best.get(mean, 9.0), sum(float(divergence[0, head, place]) for head, place in enumerate(choice))
        )
    every = torch.tensor((0.0, *FACTORS))
    for wanted in (0.9, 0.6, 0.4):
        found = choose_shares(HeadCosts(divergence, density), wanted)
        places = [int((every == factor).nonzero()) for factor in found[0]]
        cost = sum(float(divergence[0, head, place]) for head, place in enumerate(places))
        used = sum(float(density[0, head, place]) for head, place in enumerate(places)) / 4
        assert used <= wanted
        # One price finds what no other choice of that density or less beats.
        assert cost <= min(loss for mean, loss in best.items() if mean <= used) + 1e-6
    assert (choose_shares(HeadCosts(divergence, density), 1.0) == 0).all()
    assert (choose_shares(HeadCosts(divergence, density), 1e-9) >= 0).all()


def test_costs_are_those_of_closing_the_blocks(decoder: Decoder, gates: torch.nn.ModuleList) -> None:
    ids = text(0)
    costs = text_costs(decoder, ids, gates, CONFIG)
    assert costs.divergence.shape == (2, 2, 1 + len(FACTORS))
    assert (costs.divergence[..., 0] == 0).all() and (costs.density[..., 0] == 1).all()
    assert (costs.density.diff(dim=-1) <= 0).all() and (costs.divergence[..., 1:] >= 0).all()
    first = TOKENS // 4
    rows = torch.arange(first, TOKENS)
    # With the last factor a row sees the first block, the one before its own, and its own up to itself.
    seen = torch.where(rows // 64 >= 2, 128, 64) + rows % 64 + 1
    assert float(costs.density[0, 0, -1]) == pytest.approx(float(seen.sum() / (rows + 1).sum()), rel=1e-6)
    predicted, true = [], []
    for layer, group in itertools.product(range(2), range(2)):
        drawn = [
            text_costs(decoder, ids, gates, HeadShares(min_share=0.1, seed=seed)).divergence[layer, group, -1]
            for seed in range(8)
        ]
        predicted.append(float(torch.stack(drawn).mean()))
        true.append(divergence_without(decoder, ids, layer, group, first))
    # To second order, with drawn tokens and rows taken as independent.
    for own, other in zip(predicted, true, strict=True):
        assert own == pytest.approx(other, rel=0.5)
    assert max(true) > 1.5 * min(true), "the heads differ, or the test says nothing"


def divergence_without(decoder: Decoder, ids: torch.Tensor, layer: int, group: int, first: int) -> float:
    """KL divergence of predictions, nats a row, where one group of one layer sees its near blocks alone."""
    dense, sparse = (logits(decoder, ids, where)[first:].log_softmax(-1) for where in (None, (layer, group)))
    return float((dense.exp() * (dense - sparse)).sum(-1).mean())


def logits(decoder: Decoder, ids: torch.Tensor, where: tuple[int, int] | None) -> torch.Tensor:
    """The model once more, attention through the whole table of scores."""
    model = decoder.model
    x = model.embed_tokens(ids)
    rotation = model.rotary_emb(torch.arange(len(ids)), x.dtype, None)
    blocks = torch.arange(len(ids)) // 64
    near = (blocks[None] >= blocks[:, None] - 1) | (blocks[None] == 0)
    causal = torch.ones(len(ids), len(ids)).tril().bool()
    for index, block in enumerate(model.layers):
        q, k, v = project(block.self_attn, block.input_layernorm(x))
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        outs = []
        for head in range(q.shape[1]):
            group = head // (q.shape[1] // k.shape[1])
            # Rows before the first counted one stay as they were.
            late = torch.arange(len(ids))[:, None] < len(ids) // 4
            mask = causal & (near | late) if (index, group) == where else causal
            scores = (q[:, head] @ k[:, group].T / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
            outs.append(scores.softmax(-1) @ v[:, group])
        x = x + block.self_attn.o_proj(torch.cat(outs, dim=-1))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return decoder.lm_head(model.norm(x))


def test_a_measured_text_is_not_measured_again(
    decoder: Decoder, gates: torch.nn.ModuleList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text(1), text(2, TOKENS + 40), text(3, 100)]
    seen: list[tuple[str, int, int]] = []

    def note(*args: object) -> None:
        seen.append(args[:3])  # type: ignore[arg-type]

    costs = measure_heads(decoder, texts, gates, tmp_path, CONFIG, note)
    assert seen == [("heads", 1, 2), ("heads", 2, 2)], "the short text is left out"
    both = [text_costs(decoder, ids[:TOKENS], gates, CONFIG).density for ids in texts[:2]]
    torch.testing.assert_close(costs.density, torch.stack(both).mean(0))

    def measured_again(*_: object) -> HeadCosts:
        raise AssertionError("measured again")

    monkeypatch.setattr(head_shares, "text_costs", measured_again)
    again = measure_heads(decoder, texts, gates, tmp_path, CONFIG, note)
    assert torch.equal(again.divergence, costs.divergence)
    with pytest.raises(ConfigError, match="other texts"):
        measure_heads(decoder, texts[1:], gates, tmp_path, CONFIG, note)
    with pytest.raises(ConfigError, match="no text"):
        measure_heads(decoder, texts[2:], gates, tmp_path, CONFIG, note)


@pytest.mark.parametrize(
    "values", [{"min_share": 0.0}, {"density": 0.0}, {"density": 1.5}, {"num_texts": 0}, {"max_tokens": 100}]
)
def test_bad_settings(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        HeadShares(**values)  # type: ignore[arg-type]
