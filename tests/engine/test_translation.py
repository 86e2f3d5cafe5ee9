"""Translation: kernels, PyTorch and transformers choose the same tokens; int8 is what its reference computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dseek.compress import qat
from dseek.core.errors import ConfigError, RequestError, UnsupportedModelError
from dseek.engine.marian_native import NativeMarian
from dseek.engine.translation import Translator, answer_limit, load_translator, make_runner
from dseek.models.marian_files import open_tokenizer
from dseek.ops import native
from tests.models.tiny_marian import SENTENCES, pad, tiny_folder, tiny_marian

VARIANTS = native.module().variants() if native.module() is not None else []
LENGTHS, LIMITS = (5, 1, 17, 9, 33, 2, 40), (7, 20, 40, 12, 30, 1, 9)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    compiled = native.require()
    before, threads = compiled.variant(), compiled.num_threads()
    compiled.set_variant(request.param)
    yield request.param
    compiled.set_variant(before)
    compiled.set_num_threads(threads)


def sources() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 203, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.native
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_batch_and_threads_change_nothing(variant: str, precision: str) -> None:
    model = tiny_marian()
    found = []
    for threads in (1, 3):
        runner = make_runner(model, precision, backend="native", threads=threads)
        found.append(runner.translate(sources(), LIMITS))
        alone = [runner.translate([source], [limit])[0] for source, limit in zip(sources(), LIMITS, strict=True)]
        assert alone == found[-1]
        assert runner.translate(sources(), LIMITS) == found[-1]
    assert found[0] == found[1]
    if precision == "fp32":
        assert found[0] == make_runner(model, "fp32", backend="torch").translate(sources(), LIMITS)
    assert all(0 not in answer for answer in found[0])


@pytest.mark.native
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("threads", [1, 2])
def test_logits_are_those_of_the_module(variant: str, activation: str, threads: int) -> None:
    model = tiny_marian(activation=activation)
    runner = NativeMarian(model, "fp32", threads=threads)
    target = torch.randint(3, 203, (19,), generator=torch.Generator().manual_seed(2)).tolist()
    for source in sources()[:5]:
        with torch.no_grad():
            expected = model(torch.tensor([source]), torch.tensor([[0, *target[:-1]]]))[0].numpy()
        found = runner.logits(source, target)
        np.testing.assert_allclose(found[:, 1:], expected[:, 1:], rtol=0, atol=3e-6)
        assert (found[:, 0] == -np.inf).all()  # the suppressed token


@pytest.mark.native
def test_int8_is_what_training_rounds(variant: str) -> None:
    model, prepared = tiny_marian(), qat.prepare(tiny_marian(), qat.QatConfig(activations="dynamic"))
    prepared.eval()
    runner = NativeMarian(model, "int8", threads=1)
    target = torch.randint(3, 203, (19,), generator=torch.Generator().manual_seed(2)).tolist()
    gaps = []
    for source in sources():
        with torch.no_grad():
            expected = prepared(torch.tensor([source]), torch.tensor([[0, *target[:-1]]]))[0].numpy()
        gaps.append(np.abs(runner.logits(source, target)[:, 1:] - expected[:, 1:]))
    gap = np.concatenate(gaps)
    wide = NativeMarian(model, "fp32", threads=1).logits(source, target)[:, 1:]
    rounding = np.abs(wide - expected[:, 1:])
    # A value on the boundary of two integers may go either way, and what follows with it; elsewhere nothing differs.
    assert np.median(gap) < 2e-6
    assert gap.max() < 2 * rounding.max()
    assert np.median(rounding) > 1e-3


@pytest.mark.native
def test_transformers_generates_the_same(tmp_path: Path) -> None:
    from transformers import MarianMTModel

    tiny_folder(tmp_path)
    translator = load_translator(tmp_path)
    theirs = MarianMTModel.from_pretrained(tmp_path).eval()
    encoded = translator.encode(SENTENCES)
    ids, mask = pad(encoded)
    with torch.no_grad():
        generated = theirs.generate(input_ids=ids, attention_mask=mask.long(), max_new_tokens=20, num_beams=1)
    answers = translator.runner.translate(encoded, [20] * len(encoded))
    assert isinstance(translator.runner, NativeMarian)
    for row, answer in zip(generated.tolist(), answers, strict=True):
        assert row[1 : 1 + len(answer)] == answer
    assert max(map(len, answers)) > 2


@pytest.mark.native
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_answers_that_end_leave_the_batch(backend: str) -> None:
    limits = [30] * 21

    def answers(end: int) -> list[list[int]]:
        # Positions outweigh embeddings, so that the likeliest token changes along the way.
        model = tiny_marian(eos_id=end, scale_embedding=False)
        with torch.no_grad():
            model.final_logits_bias.zero_()
            for name, parameter in model.named_parameters():
                if "norm.weight" in name:
                    parameter.fill_(1.0)
        return make_runner(model, "fp32", backend=backend).translate(sources() * 3, limits)

    whole = answers(end=1)
    end = max(range(2, 203), key=lambda token: len({answer.index(token) for answer in whole if token in answer}))
    places = {answer.index(end) for answer in whole if end in answer}
    assert len(places) > 1
    assert answers(end) == [answer[: answer.index(end)] if end in answer else answer for answer in whole]


@pytest.mark.native
def test_bad_tokens_and_limits_are_refused() -> None:
    runner = make_runner(tiny_marian(), "int8", backend="native")
    for bad_sources, limits in (
        ([[5, 203]], [4]),
        ([[-1]], [4]),
        ([[5] * 41], [4]),
        ([[5], []], [4, 4]),
        ([[5]], [0]),
        ([[5]], [41]),
        ([[5]], [4, 4]),
    ):
        with pytest.raises(ValueError):
            runner.translate(bad_sources, limits)
    assert runner.translate([[5, 1]], [3])  # it goes on


@pytest.mark.native
def test_widths_that_the_kernels_do_not_have() -> None:
    with pytest.raises(UnsupportedModelError, match="multiple of 16"):
        make_runner(tiny_marian(hidden_size=36), "fp32", backend="native")
    assert make_runner(tiny_marian(hidden_size=36), "fp32", backend="torch").translate([[5, 1]], [3])


def test_lines_keep_their_order(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path)
    translator = Translator(make_runner(model, "fp32", backend="torch"), open_tokenizer(tmp_path))
    lines = ["", *SENTENCES, "  ", "dog"]
    seen: list[tuple[int, int]] = []
    found = translator.translate(lines, batch_size=2, progress=lambda *state: seen.append(state))
    assert found == [translator.translate([line])[0] for line in lines]
    assert found[0] == found[5] == "" and found[1]
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert len(translator.encode([found[1]])[0]) <= answer_limit(len(translator.encode([lines[1]])[0]), model.shape) + 1


def test_requests_that_cannot_be_served(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path)
    translator = Translator(make_runner(model, "fp32", backend="torch"), open_tokenizer(tmp_path))
    with pytest.raises(RequestError, match="line 2"):
        translator.translate(["dog", "dog walks " * 40])
    for options in ({"batch_size": 0}, {"max_new_tokens": 0}, {"max_new_tokens": 41}):
        with pytest.raises(RequestError):
            translator.translate(["dog"], **options)
    with pytest.raises(ConfigError, match="precision"):
        make_runner(model, "int3")
    with pytest.raises(ConfigError, match="native kernels"):
        make_runner(model, "int8", backend="torch")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    tiny_folder(tmp_path, vocab_size=40)
    with pytest.raises(ConfigError, match="tokenizer"):
        load_translator(tmp_path)
