"""A real Ray cluster of two nodes: `dseek serve --ray`, a killed replica, the same application under Ray Serve."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dseek.engine.llm import load
from dseek.serve.on_ray import environment
from tests.serve.process import running, save_model

pytestmark = [pytest.mark.native, pytest.mark.cluster]

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_model(tmp_path_factory.mktemp("ray"))


@pytest.fixture(scope="module")
def expected(model: tuple[Path, Path]) -> str:
    with load(str(model[0]), plan=str(model[1])) as llm:
        return str(llm.generate([PROMPT], max_new_tokens=32)[0].text)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two nodes of one processor each; the address of their head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment.os, "environ", os.environ)
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            patch.delenv(name, raising=False)
        environment.prepare(own_cluster=True)
        from ray.cluster_utils import Cluster

        size = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        nodes = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
        nodes.add_node(**size)
        try:
            yield nodes.address
        finally:
            nodes.shutdown()


def wait_for(what: Callable[[], bool]) -> None:
    for _ in range(1200):
        if what():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def complete(url: str, **fields: Any) -> httpx.Response:
    body = {"prompt": PROMPT, "max_tokens": 32, "temperature": 0, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=120)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def test_two_nodes_serve_and_a_killed_replica_is_replaced(
    model: tuple[Path, Path], expected: str, cluster: str, tmp_path: Path
) -> None:
    options = ["--ray", "--ray-address", cluster, "--workers", "2", "--drain-s", "20"]
    with running(*model, tmp_path / "log", options) as server:

        def replicas() -> list[dict[str, Any]]:
            return list(httpx.get(f"{server.url}/v1/dseek/status", timeout=60).json()["replicas"])

        before = replicas()
        assert [one["ready"] for one in before] == [True, True]
        assert len({one["node"] for one in before}) == 2 and [one["threads"] for one in before] == [1, 1]
        assert text_of(complete(server.url)) == expected

        texts: list[str] = []
        ends: list[str] = []
        enough = threading.Event()

        def ask() -> None:
            while not enough.is_set():
                texts.append(text_of(complete(server.url)))

        def watch(number: int) -> None:
            body = {"prompt": f"dog {number}", "max_tokens": 900, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
                assert response.status_code == 200
                lines = [line[6:] for line in response.iter_lines() if line]
            assert lines[-1] == "[DONE]"
            last = json.loads(lines[-2])
            ends.append(last["error"]["code"] if "error" in last else last["choices"][0]["finish_reason"])

        threads = [threading.Thread(target=ask) for _ in range(3)]
        threads += [threading.Thread(target=watch, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        os.kill(before[0]["pid"], signal.SIGKILL)
        wait_for(lambda: [one["starts"] for one in replicas() if one["ready"]] == [2, 1])
        enough.set()
        for thread in threads:
            thread.join()
        assert len(ends) == 6 and set(ends) <= {"length", "replica_failed"} and "length" in ends
        assert texts and set(texts) == {expected}

        body = {"prompt": PROMPT, "max_tokens": 600, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(60) == 0
        for one in [*before[1:], *replicas_of(tmp_path / "log")]:
            wait_for(lambda pid=one["pid"]: not Path(f"/proc/{pid}/fd").exists())  # type: ignore[misc]


def replicas_of(log: Path) -> list[dict[str, int]]:
    """Processes of replicas that a server's log names."""
    lines = [json.loads(line)["message"] for line in log.read_text().splitlines() if line.startswith("{")]
    words = [line.split() for line in lines if line.startswith("replica ") and "(process " in line]
    return [{"pid": int(line[line.index("(process") + 1])} for line in words]


def test_ray_serve_runs_the_same_application(model: tuple[Path, Path], expected: str, cluster: str) -> None:
    import ray
    from ray import serve

    from dseek.cli.serve_ray import build_app

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    try:
        # Both nodes are this machine, which has the port once.
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        arguments = {"model": str(model[0]), "plan": str(model[1]), "workers": 2, "served-model-name": "tiny"}
        serve.run(build_app(arguments), name="tiny", route_prefix="/")
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: httpx.get(f"{url}/ready").status_code == 200)
        assert text_of(complete(url)) == expected
        body = {"prompt": PROMPT, "max_tokens": 32, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            chunks = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
        body = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            next(response.iter_lines())
        wait_for(lambda: httpx.get(f"{url}/v1/dseek/status").json()["running"] == 0)
        assert httpx.get(f"{url}/v1/dseek/status").json()["generated_tokens"] < 900
        assert complete(url, model="other").status_code == 404
    finally:
        serve.shutdown()
        ray.shutdown()


def test_a_replica_that_cannot_start_is_told_and_nothing_is_left(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    from dseek.cli.main import main

    (tmp_path / "plan.json").write_text("{}")
    try:
        arguments = ["--plan", str(tmp_path / "plan.json"), "--port", "0", "--ray", "--ray-address", cluster]
        assert main(["serve", str(tmp_path), *arguments]) == 2
        told = capsys.readouterr().err
        assert "the replicas did not start" in told and str(tmp_path) in told
        ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
        assert not ray.util.list_named_actors(all_namespaces=True)
    finally:
        ray.shutdown()
