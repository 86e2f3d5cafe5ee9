"""Replicas on Ray, as far as no cluster is needed: shares, the choice of a replica, one replica, and arguments."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from dseek.cli.main import main
from dseek.cli.serve_ray import arguments_from, ingress_config
from dseek.cli.serve_workers import replica_words
from dseek.core.errors import ConfigError
from dseek.serve.affinity import SLACK, block_hashes
from dseek.serve.config import ServeConfig
from dseek.serve.doorman import Doorman
from dseek.serve.fleet import Passed
from dseek.serve.metrics import Metrics
from dseek.serve.on_ray import environment, replica
from dseek.serve.on_ray.fleet import RayFleet
from dseek.serve.on_ray.request_router import AffinityRequestRouter
from dseek.serve.on_ray.shares import share
from dseek.serve.router import Router
from dseek.serve.service import Service
from tests.engine.fakes import FakeRunner, make_llm
from tests.serve.serving import Served, _shown_plan, events

HASHES = block_hashes("a conversation that goes on for long enough to be remembered; " * 12)


@pytest.mark.parametrize(
    ("nodes", "count", "expected"),
    [([8.0], 2, 4.0), ([8, 8], 3, 4.0), ([16, 4], 3, 5.0), ([2, 0], 2, 1.0), ([2], 3, 0.5), ([1, 1], 5, 0.3333)],
)
def test_every_replica_finds_a_node(nodes: list[float], count: int, expected: float) -> None:
    found = share(nodes, count)
    assert found == expected
    assert sum(int(node / found) for node in nodes) >= count


def test_ray_is_imported_only_where_it_was_asked_for(repo: Path) -> None:
    folder = repo / "src/dseek"
    imported = re.compile(r"^(from|import) (ray\b|dseek\.serve\.on_ray)", re.MULTILINE)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if imported.search(path.read_text())}
    assert found and all(path.startswith("serve/on_ray/") for path in found)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    assert main(["serve", "smollm2", "--ray"]) == 2
    told = capsys.readouterr().err
    assert "needs ray" in told and "pip install 'dseek[ray]'" in told


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--ray-address", "auto"], "without --ray"),
        (["--ray", "--ray-address", "ray://there:1"], "not a Ray client"),
        (["--ray", "--ray-address", "127.0.0.1:1"], "cannot be reached"),
        (["--ray", "--ray-address", "127.0.0.1:many"], "cannot be reached"),
    ],
)
def test_an_address_that_is_no_use_is_told(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "smollm2", "--port", "0", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_a_cluster_of_our_own_is_kept_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, str] = {}
    monkeypatch.setattr(environment.os, "environ", found)
    environment.prepare(own_cluster=False)
    assert found["RAY_USAGE_STATS_ENABLED"] == "0" and "RAY_AUTH_MODE" not in found
    environment.prepare(own_cluster=True)
    assert found["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0" and found["RAY_AUTH_MODE"] == "token"
    assert len(found["RAY_AUTH_TOKEN"]) == 64
    found["RAY_AUTH_MODE"] = "disabled"
    environment.prepare(own_cluster=True)
    assert found["RAY_AUTH_MODE"] == "disabled"


def pending(number: int, hashes: list[bytes]) -> Any:
    return SimpleNamespace(kwargs={"hashes": hashes}, metadata=SimpleNamespace(internal_request_id=str(number)))


def test_the_request_router_goes_by_beginnings_and_load() -> None:
    router: Any = AffinityRequestRouter.__new__(AffinityRequestRouter)
    router.initialize_state()
    queues: dict[str, int] = {}
    router._replica_queue_len_cache = SimpleNamespace(get=lambda replica_id: queues.get(replica_id.unique_id))
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in ("a", "b", "c")]

    def send(number: int, hashes: list[bytes]) -> Any:
        request = pending(number, hashes)
        ranks = asyncio.run(router.choose_replicas(replicas, request))
        assert ranks[1] == replicas
        router.on_request_routed(request, ranks[0][0].replica_id, None)
        return ranks[0][0].replica_id

    hits = AffinityRequestRouter.num_hits
    first = send(0, HASHES)
    for number in range(1, SLACK + 1):
        assert send(number, HASHES) == first  # it is busier than the others, and knows the prompt
    assert AffinityRequestRouter.num_hits == hits + SLACK
    other = send(9, HASHES)
    assert other != first
    router.on_request_completed(other, "9")
    queues[other.unique_id] = 2 * SLACK + 2  # what other processes sent there: more than `first` has by over the slack
    replicas = [replica for replica in replicas if replica.replica_id in (first, other)]
    assert send(10, HASHES) == first
    assert asyncio.run(router.choose_replicas([], pending(11, HASHES))) == []


class SlowRunner(FakeRunner):
    """Takes its time, so that an answer can be left before it ends."""

    def forward(self, batch: Any) -> Any:
        time.sleep(0.002)
        return super().forward(batch)


def make_replica(monkeypatch: pytest.MonkeyPatch, runner: type[FakeRunner] = FakeRunner) -> replica.ModelReplica:
    def make_service() -> Service:
        llm = make_llm(runner(num_pages=256))
        llm.plan.__dict__.update(_shown_plan(llm), num_threads=1)
        return Service(llm, ServeConfig(model_names=("fake",)))

    context = SimpleNamespace(rank=SimpleNamespace(rank=1), replica_tag="tag")
    monkeypatch.setattr(replica.serve, "get_replica_context", lambda: context)
    node = SimpleNamespace(get_node_id=lambda: "0123456789")
    monkeypatch.setattr(replica.ray, "get_runtime_context", lambda: node)
    return replica.ModelReplica(make_service)


class Handle:
    """Stands for a deployment's handle with one replica in this process, which dies where a script says so."""

    def __init__(self, behind: replica.ModelReplica, *deaths: int | None) -> None:
        self.behind = behind
        self.deaths = list(deaths)
        self.cancelled = 0
        self.answer = self

    def options(self, *, stream: bool) -> Handle:
        assert stream
        return self

    def remote(self, request: Passed, hashes: list[bytes]) -> Any:
        death = self.deaths.pop(0) if self.deaths else None

        async def answers() -> AsyncIterator[Any]:
            number = 0
            async for item in self.behind.answer(request, hashes):
                if number == death:
                    raise ActorDiedError
                yield item
                number += 1

        generator: Any = answers()

        class Response:
            def __aiter__(self) -> Any:
                return generator

            def __anext__(self) -> Any:
                return generator.__anext__()

            def cancel(inner) -> None:  # noqa: N805
                self.cancelled += 1
                inner.closing = asyncio.ensure_future(generator.aclose())

        return Response()

    def broadcast(self, method: str, *arguments: Any) -> Any:
        async def results(*, timeout_s: float, return_exceptions: bool) -> list[Any]:
            assert timeout_s > 0 and return_exceptions
            return [ActorDiedError(), await getattr(self.behind, method)(*arguments)]

        return SimpleNamespace(results_async=results)


