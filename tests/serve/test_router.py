"""The router: where prompts go, what passes through, and what happens when a replica dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from dseek.serve.affinity import BLOCK_CHARS, SLACK, Affinity, beginning, block_hashes
from dseek.serve.auth import hash_key, new_key
from dseek.serve.config import ServeConfig
from dseek.serve.doorman import Doorman
from dseek.serve.fleet import Passed, ReplicaLostError
from dseek.serve.local_fleet import LocalFleet
from dseek.serve.metrics import Metrics
from dseek.serve.router import MAX_LOST, Router
from tests.serve.process import running, save_model
from tests.serve.serving import Served, events, served

LONG = "a conversation that goes on for long enough to be remembered; " * 12


def test_beginnings_are_read_from_every_kind_of_request() -> None:
    assert beginning(b'{"prompt": "abc"}') == "abc"
    assert beginning(b'{"prompt": [1, 2]}') == "1,2,"
    chat = beginning(b'{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": [1]}]}')
    assert chat == "user\0x\0user\0[1]\0"
    for bad in (b"", b"[]", b"\xff", b'{"prompt": {}}', b"[" * 100_000, b'{"messages": [[]]}'):
        assert isinstance(beginning(bad), str)


def test_hashes_of_blocks_are_chained() -> None:
    one, other = "a" * 3 * BLOCK_CHARS, "a" * BLOCK_CHARS + "b" * 2 * BLOCK_CHARS
    assert block_hashes(one)[0] == block_hashes(other)[0]
    assert block_hashes(one)[2] != block_hashes(other)[2]
    assert block_hashes("short") == []


def test_a_prompt_goes_where_its_beginning_is_unless_that_is_busy() -> None:
    affinity = Affinity(seed=0)
    hashes = block_hashes(LONG)
    first = affinity.choose(hashes, {0: 0, 1: 0, 2: 0})
    assert all(affinity.choose(hashes, {0: 1, 1: 1, 2: 1}) == first for _ in range(10))
    assert affinity.choose(hashes[:1], {number: SLACK if number == first else 0 for number in range(3)}) == first
    other = affinity.choose(hashes, {number: SLACK + 1 if number == first else 0 for number in range(3)})
    assert other != first
    affinity.forget(other)
    assert affinity.num_hits == 11


def test_new_prompts_go_to_the_less_busy_of_two() -> None:
    affinity = Affinity(seed=1)
    loads = dict.fromkeys(range(8), 0)
    for _ in range(8000):
        loads[affinity.choose([], loads)] += 1
    assert max(loads.values()) - min(loads.values()) <= 8


@contextmanager
def routed(count: int = 2, **settings: Any) -> Iterator[tuple[Served, list[Served], Any]]:
    """A router over replicas that live in this process."""
    with ExitStack() as stack:
        behind = [stack.enter_context(served()) for _ in range(count)]

        class Here:
            """Stands for a replica."""

            def __init__(self, number: int) -> None:
                self.number, self.num_busy, self.is_ready, self.num_starts = number, 0, True, 1

            @property
            def client(self) -> httpx.AsyncClient:
                transport = httpx.ASGITransport(behind[self.number].app, raise_app_exceptions=False)
                return httpx.AsyncClient(transport=transport, base_url="http://localhost")

        replicas = SimpleNamespace(all=[Here(number) for number in range(count)])
        replicas.ready = lambda: [replica for replica in replicas.all if replica.is_ready]
        router = Router(LocalFleet(replicas, Affinity(seed=0)), lambda: False)  # type: ignore[arg-type]
        config = ServeConfig(model_names=("fake",), **settings)
        front = Served(behind[0].service, Doorman(router, config, Metrics("fake")))
        yield front, behind, replicas


def test_answers_pass_through_unchanged() -> None:
    with routed() as (front, behind, _):
        for fields in ({"temperature": 0}, {"temperature": 0, "stream": True}, {"temperature": "hot"}):
            there, here = front.complete("abc", **fields), behind[0].complete("abc", **fields)
            assert there.status_code == here.status_code
            assert there.headers["content-type"] == here.headers["content-type"]
            if here.status_code == 200 and "stream" not in fields:
                assert there.json()["choices"] == here.json()["choices"]
        response = front.get("/v1/models?x=1", headers={"x-request-id": "me"})
        assert response.headers.get_list("x-request-id") == ["me"]
        assert response.headers.get_list("x-frame-options") == ["DENY"]
        assert front.get("/page/app.js").status_code == 200


def test_keys_are_the_routers_and_are_not_passed_on() -> None:
    key = new_key()
    with routed(api_key_hashes=(hash_key(key),)) as (front, behind, _):
        assert front.complete("abc").status_code == 401
        found = front.post("/v1/completions", {"prompt": "abc"}, headers={"authorization": f"Bearer {key}"})
        assert found.status_code == 200
        assert behind[0].complete("abc").status_code == 200


def test_conversations_stay_with_their_replica() -> None:
    with routed(3) as (front, behind, _):
        for turn in range(6):
            assert front.complete(LONG + "x" * turn, max_tokens=1).status_code == 200
        counts = [server.service.engine.stats().generated_tokens for server in behind]
        assert sorted(counts) == [0, 0, 6]
        assert front.get("/v1/dseek/status").json()["prefix_hits"] == 5


def test_a_replica_that_cannot_be_reached_costs_a_second_try() -> None:
    with routed() as (front, _, replicas):

        class Dead:
            number, num_busy, is_ready, num_starts = 0, 0, True, 1

            @property
            def client(self) -> httpx.AsyncClient:
                return httpx.AsyncClient(
                    transport=httpx.AsyncHTTPTransport(uds="/nowhere"), base_url="http://localhost"
                )

        replicas.all[0] = dead = Dead()
        for _ in range(6):
            assert front.complete("abc", max_tokens=1).status_code == 200
        assert not dead.is_ready
        replicas.all[1].is_ready = False
        response = front.complete("abc")
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
        assert front.get("/ready").status_code == 503 and front.get("/health").status_code == 200


def test_metrics_of_all_replicas_are_told_apart() -> None:
    with routed() as (front, _, _):
        text = front.get("/metrics").text
        for number in (0, 1):
            assert f'dseek_num_requests_running{{model_name="fake",replica="{number}"}}' in text
            assert f'dseek_router_replica_ready{{replica="{number}"}} 1.0' in text
        assert text.count("# TYPE dseek_num_requests_running ") == 1


class Broken:
    """A fleet whose replicas are lost as a script says: each exchange takes the next line."""

    def __init__(self, *script: list[Any]) -> None:
        self.script = list(script)
        self.avoided: list[set[str]] = []

    @asynccontextmanager
    async def exchange(self, request: Passed, avoid: set[str]) -> AsyncIterator[Any]:
        self.avoided.append(set(avoid))
        number = str(len(self.avoided) - 1)
        kind, *pieces = self.script.pop(0)
        if kind in ("unreached", "lost"):
            raise ReplicaLostError(number, in_work=kind == "lost")

        async def body() -> AsyncIterator[bytes]:
            for piece in pieces:
                if piece is None:
                    raise ReplicaLostError(number, in_work=True)
                yield piece

        yield SimpleNamespace(status=200, headers=[(b"content-type", kind.encode())], pieces=body)

    def served(self) -> Served:
        router = Router(self, lambda: False)  # type: ignore[arg-type]
        return Served(None, Doorman(router, ServeConfig(model_names=("fake",)), Metrics("fake")))  # type: ignore[arg-type]


JSON, STREAM = "application/json", "text/event-stream; charset=utf-8"


def test_a_request_that_was_lost_before_its_client_saw_anything_goes_to_another_replica() -> None:
    fleet = Broken(["unreached"], ["lost"], [JSON, b'{"a', None], [JSON, b'{"a', b'":1}'])
    response = fleet.served().complete("abc")
    assert (response.status_code, response.json()) == (200, {"a": 1})
    assert fleet.avoided == [set(), {"0"}, {"0", "1"}, {"0", "1", "2"}]
    fleet = Broken(["lost"], [STREAM, b"data: {}\n\n", b"data: [DONE]\n\n"])
    assert events(fleet.served().complete("abc", stream=True)) == [{}]


def test_a_stream_that_breaks_off_ends_with_an_error_and_is_not_begun_again() -> None:
    fleet = Broken([STREAM, b'data: {"n": 1}\n\n', None], [STREAM, b"data: [DONE]\n\n"])
    first, error = events(fleet.served().complete("abc", stream=True))
    assert first == {"n": 1} and error["error"]["code"] == "replica_failed"
    assert len(fleet.script) == 1


def test_a_request_that_replicas_die_of_is_given_up() -> None:
    fleet = Broken(*[["unreached"]] * 4, *[["lost"]] * 9)
    response = fleet.served().complete("abc")
    assert (response.status_code, response.json()["error"]["code"]) == (502, "replica_failed")
    assert len(fleet.script) == 9 - MAX_LOST


@pytest.mark.slow
@pytest.mark.native
def test_a_killed_worker_is_replaced_and_all_end_together(tmp_path: Path) -> None:
    model, plan = save_model(tmp_path)
    with running(model, plan, tmp_path / "log", ["--workers", "2", "--drain-s", "10"]) as server:

        def status() -> dict[str, Any]:
            response = httpx.get(f"{server.url}/v1/dseek/status")
            return response.json() if response.status_code == 200 else {"replicas": []}

        def wait_for(starts: list[int]) -> None:
            for _ in range(600):
                replicas = status()["replicas"]
                if [replica["starts"] for replica in replicas if replica["ready"]] == starts:
                    return
                time.sleep(0.1)
            raise AssertionError(server.log.read_text()[-3000:])

        wait_for([1, 1])
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        assert len(children) == 2
        os.kill(int(children[0]), signal.SIGKILL)
        for _ in range(20):
            found = httpx.post(f"{server.url}/v1/completions", json={"prompt": "the", "max_tokens": 2}, timeout=60)
            assert found.status_code == 200
        wait_for([2, 1])
        assert server.stop() == 0
        assert not [pid for pid in children[1:] if Path(f"/proc/{pid}/fd").exists()]
