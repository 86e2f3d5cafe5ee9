"""The frame around the verbs: help, unknown verbs, errors, exit statuses, broken pipes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dseek.cli import main as main_module
from dseek.cli.main import VERBS, build_parser, main
from dseek.core.errors import MemoryLimitError, RequestError


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A verb of our own, whose `run` the test sets."""
    module: Any = SimpleNamespace(HELP="do nothing", add_arguments=lambda parser: None, run=lambda args: 0)
    monkeypatch.setitem(VERBS, "nothing", ("nowhere", "do nothing"))
    load_verb = main_module.load_verb

    def load(name: str) -> ModuleType:
        return module if name == "nothing" else load_verb(name)

    monkeypatch.setattr(main_module, "load_verb", load)
    return module


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)


def test_no_verb_is_an_error_that_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: dseek" in capsys.readouterr().out


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["genrate", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "dseek: error: no verb 'genrate' (did you mean 'generate'?); see `dseek --help`\n"
    assert main(["qqq"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import dseek

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dseek {dseek.__version__}\n"


@pytest.mark.parametrize("error", [RequestError("it was so", needed="not so"), MemoryLimitError("too much")])
def test_a_users_error_is_one_line_and_status_2(
    error: ValueError, verb: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: Any) -> int:
        raise error

    verb.run = run
    assert main(["nothing"]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"dseek: error: {error}\n"
    assert captured.out == ""


def test_an_interrupt_is_status_130(verb: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: Any) -> int:
        raise KeyboardInterrupt

    verb.run = run
    assert main(["nothing"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_our_own_mistakes_are_not_hidden(verb: SimpleNamespace) -> None:
    def run(args: Any) -> int:
        raise ValueError("a bug")

    verb.run = run
    with pytest.raises(ValueError, match="a bug"):
        main(["nothing"])


def test_the_verbs_status_is_the_programs(verb: SimpleNamespace) -> None:
    verb.run = lambda args: 7
    assert main(["nothing"]) == 7


@pytest.mark.parametrize("module", [module for module, _ in VERBS.values()])
def test_every_verb_exists(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "m"], "PROMPT"),
        (["generate", "m", "p", "--threads", "0"], "'0' is not a whole number of at least 1"),
        (["generate", "m", "p", "--threads", "two"], "'two' is not"),
        (["generate", "m", "p", "--precision", "int3"], "int3"),
        (["bench", "m", "--contexts", "128,,3"], "'' is not a whole number"),
        (["eval", "m"], "--text"),
    ],
)
def test_wrong_options_are_status_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(arguments)
    assert status.value.code == 2
    assert message in capsys.readouterr().err


def test_lists_of_numbers() -> None:
    args = build_parser("bench").parse_args(["m", "--contexts", "1, 22", "--batches", "3"])
    assert (args.contexts, args.batches) == ((1, 22), (3,))


def test_a_reader_that_leaves_is_no_traceback() -> None:
    """As in `dseek --help | head -0`, with output enough to fill the pipe."""
    code = (
        "import sys; from dseek.cli import main as m; m.usage = lambda: 'x' * 10_000_000; sys.exit(m.main(['--help']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 141
