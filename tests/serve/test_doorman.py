"""What every request passes: keys, hosts, places, bodies, ids, time, and what happens when a client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from dseek.core.errors import ConfigError
from dseek.serve.auth import KeyRing, hash_key, new_key, read_key_file
from dseek.serve.config import ServeConfig
from dseek.serve.json_logs import JsonFormatter, clean_request_id
from tests.engine.fakes import FakeRunner
from tests.serve.serving import BASE_URL, Served, served


class GatedRunner(FakeRunner):
    """Computes a step only when it may."""

    def __init__(self) -> None:
        super().__init__(num_pages=256)
        self.gate = threading.Event()

    def forward(self, batch: Any) -> Any:
        assert self.gate.wait(20)
        return super().forward(batch)


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for another thread."""
    for _ in range(2000):
        if holds():
            return
        time.sleep(0.005)
    raise AssertionError("it did not happen")


def raw(
    server: Served, path: str, body: bytes, *, leaves: Callable[[], bool] | None = None, headers: Any = ()
) -> list[dict[str, Any]]:
    """Speak ASGI with the application; the client leaves once `leaves` says so."""

    async def run() -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        asked = 0

        async def receive() -> dict[str, Any]:
            nonlocal asked
            asked += 1
            if asked == 1:
                return {"type": "http.request", "body": body, "more_body": False}
            while leaves is None or not leaves():
                await asyncio.sleep(0.005)
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json"), *headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        await server.app(scope, receive, send)
        return sent

    return asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answers(stream: bool) -> None:
    runner = GatedRunner()
    with served(runner) as server:
        stats = server.service.engine.stats
        body = json.dumps({"prompt": "abc", "max_tokens": 900, "n": 2, "ignore_eos": True, "stream": stream}).encode()
        seen = threading.Event()

        def leaves() -> bool:
            if stats().running + stats().waiting:
                seen.set()
                runner.gate.set()
            return seen.is_set() and stats().steps > 3

        sent = raw(server, "/v1/completions", body, leaves=leaves)
        assert all(message["type"] != "http.response.start" or message["status"] == 200 for message in sent)
        wait_until(lambda: stats().running == 0 and stats().free_pages == 256)
        assert stats().steps < 900
        assert 'status="499"' in server.get("/metrics").text or stream


def test_more_requests_than_places_are_told_to_come_back() -> None:
    runner = GatedRunner()
    with served(runner, max_concurrent=2) as server:

        async def run() -> list[httpx.Response]:
            transport = httpx.ASGITransport(server.app)
            async with httpx.AsyncClient(transport=transport, base_url=BASE_URL) as client:
                body = {"prompt": "abc", "max_tokens": 2}
                tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(3)]
                (first,) = (await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))[0]
                assert (await client.get("/health")).status_code == 200
                runner.gate.set()
                return [first.result(), *[await task for task in tasks if task is not first]]

        refused, *answered = asyncio.run(run())
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert [response.status_code for response in answered] == [200, 200]
        assert server.app.num_busy == 0


def test_an_answer_that_takes_too_long_is_ended() -> None:
    runner = GatedRunner()
    with served(runner, request_timeout_s=0.2) as server:
        whole = server.complete(max_tokens=5)
        assert whole.status_code == 504 and whole.json()["error"]["code"] == "timeout"
        streamed = server.complete(max_tokens=5, stream=True)
        assert streamed.status_code == 504
        runner.gate.set()
        wait_until(lambda: server.service.engine.stats().running == 0)


def test_a_body_is_counted_while_it_arrives() -> None:
    with served(max_body_bytes=1000) as server:
        assert server.complete("a" * 900).status_code == 200
        declared = server.complete("a" * 1000)
        assert declared.status_code == 413

        async def pieces() -> Any:
            for _ in range(50):
                yield b" " * 100

        hidden = server.request("POST", "/v1/completions", content=pieces())
        assert hidden.status_code == 413 and hidden.json()["error"]["code"] == "body_too_large"
        lied = server.request("POST", "/v1/completions", content=b"{}", headers={"content-length": "9" * 30})
        assert lied.status_code == 413


def test_a_body_that_dawdles_is_refused() -> None:
    with served(body_timeout_s=0.05) as server:

        async def pieces() -> Any:
            yield b"{"
            await asyncio.sleep(1)
            yield b"}"

        assert server.request("POST", "/v1/completions", content=pieces()).status_code == 408


