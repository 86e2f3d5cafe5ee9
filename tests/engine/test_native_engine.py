"""The engine on the native kernels with small real models: the same tokens alone, batched and in any chunks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dseek import plan as planning
from dseek.engine.llm import LLM, load
from dseek.engine.request import SamplingParams
from dseek.models.files import open_model
from dseek.plan.plan import Plan
from tests.models import tiny
from tests.plan.machines import machine

pytestmark = pytest.mark.native

CASES = ("llama-64-mha", "mistral-window", "qwen2-window", "qwen3-128-tied")
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
PROMPT_LENGTHS = (3, 30, 1, 17, 100, 65)


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save(request.param, tmp_path_factory.mktemp(request.param)))


def make_plan(folder: str, precision: str) -> Plan:
    with open_model(folder) as files:
        return planning.make(
            files.shape,
            machine(),
            planning.Objective(context_tokens=128, batch=8),
            encodings=files.encodings(),
            precision=precision,
            num_threads=2,
        )


def prompts() -> list[list[int]]:
    return [tiny.token_ids(length, seed=length) for length in PROMPT_LENGTHS]


def answers(llm: LLM, params: SamplingParams, *, together: bool) -> list[tuple[int, ...]]:
    if together:
        return [output.token_ids for output in llm.generate(prompts(), params)]
    return [llm.generate([prompt], params)[0].token_ids for prompt in prompts()]


def test_fp32_tokens_are_those_of_the_reference(folder: str) -> None:
    with load(folder, plan=make_plan(folder, "fp32")) as llm:
        greedy = answers(llm, SamplingParams(max_new_tokens=6, ignore_eos=True), together=True)
        for prompt, answer in zip(prompts(), greedy, strict=True):
            logits = tiny.reference_logits(folder, [*prompt, *answer])
            assert tuple(logits[len(prompt) - 1 : -1].argmax(axis=1)) == answer
        ids = tiny.token_ids(128, seed=9)
        np.testing.assert_allclose(llm.logits(ids), tiny.reference_logits(folder, ids), atol=1e-4)


def test_batching_and_chunks_change_nothing(folder: str) -> None:
    plan = make_plan(folder, "fp32")
    params = SamplingParams(max_new_tokens=8, temperature=0.8, top_p=0.9, seed=4, ignore_eos=True)
    with load(folder, plan=plan) as llm:
        alone = answers(llm, params, together=False)
        assert answers(llm, params, together=True) == alone
    with load(folder, plan=dataclasses.replace(plan, prefill_chunk_tokens=13)) as llm:
        assert answers(llm, params, together=True) == alone


@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits_come_out_the_same_in_pieces(folder: str, precision: str) -> None:
    """Few rows and many may take different kernels, which round differently in the narrow precisions."""
    plan = make_plan(folder, precision)
    ids = tiny.token_ids(128, seed=9)
    with load(folder, plan=plan) as llm:
        whole = llm.logits(ids)
    with load(folder, plan=dataclasses.replace(plan, prefill_chunk_tokens=19, max_batch=1)) as llm:
        pieces = llm.logits(ids)
    scale = float(np.abs(whole).max())
    assert float(np.abs(whole - pieces).max()) < 0.03 * scale
    assert (whole.argmax(axis=1) == pieces.argmax(axis=1)).mean() > 0.95
