"""`dseek serve` on the command line: keys, and errors that say what to do."""

from __future__ import annotations

import importlib.util
import io
import socket
from pathlib import Path

import pytest

from dseek.cli.main import build_parser, main
from dseek.cli.serve_workers import command
from dseek.core.errors import ConfigError
from dseek.serve.auth import KeyRing
from dseek.serve.config import ServeConfig
from dseek.serve.run import bind


def test_a_key_is_hashed_and_never_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    key = "a-key-of-my-own-that-is-long"
    monkeypatch.setattr("sys.stdin", io.StringIO(key + "\n"))
    assert main(["serve", "--hash-key"]) == 0
    told = capsys.readouterr()
    assert KeyRing([told.out.strip()]).admits(f"Bearer {key}")
    assert key not in told.out + told.err


def test_an_empty_line_makes_a_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["serve", "--hash-key"]) == 0
    told = capsys.readouterr()
    assert KeyRing([told.out.strip()]).admits(f"Bearer {told.err.split()[-1]}")


def test_without_the_extra_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    assert main(["serve", "smollm2"]) == 2
    assert "uvicorn" in (told := capsys.readouterr().err) and "pip install 'dseek[serve]'" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no MODEL"),
        (["smollm2", "--port", "70000"], "port 70000"),
        (["smollm2", "--api-key-file", "/nowhere"], "cannot be read"),
        (["smollm2", "--host", "256.0.0.1", "--port", "0"], "cannot listen"),
    ],
)
def test_errors_of_users_end_with_status_2(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "no-such-model", "--port", str(taken.getsockname()[1])]) == 2
    assert "--port" in capsys.readouterr().err


def test_a_socket_that_a_dead_server_left_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "server.sock")
    config = ServeConfig(model_names=("m",), uds=path)
    bind(config).close()
    with bind(config) as living:
        living.listen()
        with pytest.raises(ConfigError, match="cannot listen"):
            bind(config)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot listen"):
        bind(ServeConfig(model_names=("m",), uds=str(tmp_path / "file")))


def test_workers_are_started_with_what_was_said_of_the_model() -> None:
    arguments = [
        "m",
        "--workers",
        "2",
        "--port",
        "9",
        "--api-key-file",
        "k",
        "--precision",
        "int8",
        "--no-prefix-cache",
    ]
    args = build_parser("serve").parse_args([*arguments, "--served-model-name", "a", "--served-model-name", "b"])
    words = command(args)
    assert words[3:5] == ["serve", "m"]
    shown = " ".join(words)
    for given in ("--precision int8", "--no-prefix-cache", "--served-model-name a --served-model-name b", "--threads "):
        assert given in shown
    for ours in ("--workers", "--port", "--api-key-file"):
        assert ours not in shown
    assert build_parser("serve").parse_args(words[4:]).precision == "int8"
