"""`dseek chat` in a real terminal (a pty) with real key strokes, and scripted through a pipe."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

COMMAND = [sys.executable, "-m", "tests.cli.fake_dseek", "chat", "m"]
CTRL_C, CTRL_D = b"\x03", b"\x04"


class Terminal:
    """A `dseek chat` in a pty.

    Args:
        environment: variables beside those of this process.
        arguments: further arguments of the verb.
    """

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [*COMMAND, *arguments], os.environ | {"TERM": "dumb"} | environment)
        self.seen = ""

    def expect(self, pattern: str, timeout_s: float = 20) -> str:
        """Read until the pattern is seen; give and forget everything up to its end."""
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.seen)):
            left = deadline - time.monotonic()
            assert left > 0, f"{pattern!r} was not seen in {self.seen!r}"
            if select.select([self.fd], [], [], left)[0]:
                self.seen += os.read(self.fd, 4096).decode("utf-8", "replace")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def type(self, keys: str | bytes) -> None:
        """Press keys."""
        os.write(self.fd, keys.encode() if isinstance(keys, str) else keys)

    def status(self, timeout_s: float = 20) -> int:
        """Wait for the end; give the exit status."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if select.select([self.fd], [], [], 0.05)[0]:
                try:
                    self.seen += os.read(self.fd, 4096).decode("utf-8", "replace")
                except OSError:  # Linux's way of saying that the other end is closed
                    time.sleep(0.02)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"still running; seen {self.seen!r}")

    def close(self) -> None:
        """End the process if it has not ended."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture
def terminal(request: pytest.FixtureRequest) -> Iterator[Terminal]:
    environment = {"FAKE_SCRIPT": "Bonjour!"} | getattr(request, "param", {})
    opened = Terminal(environment, "--temperature", "0")
    yield opened
    opened.close()


SLOW = {"FAKE_SCRIPT": "x" * 500, "FAKE_STEP_S": "0.05", "FAKE_PAGES": "400"}


def test_an_answer_streams_and_exit_leaves(terminal: Terminal) -> None:
    terminal.expect("> ")
    terminal.type("hello\n")
    assert "Bonjour!" in terminal.expect(r"\[prompt 22 tokens.*\]")
    terminal.expect("> ")
    terminal.type("/exit\n")
    assert terminal.status() == 0


@pytest.mark.parametrize("terminal", [SLOW], indirect=True)
def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect("xxx")
    terminal.type(CTRL_C)
    terminal.expect(r"\[stopped")
    terminal.expect("> ")
    terminal.type("again\n")
    terminal.expect("xxx")
    terminal.type(CTRL_C)
    text = terminal.expect(r"\[stopped[^\]]*\]")
    # The first answer, as far as it came, is part of the history.
    tokens = int(re.search(r"prompt (\d+) tokens", text)[1])  # type: ignore[index]
    assert tokens >= len("<user>hello<assistant>xxx<user>again<assistant>")
    terminal.expect("> ")
    terminal.type("/exit\n")
    assert terminal.status() == 0


def test_ctrl_c_at_the_prompt_discards_the_line(terminal: Terminal) -> None:
    terminal.expect("> ")
    terminal.type("half a mess")
    terminal.expect("half a mess")
    # Python's readline can miss a signal between a key and its next wait; it is seen with the next key.
    time.sleep(0.3)
    terminal.type(CTRL_C)
    terminal.expect(r"Ctrl-D leaves")
    terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect("prompt 22 tokens")
    terminal.expect("> ")
    terminal.type(CTRL_D)
    assert terminal.status() == 0


def test_reset_forgets_and_help_helps(terminal: Terminal) -> None:
    terminal.expect("> ")
    for _ in range(2):
        terminal.type("hello\n")
        terminal.expect("prompt 22 tokens")
        terminal.expect("> ")
        terminal.type("/reset\n")
        terminal.expect("forgotten")
        terminal.expect("> ")
    terminal.type("/help\n")
    terminal.expect("/reset +forget")
    terminal.expect("> ")
    terminal.type("/what now\n")
    terminal.expect("no command /what")


def test_the_history_is_part_of_the_next_prompt(terminal: Terminal) -> None:
    terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect("prompt 22 tokens")
    terminal.expect("> ")
    terminal.type("and?\n")
    length = len("<user>hello<assistant>Bonjour!<user>and?<assistant>")
    terminal.expect(f"prompt {length} tokens")


def test_a_terminate_signal_ends_it(terminal: Terminal) -> None:
    terminal.expect("> ")
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.status() == -signal.SIGTERM


def scripted(text: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables: dict[str, Any] = os.environ | {"FAKE_SCRIPT": "ok"} | environment
    return subprocess.run(
        [*COMMAND, *arguments], input=text, capture_output=True, text=True, timeout=60, check=False, env=variables
    )


def test_lines_of_a_pipe_are_messages() -> None:
    done = scripted("one\n\ntwo\n")
    assert (done.returncode, done.stdout) == (0, "ok\nok\n")
    assert "> " not in done.stdout
    assert done.stderr.count("prompt") == 2
    assert scripted("one\n/exit\ntwo\n", "--quiet").stdout == "ok\n"


def test_a_full_context_forgets_the_oldest_turns() -> None:
    done = scripted("m" * 50 + "\n" + "m" * 50 + "\n" + "m" * 50 + "\n", "--max-tokens", "20", FAKE_PAGES="40")
    assert done.stdout == "ok\nok\nok\n"
    assert "the context is full: forgot the oldest 2 messages" in done.stderr


def test_a_message_beyond_the_context_is_refused_and_the_talk_goes_on() -> None:
    done = scripted("m" * 500 + "\nhi\n", FAKE_PAGES="40")
    assert (done.returncode, done.stdout) == (0, "ok\n")
    assert "dseek: the prompt has 517 tokens" in done.stderr


def test_a_system_message_comes_first() -> None:
    done = scripted("hi\n", "--system", "be brief")
    assert f"prompt {len('<system>be brief<user>hi<assistant>')} tokens" in done.stderr
