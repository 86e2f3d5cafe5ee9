"""One real server: OpenAI's own client, slow and hostile connections, and an orderly end."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from dseek.cli.main import main
from dseek.engine.llm import load
from tests.serve.process import Server, running, save_model

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_model(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def server(model: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "log"
    with running(*model, log, ["--header-timeout-s", "0.5", "--drain-s", "20"]) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def connect(server: Server) -> socket.socket:
    address = urlsplit(server.url)
    made = socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=10)
    return made


def test_openais_client_gets_the_models_own_answer(client: openai.OpenAI, model: tuple[Path, Path]) -> None:
    assert [card.id for card in client.models.list()] == ["tiny"]
    messages = [{"role": "user", "content": "the quick brown fox"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=12)  # type: ignore[arg-type]
    with load(str(model[0]), plan=str(model[1])) as llm:
        expected = llm.chat(messages, max_new_tokens=12)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage is not None and answer.usage.completion_tokens == len(expected.token_ids)


def test_openais_client_streams(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="the quick", temperature=0, max_tokens=12)
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt="the quick",
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


def test_openais_client_understands_the_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="x", temperature=-3)


def test_answers_side_by_side_are_those_alone(server: Server) -> None:
    prompts = [f"the lazy dog {number}" for number in range(12)]

    def ask(prompt: str, found: dict[str, str]) -> None:
        body = {"prompt": prompt, "temperature": 0.9, "seed": 5, "max_tokens": 24}
        found[prompt] = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]

    alone: dict[str, str] = {}
    for prompt in prompts[::4]:
        ask(prompt, alone)
    together: dict[str, str] = {}
    threads = [threading.Thread(target=ask, args=(prompt, together)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {prompt: together[prompt] for prompt in alone} == alone


def test_a_trace_is_replayed_against_it(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, picture = tmp_path / "trace.csv", tmp_path / "replay.png"
    lines = [f"2023-11-16 18:17:{3 + number / 4:09.6f},{10 + number},{2 + number % 5}" for number in range(8)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines))
    arguments = ["--trace", str(trace), "--url", server.url, "--scale", "10", "--plot", str(picture), "--json"]
    assert main(["bench-serve", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["requests"], found["failed"]) == (8, 0)
    assert 0 < found["first_token_s"]["p50"] <= found["first_token_s"]["p99"] <= found["whole_s"]["p99"]
    assert found["seconds"] >= 0.175
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_slow_headers_are_cut_off(server: Server) -> None:
    with connect(server) as silent, connect(server) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        began = time.monotonic()
        assert silent.recv(100) == b""
        slow.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert slow.recv(100) == b""
        assert time.monotonic() - began < 8


def test_what_is_no_http_is_refused_and_the_server_lives(server: Server) -> None:
    for line in (
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET " + b"/" * 70_000 + b"\r\n\r\n",
    ):
        with connect(server) as strange:
            strange.sendall(line)
            try:
                answer = strange.recv(1000)
            except ConnectionResetError:
                answer = b""
            assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), line
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_it_is_ready_and_logs_json(server: Server) -> None:
    for _ in range(200):
        if httpx.get(f"{server.url}/ready").status_code == 200:
            break
        time.sleep(0.05)
    assert httpx.get(f"{server.url}/ready").status_code == 200
    httpx.get(f"{server.url}/v1/models", headers={"x-request-id": "find-me"})
    found: list[str] = []
    for _ in range(200):
        lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
        if found := [line["path"] for line in lines if line.get("request_id") == "find-me"]:
            break
        time.sleep(0.05)  # the line is written after the response was sent
    assert found == ["/v1/models"]


def test_sigterm_lets_answers_end(server: Server) -> None:
    body = {"prompt": "the quick", "max_tokens": 64, "ignore_eos": True, "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(30) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
