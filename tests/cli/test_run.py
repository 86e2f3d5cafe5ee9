"""generate, chat, bench and eval with a small real model on PyTorch, from a saved plan: no measuring, no kernels."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from dseek import plan as planning
from dseek.cli.main import main
from dseek.cli.report import Limits, limits, planned_machine
from dseek.core.attention_pattern import AttentionPattern
from dseek.core.errors import ConfigError
from dseek.engine.llm import load
from dseek.hardware.machine import Machine
from dseek.models.files import open_model
from dseek.plan.formats import LayerFormats
from tests.models import tiny
from tests.models.test_long_positions import rescaled
from tests.plan.machines import machine as made_up_machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama."""
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def machine() -> Machine:
    """A made-up machine that was measured with PyTorch only."""
    whole = made_up_machine(with_torch=True)
    return dataclasses.replace(
        whole,
        machine_id="torchonly",
        linears=tuple(curve for curve in whole.linears if curve.kernels == "torch"),
        attentions=tuple(curve for curve in whole.attentions if curve.kernels == "torch"),
        overheads=tuple(costs for costs in whole.overheads if costs.kernels == "torch"),
        blocks=(),
    )


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that holds the machine's measurements."""
    for name in ("DSEEK_PRECISION_MODE", "DSEEK_NUM_THREADS", "DSEEK_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DSEEK_CACHE_DIR", str(tmp_path))
    (tmp_path / "machines").mkdir()
    machine.save(tmp_path / "machines" / "torchonly.json")
    return tmp_path


@pytest.fixture
def plan_file(folder: Path, machine: Machine, tmp_path: Path) -> str:
    """A plan for the model on the machine."""
    objective = planning.Objective(context_tokens=128, batch=2)
    with open_model(str(folder)) as files:
        plan = planning.make(
            files.shape, machine, objective, encodings=files.encodings(), precision="fp32", num_threads=1
        )
    plan.save(tmp_path / "plan.json")
    return str(tmp_path / "plan.json")


def test_generate_gives_the_models_own_tokens(folder: Path, plan_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(folder), "the quick", "--plan", plan_file, "--max-tokens", "5"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    with open_model(str(folder)) as files:
        ids = files.tokenizer().encode("the quick")
        expected = []
        while len(expected) < 5:
            expected.append(int(tiny.reference_logits(folder, ids + expected)[-1].argmax()))
        assert found["token_ids"] == expected
        assert found["text"] == files.tokenizer().decode(expected)
    assert (found["precision"], found["kernels"]) == ("fp32", "torch")
    assert 0 < found["decode_limit_share"]
    assert 0 < found["prefill_limit_share"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == found["text"] + "\n"
    assert "of the limit" in captured.err


def test_bench_puts_predictions_beside_measurements(
    folder: Path, plan_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", str(folder), "--plan", plan_file, "--contexts", "8,40", "--batches", "1,2"]
    arguments += ["--tokens", "3", "--repeats", "1"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(case["context_tokens"], case["batch"]) for case in found["cases"]] == [(8, 1), (8, 2), (40, 1), (40, 2)]
    for case in found["cases"]:
        assert all(value > 0 for value in case.values())
    errors = [
        abs(case[f"{kind}_predicted_tokens_s"] / case[f"{kind}_tokens_s"] - 1)
        for case in found["cases"]
        for kind in ("prefill", "decode")
    ]
    assert found["median_prediction_error"] == pytest.approx(float(np.median(errors)))
    assert main(arguments) == 0
    assert "predictions were off by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--contexts", "120", "--batches", "1"],
            "the longest case needs 152 tokens; needed: at most the context's 128",
        ),
        (["--contexts", "8", "--batches", "3"], "a case has a batch of 3; needed: at most the plan's 2"),
    ],
)
def test_bench_refuses_cases_beyond_the_plan(
    options: list[str], message: str, folder: Path, plan_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(folder), "--plan", plan_file, *options]) == 2
    assert message in capsys.readouterr().err


