"""The engine on PyTorch with small real models: the same tokens alone, batched, in any chunks, and as transformers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dseek.core.attention_pattern import DENSE
from dseek.core.errors import ConfigError
from dseek.engine.engine import Engine
from dseek.engine.llm import LLM
from dseek.engine.request import SamplingParams
from dseek.engine.torch_runner import TorchRunner
from dseek.models.files import ModelFiles, open_model
from tests.engine.fakes import SMALL_SHAPE
from tests.models import tiny

CASES = ("llama", "mistral-window", "qwen2-window", "qwen3-128-tied", "llama-yarn")
PROMPT_LENGTHS = (3, 30, 1, 17, 64)


@pytest.fixture(scope="module", params=CASES)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny.save(request.param, tmp_path_factory.mktemp(request.param))
    with open_model(str(folder)) as opened:
        yield opened


def make_plan(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "precision": "fp32",
        "num_threads": 1,
        "num_pages": 40,
        "page_tokens": 16,
        "context_tokens": 128,
        "max_batch": 8,
        "prefill_chunk_tokens": 64,
        "attention_patterns": (DENSE,),
        "activation_limits": (),
        "shape": SMALL_SHAPE,
        "predicted": SimpleNamespace(decode_tokens_s=100.0, prefill_tokens_s=1000.0),
    }
    return SimpleNamespace(**(fields | changes))


def make_engine(files: ModelFiles, **changes: Any) -> Engine:
    plan = make_plan(**changes)
    return Engine(files, plan, TorchRunner.from_files(files, plan))


def prompts() -> list[list[int]]:
    return [tiny.token_ids(length, seed=length) for length in PROMPT_LENGTHS]


def answers(engine: Engine, params: SamplingParams) -> list[tuple[int, ...]]:
    requests = [engine.add(prompt, params) for prompt in prompts()]
    while engine.has_work:
        engine.step()
    return [request.output().token_ids for request in requests]


def theirs(folder: Path, prompts: list[list[int]], num_tokens: int) -> list[tuple[int, ...]]:
    """Greedy tokens of transformers' `generate`, prompt by prompt."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens)
        answers.append(tuple(out[0, len(prompt) :].tolist()))
    return answers


def test_greedy_tokens_equal_transformers(files: ModelFiles) -> None:
    ours = answers(make_engine(files), SamplingParams(max_new_tokens=12))
    assert ours == theirs(files.path, prompts(), 12)


def test_batching_and_chunks_change_nothing(files: ModelFiles) -> None:
    params = SamplingParams(max_new_tokens=12, temperature=0.7, top_p=0.9, seed=1)
    expected = answers(make_engine(files, max_batch=1), params)
    assert answers(make_engine(files, prefill_chunk_tokens=7), params) == expected
    assert answers(make_engine(files, num_pages=10, page_tokens=16), params) == expected


def test_logits_equal_transformers(files: ModelFiles) -> None:
    ids = tiny.token_ids(100, seed=5)
    plan = make_plan()
    llm = LLM(files, plan, TorchRunner.from_files(files, plan))
    np.testing.assert_allclose(llm.logits(ids), tiny.reference_logits(files.path, ids), atol=1e-4)


def test_precisions_without_kernels_are_refused(files: ModelFiles) -> None:
    with pytest.raises(ConfigError, match="precision int8 on PyTorch; needed: one of fp32, bf16, fp16"):
        TorchRunner.from_files(files, make_plan(precision="int8"))


def test_half_precision_runs(files: ModelFiles) -> None:
    plan = make_plan(precision="bf16")
    llm = LLM(files, plan, TorchRunner.from_files(files, plan))
    ids = tiny.token_ids(60, seed=6)
    logits = llm.logits(ids)
    assert logits.dtype == np.float32
    same = logits.argmax(axis=1) == tiny.reference_logits(files.path, ids).argmax(axis=1)
    assert same.mean() > 0.9
    llm.engine.close()
    with pytest.raises(AssertionError, match="closed"):
        llm.logits(ids)
