"""Pages that real models share or compute twice, with every pattern of attention: the tokens of a request alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from dseek.core.attention_pattern import DENSE
from dseek.engine.engine import Engine
from dseek.engine.llm import LLM, load
from dseek.engine.lookup import Speculator
from dseek.engine.native_runner import NativeRunner
from dseek.engine.request import Request, SamplingParams
from dseek.engine.whole_text import pieces
from dseek.models.encoding import to_float32
from dseek.models.files import open_model
from dseek.plan.plan import Plan
from tests.engine.test_native_attention import PATTERNS, make_plan
from tests.engine.test_torch_runner import make_engine as make_torch_engine
from tests.models import tiny

pytestmark = pytest.mark.native

BEGINNING = tiny.token_ids(640, seed=3)
"""Ten pages, which end a cell of eight."""
PROMPTS = [[*BEGINNING, *tiny.token_ids(length, seed=length)] for length in (58, 60, 62)]
PARAMS = SamplingParams(max_new_tokens=8, ignore_eos=True, detokenize=False, temperature=0.7, seed=3)
GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True, detokenize=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny.save("llama-64-mha", tmp_path_factory.mktemp("paging"))
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 4096}))
    return path


def answers(llm: LLM) -> list[tuple[int, ...]]:
    return [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("name", ["dense", "rows", "far"])
def test_shared_and_preempted_pages_change_no_answer(folder: Path, name: str) -> None:
    plan: Plan = make_plan(folder, PATTERNS.get(name, DENSE))
    plan = dataclasses.replace(plan, max_batch=5, prefill_chunk_tokens=256, num_threads=1)
    with load(str(folder), plan=plan, prefix_cache=False) as llm:
        alone = [llm.generate([prompt], PARAMS)[0].token_ids for prompt in PROMPTS]
        assert llm.engine.counters.saved_tokens == 0
    # Each prompt has eleven pages, and each answer begins a twelfth.
    small = dataclasses.replace(plan, num_pages=35, prefill_chunk_tokens=2200)
    for other in (plan, small):
        with load(str(folder), plan=other) as llm:
            assert answers(llm) == alone
            saved = llm.engine.counters.saved_tokens
            assert saved >= 2 * 640
            assert answers(llm) == alone
            assert llm.engine.counters.saved_tokens >= saved + 3 * 640
    with load(str(folder), plan=small, prefix_cache=False) as llm:
        assert answers(llm) == alone
        assert llm.engine.counters.preemptions > 0


class Knowing(Speculator):
    """Guesses what it was told will come, and now and then something else."""

    def __init__(self, texts: list[list[int]]) -> None:
        super().__init__(6, None)
        self.texts = texts

    def draft(self, request: Request, limit: int, num_answers: int) -> list[int]:
        start = len(request.token_ids)
        (text,) = (text for text in self.texts if text[:start] == request.token_ids)
        most = max(0, min(limit, 6, request.max_tokens - start - 1))
        return [text[i] if i % 5 else text[i] ^ 1 for i in range(start, start + most)]


@pytest.mark.parametrize("name", ["dense", "rows", "dynamic", "far"])
def test_guesses_change_no_answer(folder: Path, name: str) -> None:
    plan = dataclasses.replace(make_plan(folder, PATTERNS.get(name, DENSE)), max_batch=2, num_threads=1)
    texts = [(BEGINNING * 2)[:length] for length in (190, 755)]
    with load(str(folder), plan=plan, speculate=6) as llm:
        for params in (dataclasses.replace(PARAMS, max_new_tokens=24), GREEDY):
            alone = [llm.generate([text], params)[0].token_ids for text in texts]
            assert llm.engine.scheduler.speculator is not None
            usual, llm.engine.scheduler.speculator = (
                llm.engine.scheduler.speculator,
                Knowing([[*text, *answer] for text, answer in zip(texts, alone, strict=True)]),
            )
            before = dataclasses.replace(llm.engine.counters)
            assert [output.token_ids for output in llm.generate(texts, params)] == alone
            llm.engine.scheduler.speculator = usual
            counters = llm.engine.counters
            assert counters.drafted_tokens - before.drafted_tokens > counters.accepted_tokens - before.accepted_tokens
            assert counters.accepted_tokens - before.accepted_tokens > 20


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_hidden_states_times_the_head_are_logits(folder: Path, kernels: str) -> None:
    with open_model(str(folder)) as files:
        head = to_float32(
            files.tensor("lm_head.weight" if files.has("lm_head.weight") else "model.embed_tokens.weight")
        )
        if kernels == "native":
            plan = dataclasses.replace(make_plan(folder, DENSE), num_threads=1, prefill_chunk_tokens=100)
            engine = Engine(files, plan, NativeRunner(files, plan))
        else:
            engine = make_torch_engine(files)
        for length in (1, 120):
            ids = BEGINNING[:length]
            hidden = [rows.copy() for _, rows in pieces(engine, ids, engine.runner.hidden)]
            logits = [rows.copy() for _, rows in engine.logits(ids)]
            np.testing.assert_allclose(np.concatenate(hidden) @ head.T, np.concatenate(logits), atol=1e-4)
            np.testing.assert_allclose(
                engine.embed(ids, normalise=False), np.concatenate(hidden).mean(axis=0), atol=1e-6
            )
        engine.close()
