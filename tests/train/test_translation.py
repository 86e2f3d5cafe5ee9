"""Training of translation: the loss is what it says, batches hold every pair, and a stopped run goes on as it would."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dseek.compress import qat
from dseek.core.errors import ConfigError, RequestError
from dseek.models.marian import Marian
from dseek.models.marian_shape import MarianShape
from dseek.train.translation import TranslationTraining, smoothed_loss, train_translation, validation_loss
from dseek.train.translation_text import Pair, batches, encode_pairs, make_batch, train_vocabulary

CONFIG = TranslationTraining(num_passes=3, tokens_per_batch=64, learning_rate=3e-3, warm_up_steps=4, dropout=0.1)


def model(seed: int = 0) -> Marian:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "max_positions": 32}
    return Marian(MarianShape(vocab_size=24, num_encoder_layers=1, num_decoder_layers=1, **sizes))


def reversals(count: int) -> list[Pair]:
    """Pairs whose target is the source turned round."""
    generator = torch.Generator().manual_seed(count)
    pairs = []
    for _ in range(count):
        length = int(torch.randint(2, 9, (), generator=generator))
        tokens = torch.randint(3, 24, (length,), generator=generator).tolist()
        pairs.append(Pair([*tokens, 1], [*tokens[::-1], 1]))
    return pairs


def quiet(what: str, done: int, total: int, figures: dict[str, float]) -> None:
    assert 0 < done <= total and figures["loss"] > 0, what


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_the_smoothed_loss_is_that_of_pytorch(smoothing: float) -> None:
    net, batch = model().eval(), make_batch(reversals(7), 0, 0)
    loss, plain = smoothed_loss(net, batch, smoothing)
    logits = net(batch.source, batch.inputs, batch.source_mask).flatten(0, 1)
    labels = batch.labels.flatten()
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels, reduction="sum"), rtol=1e-5, atol=0)
    found = torch.autograd.grad(loss, net.model.shared.weight, retain_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, net.model.shared.weight)[0], rtol=1e-4, atol=1e-5)


def test_every_pair_is_in_one_batch_and_none_is_too_large() -> None:
    pairs = reversals(100)
    formed = list(batches(pairs, 64, seed=1))
    assert sorted(map(id, pairs)) == sorted(id(pair) for group in formed for pair in group)
    assert all(len(group) * max(max(len(pair.source), len(pair.target)) for pair in group) <= 64 for group in formed)
    assert formed == list(batches(pairs, 64, seed=1)) != list(batches(pairs, 64, seed=2))
    assert len(formed) == len(list(batches(pairs, 64, None)))


def test_a_batch_is_padded_and_shifted() -> None:
    batch = make_batch([Pair([5, 6, 1], [7, 1]), Pair([8, 1], [9, 4, 3, 1])], pad_id=0, start_id=2)
    assert batch.source.tolist() == [[5, 6, 1], [8, 1, 0]]
    assert batch.source_mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.inputs.tolist() == [[2, 7, 0, 0], [2, 9, 4, 3]]
    assert batch.labels.tolist() == [[7, 1, -100, -100], [9, 4, 3, 1]]
    assert batch.num_labels == 6


def test_padding_changes_no_loss() -> None:
    net, pairs = model().eval(), reversals(9)
    together = validation_loss(net, pairs, replace(CONFIG, tokens_per_batch=1024))
    assert together == pytest.approx(validation_loss(net, pairs, replace(CONFIG, tokens_per_batch=16)), rel=1e-5)


def test_a_stopped_training_goes_on_as_it_would_have(tmp_path: Path) -> None:
    pairs = reversals(60)
    whole, parts = model(), model()
    losses = train_translation(whole, pairs, pairs[:8], tmp_path / "whole", CONFIG, quiet)

    def stop(what: str, done: int, total: int, figures: dict[str, float]) -> None:
        if what == "pass 2" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_translation(parts, pairs, pairs[:8], tmp_path / "parts", CONFIG, stop)
    parts = model(seed=5)  # whatever it starts with, the state counts
    assert train_translation(parts, pairs, pairs[:8], tmp_path / "parts", CONFIG, quiet) == losses
    for (name, ours), theirs in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert losses[-1] < losses[0] < validation_loss(model(), pairs[:8], CONFIG)


def test_a_state_is_of_its_settings_and_model(tmp_path: Path) -> None:
    pairs = reversals(20)
    train_translation(model(), pairs, [], tmp_path / "state", CONFIG, quiet)
    with pytest.raises(ConfigError, match="learning_rate"):
        train_translation(model(), pairs, [], tmp_path / "state", replace(CONFIG, learning_rate=1e-3), quiet)
    with pytest.raises(ConfigError, match="num_passes"):  # the rate has fallen already
        train_translation(model(), pairs, [], tmp_path / "state", replace(CONFIG, num_passes=9), quiet)
    with pytest.raises(ConfigError, match="no pairs"):
        train_translation(model(), [], [], tmp_path / "none", CONFIG, quiet)


def test_a_training_may_be_lengthened_before_its_rate_falls(tmp_path: Path) -> None:
    pairs, long = reversals(20), replace(CONFIG, num_passes=6)

    def stop(what: str, done: int, total: int, figures: dict[str, float]) -> None:
        if what == "passes":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_translation(model(), pairs, [], tmp_path / "state", CONFIG, stop)
    lengthened, whole = model(), model()
    train_translation(lengthened, pairs, [], tmp_path / "state", long, quiet)
    train_translation(whole, pairs, [], tmp_path / "whole", long, quiet)
    assert torch.equal(lengthened.lm_head.weight, whole.lm_head.weight)


def test_rounding_trains_and_leaves_an_ordinary_model(tmp_path: Path) -> None:
    pairs = reversals(40)
    prepared = qat.prepare(model(), qat.QatConfig(activations="dynamic"))
    before = validation_loss(prepared, pairs, CONFIG)
    losses = train_translation(prepared, pairs, pairs, tmp_path / "state", CONFIG, quiet)
    assert losses[-1] < before
    plain = qat.restore(prepared)
    assert isinstance(plain, Marian) and plain.lm_head.weight is plain.model.shared.weight
    assert plain.state_dict().keys() == model().state_dict().keys()


@pytest.mark.parametrize(
    "values", [{"num_passes": 0}, {"learning_rate": 0.0}, {"dropout": 1.0}, {"averaging": 1.0}, {"tokens_per_batch": 1}]
)
def test_settings_have_ranges(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        replace(CONFIG, **values)


def test_a_vocabulary_gives_text_back() -> None:
    texts = ["Zwei Hunde, nass und müde.", "Two dogs (wet and tired) run."] * 4
    backend = train_vocabulary(texts, 100)
    assert backend.encode(texts[0]).tokens[-1] == "</s>"
    assert all(backend.decode(backend.encode(text).ids) == text for text in texts)
    assert backend.encode("?%&").ids[-1] == 1
    pairs = encode_pairs(backend, [texts[0], "", "a " * 60], [texts[1], "x", "y"], max_tokens=40)
    assert len(pairs) == 1
    with pytest.raises(RequestError, match="translation of each"):
        encode_pairs(backend, ["a"], [], 40)