def test_only_known_keys_are_let_in() -> None:
    key = new_key()
    with served(api_key_hashes=(hash_key(new_key()), hash_key(key))) as server:
        assert server.chat().status_code == 401
        for header in (
            "Bearer " + new_key(),
            key,
            "Basic " + key,
            "Bearer ",
            "Bearer " + key[:-1],
            "Bearer \xff" + key,
        ):
            response = server.get("/v1/models", headers={"authorization": header.encode("latin-1")})
            assert response.status_code == 401, header
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert server.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert server.get("/metrics").status_code == 401
        for path in ("/health", "/", "/page/app.js"):
            assert server.get(path).status_code == 200
        assert key not in str(server.service.config)


def test_key_files_hold_hashes_only(tmp_path: Any) -> None:
    path = tmp_path / "keys"
    key = new_key()
    path.write_text(f"# team\n\n{hash_key(key)} alice\n")
    assert KeyRing(read_key_file(path)).admits(f"Bearer {key}")
    path.write_text(key)
    with pytest.raises(ConfigError, match="hash-key"):
        read_key_file(path)
    path.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="no hash"):
        read_key_file(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key_file(tmp_path / "absent")
    for bad in ("short", "x" * 600, "twenty characters and spaces", "ключ-ключ-ключ-ключ-ключ"):
        with pytest.raises(ConfigError):
            hash_key(bad)


def test_a_name_that_is_not_loopback_is_refused_on_loopback() -> None:
    with served() as server:
        for host, status in (("evil.example", 403), ("localhost:8000", 200), ("[::1]:8000", 200), ("127.0.0.1", 200)):
            assert server.get("/health", headers={"host": host}).status_code == status
    with served(host="0.0.0.0") as server:
        assert server.get("/health", headers={"host": "my.example"}).status_code == 200
    with served(host="0.0.0.0", allowed_hosts=("my.example",)) as server:
        assert server.get("/health", headers={"host": "other.example"}).status_code == 403


def test_ids_of_requests_come_back_clean() -> None:
    with served() as server:
        assert server.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
        for bad in ("a b", "x" * 200, 'x"}{', "\xe9"):
            given = server.get("/health", headers={"x-request-id": bad.encode("latin-1")}).headers["x-request-id"]
            assert given != bad and clean_request_id(given) == given


def test_every_response_forbids_what_the_page_does_not_need() -> None:
    with served() as server:
        for path in ("/", "/page/app.js", "/nothing", "/v1/models"):
            headers = server.get(path).headers
            assert "default-src 'none'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "access-control-allow-origin" not in server.get("/", headers={"origin": "http://evil.example"}).headers


def test_a_server_that_drains_takes_nothing_new() -> None:
    with served() as server:
        asyncio.run(server.service.warm_up())
        assert server.get("/ready").status_code == 200
        server.service.is_draining = True
        assert server.get("/ready").status_code == 503
        assert server.get("/health").status_code == 200
        response = server.chat()
        assert response.status_code == 503 and response.headers["connection"] == "close"


def test_not_ready_before_it_is_warm() -> None:
    with served() as server:
        assert server.get("/ready").status_code == 503


def test_a_failing_model_is_a_server_error_and_tells_nothing() -> None:
    class Broken(FakeRunner):
        def forward(self, batch: Any) -> Any:
            raise RuntimeError("secret path /etc/x")

    with served(Broken(num_pages=64)) as server:
        response = server.complete()
        assert response.status_code == 500
        assert server.get("/health").status_code == 503
        assert not server.service.is_ready


def test_logs_are_json_and_never_hold_prompts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dseek.serve"), served() as server:
        server.chat("a very private prompt")
    lines = [JsonFormatter().format(record) for record in caplog.records]
    found = [json.loads(line) for line in lines]
    (entry,) = [line for line in found if line["message"] == "request"]
    assert entry["path"] == "/v1/chat/completions" and entry["status"] == 200 and entry["seconds"] >= 0
    assert "private" not in "".join(lines)


@pytest.mark.parametrize(
    "fields", [{"port": 70000}, {"max_concurrent": 0}, {"drain_s": -1}, {"request_timeout_s": 0}, {"model_names": ()}]
)
def test_settings_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServeConfig(**{"model_names": ("m",), **fields})
