"""`dseek plan` and `dseek doctor` on a made-up machine and model."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dseek.cli.main import main
from dseek.core import config
from dseek.core.attention_pattern import DENSE
from dseek.hardware.machine import Machine
from dseek.models import gate_file
from dseek.plan import load
from tests.plan.machines import SMALL, machine


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up machine and a made-up model of any name."""
    from dseek.cli import measuring
    from dseek.models import files

    for name in ("DSEEK_PRECISION_MODE", "DSEEK_NUM_THREADS", "DSEEK_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    path = Path("some-model")
    encodings = {"Q8_0": SMALL.num_parameters()}
    model = SimpleNamespace(shape=SMALL, path=path, encodings=lambda: encodings, close=lambda: None)
    monkeypatch.setattr(files, "open_model", lambda name: model)
    monkeypatch.setattr(gate_file, "find_gates", lambda files: None)
    monkeypatch.setattr(measuring, "load_or_measure", lambda **_: machine(with_torch=True))


def test_plan_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "some-model", "--context", "1024"]) == 0
    text = capsys.readouterr().out
    for expected in ("Plan for some-model", "precision and cache", "threads", "prefill chunk", "chosen", "tokens/s"):
        assert expected in text


def test_predictions_say_what_they_are_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plan", "m", "--context", "1024"]) == 0
    text = capsys.readouterr().out
    for expected in ("prompt of 896 tokens, answer of 128, in a context of 1024", "for a prompt of 896", "after 896"):
        assert expected in text
    assert main(["plan", "m", "--prompt-tokens", "100", "--answer-tokens", "30", "--json"]) == 0
    objective = json.loads(capsys.readouterr().out)["objective"]
    assert (objective["prompt_tokens"], objective["answer_tokens"]) == (100, 30)
    assert main(["plan", "m", "--prompt", "100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["objective"]["prompt_tokens"] == 100


def test_a_mixed_plan_in_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plan", "m", "--max-quality-loss", "0.05", "--prompt-tokens", "32", "--answer-tokens", "400"]) == 0
    text = capsys.readouterr().out
    assert "mixed, stored as i" in text
    assert "of 30 layers, i" in text


def test_attention_in_the_table_and_in_the_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plan", "m", "--context", "8192", "--max-quality-loss", "0"]) == 0
    text = capsys.readouterr().out
    for expected in (
        "attention: dense",
        "window 512",
        "window 64 and shares from 0.02, up to 64 blocks",
        "0 % accepted",
    ):
        assert expected in text
    for options, expected in (
        (["--attention", "dense"], {"kind": "dense"}),
        (["--attention-window", "64"], {"kind": "window", "window_tokens": [64]}),
        (
            ["--attention", "dynamic", "--attention-top-blocks", "7", "--attention-far"],
            {"kind": "dynamic", "window_tokens": [256], "top_blocks": 7, "far": True},
        ),
        (
            ["--attention-min-share", "0.03", "--attention-top-blocks", "24"],
            {"kind": "dynamic", "window_tokens": [64], "top_blocks": 24, "min_share": 0.03},
        ),
    ):
        assert main(["plan", "m", "--json", *options]) == 0
        patterns = json.loads(capsys.readouterr().out)["attention_patterns"]
        assert patterns == [config.to_plain(DENSE) | expected] * SMALL.num_layers


class FakeGates:
    """What the planner asks a gate file."""

    dense_heads = ((0, 2), *((),) * 28, (1,))
    share_factors = ()
    windows = ((64, 128, 4096), *((256, 256, 256),) * 29)


def test_what_a_gate_knows_is_in_the_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(gate_file, "find_gates", lambda files: FakeGates)
    assert main(["plan", "m", "--attention", "dynamic", "--attention-min-share", "0.02"]) == 0
    told = "3 of 90 key-value heads stay dense (retrieval heads found by training)"
    words = " ".join(capsys.readouterr().out.split())
    assert words.count(told) == 2  # in the table and beside the choice
    assert main(["plan", "m", "--attention", "dynamic", "--attention-top-blocks", "9"]) == 0
    assert "stay dense" not in capsys.readouterr().out
    path = tmp_path / "p.json"
    options = ["--attention", "dynamic", "--attention-window", "auto"]
    assert main(["plan", "m", "--save", str(path), *options]) == 0
    mean = (64 + 128 + 4096 + 29 * 3 * 256) / 90
    assert f"windows 64 to 4096 ({mean:.0f} in the mean) and shares from" in capsys.readouterr().out
    patterns = load(path).attention_patterns
    assert tuple(pattern.window_tokens for pattern in patterns) == FakeGates.windows
    assert tuple(pattern.dense_heads for pattern in patterns) == FakeGates.dense_heads
    assert all(pattern.gate and pattern.min_share for pattern in patterns)
    assert main(["plan", "m", "--attention-window", "auto", "--json"]) == 0
    patterns = json.loads(capsys.readouterr().out)["attention_patterns"]
    assert [pattern["window_tokens"] for pattern in patterns] == [list(layer) for layer in FakeGates.windows]
    assert {(pattern["kind"], pattern["gate"]) for pattern in patterns} == {("window", False)}


def test_plan_warns_of_a_disturbed_measurement(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dseek.cli import measuring

    monkeypatch.setattr(measuring, "load_or_measure", lambda **_: dataclasses.replace(machine(), other_load=1.5))
    assert main(["plan", "m"]) == 0
    assert "others kept 1.5 processors busy" in capsys.readouterr().out


def test_plan_json_and_saved_file_agree(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    assert main(["plan", "m", "--json", "--save", str(path), "--precision", "int8", "--objective", "throughput"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["precision"] == "int8"
    assert load(path).to_json() == json.dumps(printed, indent=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "100000"], "at most 8192"),
        (["--memory-limit", "50MB"], "needed: at most 50 MB"),
        (["--max-quality-loss", "-1"], "quality loss"),
        (["--context", "512", "--prompt-tokens", "512"], "at most the context's 512"),
        (["--answer-tokens", "9000"], "--answer-tokens"),
        (["--attention", "dense", "--attention-window", "64"], "dense attention with a wish about the window"),
        (["--attention", "window", "--no-attention-far"], "window attention with a wish about selected blocks"),
        (["--attention-top-blocks", "5000"], "1 to 4096"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "m", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dseek: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize("size", ["x", "0", "-3GB", "nan", "infGB", "1e99"])
def test_bad_sizes(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "m", f"--memory-limit={size}"])
    assert caught.value.code == 2
    assert "8GB" in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for expected in ("This machine", "read bandwidth", "Linear layers", "Attention"):
        assert expected in text
    assert main(["doctor", "--json"]) == 0
    assert Machine.from_json(capsys.readouterr().out) == machine(with_torch=True)


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dseek.cli import measuring

    def measure(*, refresh: bool, progress: object) -> Machine:
        progress(0.5, "attention")  # type: ignore[operator]
        return machine()

    monkeypatch.setattr(measuring, "load_or_measure", measure)
    assert main(["doctor", "--json", "--refresh"]) == 0
    json.loads(capsys.readouterr().out)


def test_planning_imports_no_torch() -> None:
    code = "import sys, dseek.plan, dseek.cli.plan, dseek.cli.doctor; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
