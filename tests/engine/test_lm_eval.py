"""The adaptor for lm-evaluation-harness, with requests as the harness makes them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn

from dseek.core.errors import RequestError
from dseek.engine.evaluate import score
from dseek.engine.llm import load
from dseek.serve.app import create_app
from dseek.serve.config import ServeConfig
from dseek.serve.service import Service
from tests.engine.fakes import FakeRunner, make_llm
from tests.serve.process import save_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra `eval`)")


def instance(kind: str, *args: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=args, idx=0)  # type: ignore[arg-type]


def adapter(runner: FakeRunner | None = None) -> Any:
    from dseek.engine.lm_eval_adapter import DseekLM

    return DseekLM(make_llm(runner))


def test_loglikelihood_scores_the_continuation_only() -> None:
    lm = adapter()
    pairs = [("abc", " de"), ("", "xyz"), ("trailing ", "space")]
    results = lm.loglikelihood([instance("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, results, strict=True):
        token_ids = [257, *(context + continuation).encode()]
        likelihoods, right = score(lm.llm, token_ids)
        count = len(continuation) + (len(context) - len(context.rstrip()))
        assert value == pytest.approx(float(likelihoods[-count:].sum()))
        assert greedy == bool(right[-count:].all())


def test_a_greedy_continuation_is_recognised() -> None:
    lm = adapter()
    answer = lm.llm.generate([[257, 97]], max_new_tokens=5, ignore_eos=True)[0].token_ids
    value, greedy = lm._score([257, 97], answer)
    assert greedy
    assert value < 0


def test_a_long_context_loses_its_front() -> None:
    lm = adapter()
    context = np.random.default_rng(0).integers(97, 120, 400).tolist()
    likelihoods, _ = score(lm.llm, [*context, 5][-256:])
    assert lm._score(context, [5])[0] == pytest.approx(likelihoods[-1])
    with pytest.raises(RequestError, match="continuation of 300 tokens"):
        lm._score([1], [2] * 300)


def test_rolling_scores_every_token_once() -> None:
    lm = adapter()
    text = "a rather long text, " * 20
    (value,) = lm.loglikelihood_rolling([instance("loglikelihood_rolling", text)], disable_tqdm=True)
    ids = list(text.encode())
    first, _ = score(lm.llm, [257, *ids[:255]])
    rest, _ = score(lm.llm, ids[-256:])
    assert value == pytest.approx(float(first.sum() + rest[-(len(ids) - 255) :].sum()), rel=1e-5)


def test_generate_until_stops_where_it_should() -> None:
    runner = FakeRunner()
    runner.script, runner.prompt_tokens = b"one\ntwo", 3
    requests = [
        instance("generate_until", "ab", {"until": ["\n"], "max_gen_toks": 20}),
        instance("generate_until", "ab", {"until": "zz", "do_sample": False}),
        instance("generate_until", "ab", {"max_new_tokens": 2}),
    ]
    assert adapter(runner).generate_until(requests, disable_tqdm=True) == ["one", "one\ntwo", "on"]


def test_unknown_generation_arguments_are_refused() -> None:
    with pytest.raises(RequestError, match="num_beams"):
        adapter().generate_until([instance("generate_until", "ab", {"num_beams": 4})])


def test_the_chat_template_is_the_models() -> None:
    lm = adapter()
    assert lm.apply_chat_template([{"role": "user", "content": "hi"}]) == "<user>hi<assistant>"
    assert lm.chat_template(True) == "fake"
    assert lm.tokenizer_name == "fake"


def test_the_harness_runs_a_task() -> None:
    """A whole run of the harness over a task of two documents, made on the spot."""
    import lm_eval
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    documents = [{"text": "ab", "choices": ["c", "d"], "label": label} for label in (0, 1)]

    class Tiny(ConfigurableTask):
        def download(self, *args: Any, **kwargs: Any) -> None:
            self.dataset = DatasetDict({"test": Dataset.from_list(documents)})

    task = Tiny(
        config={
            "task": "tiny",
            "dataset_path": "none",
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{label}}",
            "metric_list": [{"metric": "acc"}],
        }
    )
    results = lm_eval.simple_evaluate(model=adapter(), tasks=[task], bootstrap_iters=0, verbosity="ERROR")
    assert results["results"]["tiny"]["acc,none"] == 0.5


@pytest.mark.native
def test_the_harness_gets_from_a_server_what_the_model_says(tmp_path: Path) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model, plan = save_model(tmp_path)
    pairs = [("the quick brown", " fox jumps"), ("a lazy", " dog"), ("the", " quick fox over the lazy dog")]
    with load(str(model), plan=str(plan)) as llm:
        expected = []
        for context, continuation in pairs:
            context_ids, ids = (
                llm.tokenizer.encode(text, add_special_tokens=False) for text in (context, context + continuation)
            )
            likelihoods, right = score(llm, ids)
            count = len(ids) - len(context_ids)
            expected.append((float(likelihoods[-count:].sum()), bool(right[-count:].all())))
        said = llm.generate(["the quick brown"], max_new_tokens=8)[0].text
        with answering(create_app(Service(llm, ServeConfig(model_names=("tiny",))))) as url:
            lm = LocalCompletionsAPI(
                base_url=f"{url}/v1/completions",
                model="tiny",
                tokenizer_backend="huggingface",
                tokenizer=str(model),
                batch_size=2,
                max_length=1024,
            )
            found = lm.loglikelihood([instance("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
            options = {"until": ["never said"], "max_gen_toks": 8}
            (answer,) = lm.generate_until([instance("generate_until", "the quick brown", options)], disable_tqdm=True)
    for (value, greedy), (expected_value, expected_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(expected_value, abs=1e-3) and greedy == expected_greedy
    assert answer == said


@contextmanager
def answering(app: Any) -> Iterator[str]:
    """Serve an application on a free port of this machine, beside the test; yield its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="on", log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()
