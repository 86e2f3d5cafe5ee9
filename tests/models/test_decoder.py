"""The torch decoder against transformers: logits, caches, dtypes, gradients, tracing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dseek.core.errors import RequestError
from dseek.models.decoder import Decoder
from dseek.models.families import shape_from_config
from dseek.models.files import open_model
from tests.models import tiny

TOLERANCE = 1e-4


def decoder_of(case_id: str, seed: int = 0) -> tuple[Decoder, Any]:
    """Our decoder with the weights of transformers' model, and that model."""
    reference = tiny.build(case_id, seed)
    decoder = Decoder(shape_from_config(reference.config.to_dict()))
    decoder.load_state_dict(reference.state_dict())
    return decoder.eval(), reference


def ids(batch_size: int, num_tokens: int) -> torch.Tensor:
    return torch.tensor([tiny.token_ids(num_tokens, seed=row) for row in range(batch_size)])


@pytest.fixture(autouse=True)
def _no_gradients_unless_asked() -> Any:
    tiny.settle_trigonometry()
    with torch.no_grad():
        yield


@pytest.mark.parametrize("case_id", tiny.CASES)
def test_logits_equal_transformers(case_id: str) -> None:
    decoder, reference = decoder_of(case_id)
    for batch_size, num_tokens in ((1, 1), (2, 70)):
        tokens = ids(batch_size, num_tokens)
        difference = (decoder(tokens) - reference(tokens, use_cache=False).logits).abs().max()
        assert difference < TOLERANCE


@pytest.mark.parametrize("case_id", tiny.CASES)
def test_step_by_step_with_a_cache_equals_transformers(case_id: str) -> None:
    decoder, reference = decoder_of(case_id)
    tokens = ids(2, 44)
    cache, their_cache = decoder.make_cache(44, batch_size=2), None
    # A prompt, a second prompt that needs a mask over the first, then one by one.
    for piece in tokens.split([11, 9, *[1] * 24], dim=1):
        theirs = reference(piece, past_key_values=their_cache, use_cache=True)
        their_cache = theirs.past_key_values
        assert (decoder(piece, cache) - theirs.logits).abs().max() < TOLERANCE
    assert cache.length == 44


@pytest.mark.parametrize("case_id", ["llama", "mistral-window", "qwen2-window", "qwen3-128-tied", "llama-llama3"])
@pytest.mark.parametrize("shards", [1, 3])
def test_loading_a_folder(case_id: str, shards: int, tmp_path: Path) -> None:
    folder = tiny.save(case_id, tmp_path, shards=shards)
    tokens = tiny.token_ids(50)
    files = open_model(str(folder))
    decoder = Decoder.from_files(files)
    files.close()
    assert not decoder.training
    difference = np.abs(decoder(torch.tensor([tokens]))[0].numpy() - tiny.reference_logits(folder, tokens)).max()
    assert difference < TOLERANCE
    tied = decoder.lm_head.weight is decoder.model.embed_tokens.weight
    assert tied == decoder.shape.tie_word_embeddings


def test_a_bfloat16_folder_in_bfloat16(tmp_path: Path) -> None:
    folder = tiny.save("qwen2", tmp_path, dtype="bfloat16")
    files = open_model(str(folder))
    decoder = Decoder.from_files(files, dtype=torch.bfloat16)
    files.close()
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.bfloat16}
    reference = tiny.build("qwen2").to(torch.bfloat16)
    assert torch.equal(decoder.model.layers[0].mlp.up_proj.weight, reference.model.layers[0].mlp.up_proj.weight)
    tokens = ids(1, 64)
    exact = torch.from_numpy(tiny.reference_logits(folder, tokens.numpy()))
    ours, theirs = (decoder(tokens).float() - exact).abs(), (reference(tokens).logits.float() - exact).abs()
    assert ours.mean() < 1.2 * theirs.mean()


def test_state_dicts_go_both_ways() -> None:
    decoder, reference = decoder_of("llama-96-tied")
    assert set(decoder.state_dict()) == set(reference.state_dict())
    reference.load_state_dict(decoder.state_dict())
    # As files have it: without the tied head, and with the frequencies of old versions.
    state = {name: tensor for name, tensor in decoder.state_dict().items() if name != "lm_head.weight"}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(48)
    fresh = Decoder(decoder.shape)
    fresh.load_state_dict(state)
    tokens = ids(1, 9)
    assert torch.equal(fresh(tokens), decoder(tokens))
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        fresh.load_state_dict({name: tensor for name, tensor in state.items() if name != "model.norm.weight"})