def front(handle: Handle) -> Served:
    """A server over a fleet that has looked at its replicas once."""
    fleet = RayFleet(handle, count=2, timeout_s=30)
    fleet._told = {1: asyncio.run(handle.behind.describe())}
    router = Router(fleet, lambda: False)
    served = Served(handle.behind._service, Doorman(router, ServeConfig(model_names=("fake",)), Metrics("fake")))
    return served


def test_a_replica_answers_as_a_server_does(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = make_replica(monkeypatch)
    handle = Handle(behind)
    server = front(handle)
    alone = Served(behind._service, behind._app)
    whole = server.complete("abc", temperature=0)
    assert (
        whole.status_code == 200 and whole.json()["choices"] == alone.complete("abc", temperature=0).json()["choices"]
    )
    chunks = events(server.complete("abc", temperature=0, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole.json()["choices"][0]["text"]
    assert server.complete("abc", temperature="hot").status_code == 400
    assert server.get("/v1/models?x=%20").json()["data"][0]["id"] == "fake"
    assert server.get("/page/app.js").status_code == 200 and server.get("/page/none").status_code == 404
    assert server.get("/ready").json() == {"status": "ready", "replicas": 1}
    status = server.get("/v1/dseek/status").json()
    assert [one["ready"] for one in status["replicas"]] == [False, True] and status["replicas"][1]["id"] == "tag"
    assert 'dseek_num_requests_running{model_name="fake",replica="1"}' in server.get("/metrics").text
    assert behind._service.engine.stats().running == 0


def test_a_replica_that_dies_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = make_replica(monkeypatch)
    handle = Handle(behind, 0, 1, None, 2)
    server = front(handle)
    assert server.complete("abc").status_code == 200  # lost before the head, then with a head alone
    *_, error = events(server.complete("abc", stream=True, max_tokens=40))
    assert error["error"]["code"] == "replica_failed"
    assert handle.cancelled == 4
    asyncio.run(behind.check_health())
    monkeypatch.setattr(behind._service.engine, "stats", lambda: SimpleNamespace(error="the engine stopped"))
    with pytest.raises(RuntimeError, match="the engine stopped"):
        asyncio.run(behind.check_health())


def test_nobody_waits_for_replicas_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    server = front(Handle(make_replica(monkeypatch)))
    fleet: Any = server.app._app._fleet
    fleet._told = {}
    assert server.complete("abc").status_code == 503 and server.get("/ready").status_code == 503
    assert server.get("/health").status_code == 200


def test_leaving_ends_an_answer_in_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = make_replica(monkeypatch, SlowRunner)
    body = b'{"prompt": "abc", "max_tokens": 900, "ignore_eos": true, "stream": true}'

    async def leave() -> None:
        headers = [(b"content-type", b"application/json")]
        request = Passed(method="POST", target=b"/v1/completions", headers=headers, body=body, hashes=[])
        pieces = behind.answer(request)
        number, status, _ = await anext(pieces)
        assert (number, status) == (1, 200)
        await anext(pieces)
        await pieces.aclose()  # type: ignore[attr-defined]
        for _ in range(200):
            if behind._service.engine.stats().running == 0:
                break
            await asyncio.sleep(0.01)

    asyncio.run(leave())
    stats = behind._service.engine.stats()
    assert stats.running == 0 and stats.generated_tokens < 900 and behind._app.num_busy == 0


def test_arguments_by_name_are_those_of_the_command() -> None:
    given = {"model": "smollm2", "workers": 2, "served-model-name": ["a", "b"], "prefix_cache": False, "no-page": True}
    args = arguments_from(given)
    assert (args.model, args.workers, args.served_model_name, args.prefix_cache) == ("smollm2", 2, ["a", "b"], False)
    words = replica_words(args, threads=3)
    assert words[0] == "smollm2" and "--no-prefix-cache" in words and words[words.index("--threads") + 1] == "3"
    config = ingress_config(given)
    assert config.model_names == ("a", "b") and not config.loopback and not config.page


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({}, "model is None"),
        ({"model": "m", "port": 8000}, "port is no argument here"),
        ({"model": "m", "wrokers": 2}, "wrokers is no argument"),
        ({"model": "m", "workers": "many"}, "many"),
    ],
)
def test_arguments_that_are_no_use_are_told(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        arguments_from(given)
