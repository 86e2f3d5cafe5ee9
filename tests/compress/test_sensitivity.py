"""Rounded projections against the reference of the kernels, and divergences against the plain way to compute them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from dseek.compress.rounding import RoundedLinear, rounded
from dseek.compress.sensitivity import ROW_STEP, Sensitivity, run_layers, scaled
from dseek.models.decoder import Decoder
from dseek.models.files import open_model
from dseek.models.tensor_names import ROLE_MODULES
from dseek.ops.linear.reference import linear
from tests.models import tiny

IDS = torch.tensor(tiny.token_ids(48, seed=5))


@pytest.fixture(scope="module", params=("llama-odd-sizes", "qwen2-window", "mistral-window"))
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    folder = tiny.save(request.param, tmp_path_factory.mktemp(request.param))
    with open_model(str(folder)) as files:
        yield Decoder.from_files(files, torch.float32).requires_grad_(False)


@pytest.mark.parametrize("few_rows", [True, False])
@pytest.mark.parametrize("weight_format", ["f32", "f16", "bf16", "i8c", "i8p", "i8g", "i4g"])
def test_a_rounded_layer_is_what_the_kernels_compute(weight_format: str, few_rows: bool) -> None:
    layer = torch.nn.Linear(80, 48)
    x = torch.randn(2, 5, 80, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = RoundedLinear(layer, weight_format, few_rows=few_rows)(x)
        expected = linear(x.reshape(-1, 80), layer.weight, weight_format, few_rows=few_rows) + layer.bias
    torch.testing.assert_close(found, expected.view(2, 5, 48), rtol=1e-4, atol=1e-5)


def test_layers_run_as_the_model_runs_them(decoder: Decoder) -> None:
    with torch.inference_mode():
        states: list[torch.Tensor] = []
        out = run_layers(decoder, decoder.model.embed_tokens(IDS[None]), 0, None, states)
        torch.testing.assert_close(decoder.model.norm(out), decoder.model(IDS[None]))
        last = decoder.shape.num_layers - 1
        torch.testing.assert_close(run_layers(decoder, states[last], last, None), out)


def test_divergence_is_that_of_the_whole_model(decoder: Decoder) -> None:
    formats = {(1, "down"): "i4g", (0, "qkv"): "i8c"}
    with torch.inference_mode():
        log_p = F.log_softmax(decoder(IDS[None])[0, ::ROW_STEP].double(), -1)
        with rounded(decoder, formats):
            log_q = F.log_softmax(decoder(IDS[None])[0, ::ROW_STEP].double(), -1)
        again = F.log_softmax(decoder(IDS[None])[0, ::ROW_STEP].double(), -1)
    assert torch.equal(again, log_p)
    expected = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
    sums = Sensitivity(decoder, [IDS])
    assert sums.divergence(formats) == pytest.approx(expected, rel=1e-3)
    assert sums.divergence({}) == pytest.approx(0, abs=1e-6)
    assert sums.divergence({}, cache_dtype="int8") > sums.divergence({}, cache_dtype="bf16") > 0
    assert sums.divergence({}, table_format="i8g") > sums.divergence({}, table_format="f16") > 0


def test_fishers_information_foresees_small_errors(decoder: Decoder) -> None:
    """Over many windows, and with errors as small as those of int8, it is near what is measured."""
    windows = [torch.tensor(tiny.token_ids(32, seed=seed)) for seed in range(12)]
    sums = Sensitivity(decoder, windows)
    expected = sums.expected(["i8c"], lambda what, done, total: None)["i8c"]
    for role in ROLE_MODULES:
        for layer in range(decoder.shape.num_layers):
            measured = sums.divergence({(layer, role): "i8c"})
            assert 0.4 < expected[role][layer] / measured < 2.5, (role, layer)


def test_scaling_keeps_the_level() -> None:
    found = scaled({"i4g": {"qkv": [1.0, 3.0], "down": [0.0, 0.0]}}, {("i4g", "qkv"): 0.8, ("i4g", "down"): 0.2})
    assert found == {"i4g": {"qkv": (0.2, pytest.approx(0.6)), "down": (0.1, 0.1)}}