def test_casts_and_moves_keep_the_rotation_exact() -> None:
    decoder, _ = decoder_of("llama-llama3")
    frequencies = decoder.model.rotary_emb.frequencies.clone()
    for move in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), copy.deepcopy):
        moved = move(copy.deepcopy(decoder))
        assert moved.model.rotary_emb.frequencies.dtype == torch.float32
        assert torch.equal(moved.model.rotary_emb.frequencies, frequencies)
    double = copy.deepcopy(decoder).double()
    tokens = ids(1, 40)
    assert double(tokens).dtype == torch.float64
    assert (double(tokens) - decoder(tokens)).abs().max() < TOLERANCE
    with torch.device("meta"):
        empty = Decoder(decoder.shape)
    empty.to_empty(device="cpu")
    assert torch.equal(empty.model.rotary_emb.frequencies, frequencies)


@pytest.mark.parametrize("case_id", ["llama-16-mqa-tied", "qwen3-window", "llama-bias", "llama-dynamic"])
def test_a_training_step(case_id: str) -> None:
    decoder, reference = decoder_of(case_id)
    tokens = ids(2, 24)
    with torch.enable_grad():
        losses = []
        for model in (decoder, reference):
            logits = model(tokens)
            logits = logits if isinstance(logits, torch.Tensor) else logits.logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    theirs = dict(reference.named_parameters())
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: n + m)


def test_new_weights_learn() -> None:
    torch.manual_seed(0)
    decoder = Decoder(shape_from_config(tiny.build("qwen3").config.to_dict()))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    tokens = ids(2, 16)
    losses = []
    with torch.enable_grad():
        for _ in range(12):
            loss = torch.nn.functional.cross_entropy(decoder(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    # New weights know nothing: the loss is that of a uniform guess. Then they learn.
    assert losses[0] == pytest.approx(np.log(384), abs=0.2)
    assert losses[-1] < 0.5 * losses[0]


def test_a_cache_is_checked_and_can_be_cut() -> None:
    decoder, _ = decoder_of("llama")
    tokens = ids(1, 20)
    cache = decoder.make_cache(20)
    full = decoder(tokens, cache)
    with pytest.raises(RequestError, match="at most 0 tokens"):
        decoder(tokens[:, :1], cache)
    with pytest.raises(RequestError, match="2 rows"):
        decoder(ids(2, 1), decoder.make_cache(4))
    with torch.enable_grad(), pytest.raises(RequestError, match="gradients"):
        decoder(tokens, decoder.make_cache(20))
    cache.truncate(12)
    assert (decoder(tokens[:, 12:], cache) - full[:, 12:]).abs().max() < TOLERANCE
    assert cache.num_bytes == 2 * 2 * 2 * 20 * 32 * 4


def test_memory_that_was_never_written_is_never_read(poisoned_memory: None) -> None:
    decoder, _ = decoder_of("mistral-window")
    tokens = ids(1, 30)
    cache = decoder.make_cache(64)
    assert cache.keys_LBGSd.isnan().all()
    pieces = [decoder(piece, cache) for piece in tokens.split([7, 12, *[1] * 11], dim=1)]
    assert (torch.cat(pieces, dim=1) - decoder(tokens)).abs().max() < TOLERANCE


@pytest.mark.parametrize("case_id", ["llama", "qwen3-window"])
def test_export_with_dynamic_lengths(case_id: str) -> None:
    decoder, _ = decoder_of(case_id)
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(decoder, (ids(2, 24),), dynamic_shapes={"token_ids_BT": {0: batch, 1: length}})
    tokens = ids(1, 41)
    assert (exported.module()(tokens) - decoder(tokens)).abs().max() < TOLERANCE


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_in_one_graph_with_a_cache() -> None:
    decoder, _ = decoder_of("llama-dynamic")
    torch._dynamo.reset()
    graphs: list[Any] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(decoder, backend=count, fullgraph=True, dynamic=True)
    tokens = ids(1, 26)
    cache, plain_cache = decoder.make_cache(26), decoder.make_cache(26)
    for piece in tokens.split([8, 8, *[1] * 10], dim=1):
        assert (compiled(piece, cache) - decoder(piece, plain_cache)).abs().max() < TOLERANCE
    # One graph for a first prompt, one for a later one, one for every single token.
    assert len(graphs) == 3
    torch._dynamo.reset()