def test_eval_equals_transformers(
    folder: Path, plan_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a small model answers a small question, and then it stops. " * 9)
    arguments = ["eval", str(folder), "--text", str(text), "--plan", plan_file, "--max-tokens", "90"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    with open_model(str(folder)) as files:
        ids = files.tokenizer().encode(text.read_text())[:90]
    logits = tiny.reference_logits(folder, ids).astype(np.float64)[:-1]
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(89), ids[1:]]
    assert found["num_tokens"] == 89
    assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert found["accuracy"] == pytest.approx((logits.argmax(axis=1) == ids[1:]).mean())
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert f"perplexity           {found['perplexity']:.4f}" in captured.out
    assert "tokens/s" in captured.err


def test_eval_refuses_what_is_no_text(
    folder: Path, plan_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content, message in (
        ("missing", None, "cannot be read"),
        ("empty", b"", "is empty"),
        ("binary", b"\xff\xff", "is not text"),
        ("short", b"a", "the text has"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        status = main(["eval", str(folder), "--text", str(path), "--plan", plan_file, "--max-tokens", "1"])
        assert status == 2
        assert message in capsys.readouterr().err


def test_chat_talks(
    folder: Path, plan_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/exit\n"))
    assert main(["chat", str(folder), "--plan", plan_file, "--max-tokens", "6", "--seed", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("\n")
    assert "tokens/s" in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "int8"], "precision int8 contradicts the plan, which says fp32"),
        (["--context", "64"], "context 64 contradicts the plan, which says 128"),
        (["--threads", "9"], "threads 9 contradicts the plan"),
        (["--attention", "window"], "the attention asked for contradicts the plan, which says dense"),
    ],
)
def test_an_option_that_contradicts_the_plan_is_refused(
    options: list[str], message: str, folder: Path, plan_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(folder), "a", "--plan", plan_file, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_plan_for_another_model_is_refused(
    plan_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny.save("llama-48", tmp_path / "other")
    assert main(["generate", str(other), "a", "--plan", plan_file]) == 2
    assert "the plan is for" in capsys.readouterr().err


def test_eval_beyond_the_trained_length_equals_transformers(
    folder: Path,
    tmp_path: Path,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from dseek.cli import measuring

    monkeypatch.setattr(measuring, "load_or_measure", lambda **_: machine)
    text = tmp_path / "text.txt"
    text.write_text("a small model answers a small question, and then it stops. " * 90)
    run = [str(folder), "--precision", "fp32", "--context", "768", "--max-position-embeddings", "768"]
    run += ["--rope-scaling", "yarn"]
    assert main(["eval", *run, "--text", str(text), "--max-tokens", "768", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_windows"], found["num_tokens"]) == (1, 767)
    with open_model(str(folder)) as files:
        ids = files.tokenizer().encode(text.read_text())[:768]
    extended = rescaled(Path(shutil.copytree(folder, tmp_path / "extended")), "yarn")
    logits = tiny.reference_logits(extended, ids).astype(np.float64)[:-1]
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(767), ids[1:]]
    assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)

    # A plan carries the positions: the command that runs it need not name them, and may not name others.
    saved = str(tmp_path / "long.json")
    assert main(["plan", *run, "--save", saved]) == 0
    assert "at most 768, rotary embedding: yarn" in capsys.readouterr().out
    prompt = "a small model answers " * 60
    assert main(["generate", str(folder), prompt, "--plan", saved, "--max-tokens", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) <= 3
    assert main(["generate", str(folder), prompt, "--plan", saved, "--max-position-embeddings", "800"]) == 2
    assert "max_position_embeddings is 768; this model's is 800" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["plan", "generate", "chat", "bench", "eval"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-position-embeddings", "100"], "max position embeddings 100; needed: 256"),
        (["--rope-scaling", "yarn"], "rope scaling yarn without a number of positions"),
    ],
)
def test_positions_that_cannot_be_had_are_refused(
    verb: str,
    options: list[str],
    message: str,
    folder: Path,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from dseek.cli import measuring

    monkeypatch.setattr(measuring, "load_or_measure", lambda **_: machine)
    needed = {"generate": ["a"], "eval": ["--text", __file__]}.get(verb, [])
    assert main([verb, str(folder), *needed, *options]) == 2
    assert message in capsys.readouterr().err


def test_load_plans_for_itself(folder: Path, machine: Machine) -> None:
    with load(str(folder), machine=machine, precision="fp32", threads=1, context=100, batch=3) as llm:
        assert (llm.plan.num_threads, llm.plan.context_tokens, llm.plan.max_batch) == (1, 100, 3)
        ids = tiny.token_ids(30)
        np.testing.assert_allclose(llm.logits(ids), tiny.reference_logits(folder, ids), atol=1e-4)
        outputs = llm.generate([ids, ids[:5]], max_new_tokens=4)
        assert outputs[1].token_ids == llm.generate([ids[:5]], max_new_tokens=4)[0].token_ids
        import torch

        with torch.no_grad():
            module_logits = llm.module()(torch.tensor([ids]))[0].numpy()
        np.testing.assert_allclose(module_logits, llm.logits(ids), atol=1e-4)
    with pytest.raises(ConfigError, match="objective"):
        load(str(folder), machine=machine, objective="speed")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="context of 9999 tokens"):
        load(str(folder), machine=machine, context=9999)


def test_what_is_planned_for(folder: Path, machine: Machine, plan_file: str) -> None:
    def request(**options: object) -> tuple[int, int | None, int | None]:
        with load(str(folder), machine=machine, precision="fp32", **options) as llm:  # type: ignore[arg-type]
            objective = llm.plan.objective
            return llm.plan.context_tokens, objective.prompt_tokens, objective.answer_tokens

    assert request() == (256, 255, 1)  # 512 and 128, cut to the model's 256
    assert request(context=100) == (100, 80, 20)
    assert request(context=100, prompt_tokens=7) == (100, 7, 93)
    assert request(context=100, prompt_tokens=7, answer_tokens=9) == (100, 7, 9)
    with pytest.raises(ConfigError, match="typical request"):
        request(context=100, prompt_tokens=100)
    with pytest.raises(ConfigError, match="prompt tokens 7 contradicts the plan, which says 103"):
        load(str(folder), plan=plan_file, prompt_tokens=7)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate", "the quick", "--max-tokens", "9"], (2, 9)),
        (["generate", "the quick", "--max-tokens", "9", "--context", "10"], (2, 8)),
        (["bench", "--contexts", "16,40", "--batches", "1", "--tokens", "2"], (40, 2)),
        (
            ["bench", "--contexts", "16", "--batches", "1", "--tokens", "2", "--context", "60"],
            (48, 12),
        ),
    ],
)
def test_verbs_plan_for_what_they_run(
    arguments: list[str],
    expected: tuple[int, int],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: Machine,
) -> None:
    from dseek.cli import measuring

    monkeypatch.setattr(measuring, "load_or_measure", lambda **_: machine)
    made: list[planning.Plan] = []
    real = planning.make
    monkeypatch.setattr(planning, "make", lambda *args, **options: made.append(real(*args, **options)) or made[-1])
    verb, *rest = arguments
    assert main([verb, str(folder), *rest, "--precision", "fp32", "--json"]) == 0
    assert [(plan.objective.prompt_tokens, plan.objective.answer_tokens) for plan in made] == [expected]


def test_the_limit_of_a_mixture_is_that_of_most_of_its_weights(plan_file: str, machine: Machine) -> None:
    plan = planning.load(plan_file)
    plan = dataclasses.replace(plan, layer_formats=(LayerFormats.uniform("bf16"), LayerFormats.uniform("f32")))
    first = dataclasses.replace(plan.layer_formats[0], output="f32")
    wide = dataclasses.replace(plan, layer_formats=(first, *plan.layer_formats[1:]))
    rates = {
        curve.weight_format: max(
            2e-9 * other.num_outputs * other.num_inputs * rows / seconds
            for other in machine.linears
            if other.weight_format == curve.weight_format and other.kernels == "torch"
            for rows, seconds in zip(other.num_rows, other.seconds, strict=True)
        )
        for curve in machine.linears
    }
    found = limits(wide, machine)
    assert found is not None
    assert found.gflops == pytest.approx(rates["f32"])
    assert rates["f32"] != rates["bf16"]


def test_shares_of_limits() -> None:
    bounds = Limits(bandwidth_gbs=10.0, gflops=100.0, streamed_bytes=10**9, flops_per_token=2 * 10**9)
    assert bounds.decode_share(5.0) == pytest.approx(0.5)
    assert bounds.decode_share(20.0, batch=4) == pytest.approx(0.5)
    assert bounds.prefill_share(25.0, 100) == pytest.approx(0.5)
    assert bounds.prefill_share(5.0, 1) == pytest.approx(0.5)


def test_a_machine_that_is_not_kept_has_no_limits(plan_file: str, cache_dir: Path) -> None:
    plan = planning.load(plan_file)
    assert limits(plan, planned_machine(plan)) is not None
    (cache_dir / "machines" / "torchonly.json").unlink()
    assert planned_machine(plan) is None
    assert limits(plan, None) is None


@pytest.mark.native
@pytest.mark.parametrize("verb", ["generate", "chat", "bench", "eval"])
def test_every_verb_runs_the_attention_asked_for(
    verb: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dseek.cli import measuring

    monkeypatch.setattr(measuring, "load_or_measure", lambda **_: made_up_machine())
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/exit\n"))
    made: list[planning.Plan] = []
    real = planning.make
    monkeypatch.setattr(planning, "make", lambda *args, **options: made.append(real(*args, **options)) or made[-1])
    text = tmp_path / "text.txt"
    text.write_text("a small model answers a small question, and then it stops. " * 9)
    rest = {
        "generate": ["the quick", "--max-tokens", "3"],
        "chat": ["--max-tokens", "3"],
        "bench": ["--contexts", "150", "--batches", "1", "--tokens", "2", "--repeats", "1"],
        "eval": ["--text", str(text)],
    }
    options = ["--attention", "dynamic", "--attention-window", "64", "--attention-top-blocks", "1", "--attention-far"]
    assert main([verb, str(folder), *rest[verb], "--precision", "fp32", *options]) == 0
    expected = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=1, far=True)
    assert [set(plan.attention_patterns) for plan in made] == [{expected}]
    captured = capsys.readouterr()
    if verb != "chat":
        assert "window 64 and 1 block, means of the rest" in captured.out + captured.err
