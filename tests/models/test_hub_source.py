"""Hub ids against a server on this machine that stands in for the hub; each test in a process of its own.

`huggingface_hub` reads `HF_ENDPOINT` and its cache's place when it is imported, so the client must start afresh.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.models import tiny
from tests.models.gguf_building import write_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the stand-in serves and what it was asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.withheld: set[str] = set()
        self.requests: list[str] = []
        self.address = ""

    def add_folder(self, repo: str, folder: Path) -> None:
        """Publish the files of a folder."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories[repo] = files

    def downloaded(self) -> set[str]:
        """Names of the files whose content was fetched."""
        return {
            request.split("/resolve/")[1].split("/", 1)[1]
            for request in self.requests
            if request.startswith("GET /") and "/resolve/" in request
        }


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A running stand-in."""
    served = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            return

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            served.requests.append(f"{self.command} {self.path}")
            path = self.path.split("?")[0]
            commit = {"X-Repo-Commit": COMMIT}
            for repo, files in served.repositories.items():
                prefix = f"/{repo}/resolve/"
                if path.startswith(prefix):
                    name = path.removeprefix(prefix).split("/", 1)[1]
                    if name in served.withheld:
                        return self.answer(404, b"{}", commit | {"X-Error-Code": "EntryNotFound"})
                    if name in files:
                        etag = hashlib.sha1(files[name]).hexdigest()
                        return self.answer(200, files[name], commit | {"ETag": f'"{etag}"'})
                if path.startswith(f"/api/models/{repo}"):
                    if "/tree/" in path:
                        entries = [
                            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                            for name, data in files.items()
                        ]
                        return self.answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
                    info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                    return self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


def pull(hub: Hub, home: Path, name: str, endpoint: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `dseek pull NAME` with the stand-in as the hub."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    environ |= {"HF_ENDPOINT": endpoint or hub.address, "HF_HOME": str(home), "DSEEK_CACHE_DIR": str(home / "dseek")}
    environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environ |= {"NO_PROXY": "*"}
    return subprocess.run(
        [sys.executable, "-m", "dseek.cli.main", "pull", name], env=environ, capture_output=True, text=True, timeout=120
    )


def test_a_repository_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "source", shards=2)
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "modeling.py").write_text("print('never run')")
    (folder / "consolidated.safetensors").write_bytes(b"the same again")
    hub.add_folder("org/tiny", folder)
    done = pull(hub, tmp_path / "home", "org/tiny")
    assert done.returncode == 0, done.stderr
    found = Path(done.stdout.strip())
    assert not list(found.glob("*.bin")) and not list(found.glob("*.py")) and not list(found.glob("consolidated*"))
    wanted = {path.name for path in folder.glob("*.json")} | {path.name for path in folder.glob("model-*.safetensors")}
    assert {path.name for path in found.iterdir()} == wanted

    from dseek.models.files import open_model

    with open_model(str(found)) as files:
        assert files.shape.family == "llama"

    # Already here: no request is made, and none is needed.
    hub.requests.clear()
    again = pull(hub, tmp_path / "home", "org/tiny")
    assert again.returncode == 0 and again.stdout == done.stdout and hub.requests == []
    assert pull(hub, tmp_path / "home", "org/tiny", endpoint="http://127.0.0.1:9").returncode == 0


def test_an_interrupted_download_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.add_folder("org/tiny", tiny.save("llama", tmp_path / "source", shards=2))
    shard = "model-00002-of-00002.safetensors"
    hub.withheld = {shard}
    failed = pull(hub, tmp_path / "home", "org/tiny")
    assert failed.returncode == 2 and "could not give org/tiny" in failed.stderr
    hub.withheld = set()
    hub.requests.clear()
    assert pull(hub, tmp_path / "home", "org/tiny").returncode == 0
    assert shard in hub.downloaded() and "model-00001-of-00002.safetensors" not in hub.downloaded()


def test_one_gguf_of_several_is_named(hub: Hub, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_model(source / "m.gguf", parts=2)
    write_model(source / "other.gguf")
    hub.add_folder("org/quantised", source)
    asked = pull(hub, tmp_path / "home", "org/quantised")
    assert asked.returncode == 2
    assert "2 GGUF files (m.gguf, other.gguf)" in asked.stderr
    assert "needed: one of m.gguf, other.gguf" in pull(hub, tmp_path / "home", "org/quantised/absent.gguf").stderr
    done = pull(hub, tmp_path / "home", "org/quantised/m-00001-of-00002.gguf")
    assert done.returncode == 0, done.stderr
    found = Path(done.stdout.strip())
    assert found.name == "m-00001-of-00002.gguf"
    parts = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    assert sorted(path.name for path in found.parent.iterdir()) == parts
    (found.parent / parts[1]).unlink()
    assert pull(hub, tmp_path / "home", "org/quantised/m-00001-of-00002.gguf").returncode == 0
    assert sorted(path.name for path in found.parent.iterdir()) == parts


def test_a_repository_of_one_gguf_needs_no_file_name(hub: Hub, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_model(source / "only.gguf")
    hub.add_folder("org/one", source)
    done = pull(hub, tmp_path / "home", "org/one")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).name == "only.gguf"


def test_what_cannot_be_had_is_said(hub: Hub, tmp_path: Path) -> None:
    unknown = pull(hub, tmp_path / "home", "org/unknown")
    assert unknown.returncode == 2 and "the hub has no model org/unknown" in unknown.stderr
    hub.repositories["org/pickled"] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    pickled = pull(hub, tmp_path / "home", "org/pickled")
    assert pickled.returncode == 2 and "pickled weights are never read" in pickled.stderr
    unreachable = pull(hub, tmp_path / "home", "org/unknown", endpoint="http://127.0.0.1:9")
    assert unreachable.returncode == 2 and "cannot be reached" in unreachable.stderr
