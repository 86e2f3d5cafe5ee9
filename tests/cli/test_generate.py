"""`dseek generate`: text on stdout, speeds on stderr, JSON, and a Ctrl-C by a real signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

COMMAND = [sys.executable, "-m", "tests.cli.fake_dseek"]


def run(*arguments: str, script: str | None = "Grüße!", **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({} if script is None else {"FAKE_SCRIPT": script})
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False, env=environment, **options
    )


def test_the_answer_and_nothing_else_is_on_stdout() -> None:
    done = run("generate", "m", "hello")
    assert (done.returncode, done.stdout) == (0, "Grüße!\n")
    assert "tokens/s" in done.stderr
    assert "fp32 on torch kernels" in done.stderr
    quiet = run("generate", "m", "hello", "--quiet")
    assert (quiet.stdout, quiet.stderr) == ("Grüße!\n", "")


def test_a_prompt_from_stdin() -> None:
    given = run("generate", "m", "hello", "--json")
    piped = run("generate", "m", "-", "--json", input="hello")
    assert json.loads(given.stdout)["num_prompt_tokens"] == json.loads(piped.stdout)["num_prompt_tokens"] == 6


def test_json_is_one_object() -> None:
    done = run("generate", "m", "hello", "--json", "--max-tokens", "4", "--stop", "ß")
    found = json.loads(done.stdout)
    assert found["text"] == "Grü"
    assert found["finish_reason"] == "length"
    assert found["num_tokens"] == 4
    assert found["model"] == "m"
    assert found["decode_tokens_s"] > 0


def test_sampling_options_reach_the_model() -> None:
    def text(*options: str) -> str:
        return str(json.loads(run("generate", "m", "a", "--json", *options, script=None).stdout)["token_ids"])

    assert text("--temperature", "1", "--seed", "3") == text("--temperature", "1", "--seed", "3")
    assert text("--temperature", "1", "--seed", "3") != text("--temperature", "1", "--seed", "4")
    assert text("--temperature", "1", "--top-k", "1") == text()


def test_chat_wraps_the_prompt_in_the_template() -> None:
    plain = json.loads(run("generate", "m", "hi", "--chat", "--json").stdout)
    assert plain["num_prompt_tokens"] == len("<user>hi<assistant>")
    system = json.loads(run("generate", "m", "hi", "--system", "be", "--json").stdout)
    assert system["num_prompt_tokens"] == len("<system>be<user>hi<assistant>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "2"], "top_p is 2.0"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--seed", "-3"], "seed is -3"),
        (["--stop", ""], "stop is"),
    ],
)
def test_bad_sampling_values_are_status_2(arguments: list[str], message: str) -> None:
    done = run("generate", "m", "x", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"dseek: error: {message}")


def test_a_prompt_beyond_the_context_is_status_2() -> None:
    done = run("generate", "m", "x" * 5000)
    assert done.returncode == 2
    assert "the prompt has 5001 tokens; needed: fewer than the 4096" in done.stderr


def test_bytes_that_are_no_text_are_status_2() -> None:
    environment = os.environ | {"PYTHONUTF8": "1"}
    done = subprocess.run(
        [*COMMAND, "generate", "m", "-"], input=b"\xff\xfe", capture_output=True, check=False, env=environment
    )
    assert done.returncode == 2
    assert b"UTF-8" in done.stderr


def test_ctrl_c_ends_the_program_with_130() -> None:
    environment = os.environ | {"FAKE_SCRIPT": "x" * 200, "FAKE_STEP_S": "0.05"}
    with subprocess.Popen(
        [*COMMAND, "generate", "m", "hello"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5) == b"xxxxx"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        errors = process.stderr.read()
        assert b"interrupted" in errors
        assert b"Traceback" not in errors
