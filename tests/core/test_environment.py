"""The environment registry, logging and what they say of bad values."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from dseek.core import environment, logs
from dseek.core.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fresh_logging() -> Iterator[None]:
    """Logging as in a new process: no handler of ours."""
    root = logging.getLogger("dseek")
    before = root.handlers[:], root.level
    root.handlers[:] = []
    yield
    root.handlers[:], root.level = before


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.get("DSEEK_LOG_LEVEL") == "warning"
    assert environment.get("DSEEK_PRECISION_MODE") == "auto"
    assert environment.get("DSEEK_NUM_THREADS") is None
    assert environment.get("DSEEK_KERNELS") == "auto"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert environment.get("DSEEK_CACHE_DIR") == Path("/somewhere/dseek")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert environment.get("DSEEK_CACHE_DIR") == Path.home() / ".cache/dseek"


def test_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSEEK_PRECISION_MODE", " INT8 ")
    monkeypatch.setenv("DSEEK_NUM_THREADS", "3")
    monkeypatch.setenv("DSEEK_CACHE_DIR", "~/x")
    monkeypatch.setenv("DSEEK_KERNELS", "")
    assert environment.get("DSEEK_PRECISION_MODE") == "int8"
    assert environment.get("DSEEK_NUM_THREADS") == 3
    assert environment.get("DSEEK_CACHE_DIR") == Path.home() / "x"
    assert environment.get("DSEEK_KERNELS") == "auto"


@pytest.mark.parametrize(
    ("name", "value", "good"),
    [
        ("DSEEK_LOG_LEVEL", "loud", "debug, info, warning, error"),
        ("DSEEK_PRECISION_MODE", "int7", "auto, fp32, bf16, fp16, int8, int4"),
        ("DSEEK_KERNELS", "sse", "auto, torch, generic, avx2, avx512, amx"),
        ("DSEEK_NUM_THREADS", "0", "1 to 1024"),
        ("DSEEK_NUM_THREADS", "two", "1 to 1024"),
    ],
)
def test_a_bad_value_lists_the_good_ones(monkeypatch: pytest.MonkeyPatch, name: str, value: str, good: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=good) as caught:
        environment.get(name)  # type: ignore[call-overload]
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


def test_unknown_variable_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fresh_logging: None
) -> None:
    monkeypatch.setenv("DSEEK_LOGLEVEL", "debug")
    monkeypatch.setenv("DSEEK_ZZZZZZZZZZZZZZZ", "1")
    assert ("DSEEK_LOGLEVEL", "DSEEK_LOG_LEVEL") in environment.unknown_variables()
    # The test runner's own handlers would get the records.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert ("DSEEK_ZZZZZZZZZZZZZZZ", None) in environment.unknown_variables()
    logs.get_logger("dseek.a")
    logs.get_logger("dseek.b")
    err = capsys.readouterr().err
    assert err.count("DSEEK_LOGLEVEL is unknown and has no effect (did you mean DSEEK_LOG_LEVEL?)") == 1


def test_level_and_stream(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fresh_logging: None
) -> None:
    monkeypatch.setenv("DSEEK_LOG_LEVEL", "info")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    log = logs.get_logger("elsewhere")
    log.debug("too fine")
    log.info("seen")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "dseek.elsewhere: INFO: seen\n"
