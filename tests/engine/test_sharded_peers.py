"""Ranks that come and go: an error in seconds and never a hang, and the command line under torchrun."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dseek.core.errors import ConfigError, DseekError, PeerError
from dseek.engine import sharding
from dseek.engine.llm import load
from dseek.parallel.meeting import agree_on_text, measure_link
from dseek.parallel.ranks import Ranks
from tests.engine.test_sharded_runner import BLOCKS, make_plan
from tests.models import tiny
from tests.parallel.distributed import run_ranks
from tests.plan.machines import machine

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny.save("llama-64-mha", tmp_path_factory.mktemp("peers"))
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 4096}))
    make_plan(path, BLOCKS, "bf16", "bf16").save(path / "plan.json")
    return path


def start(folder: Path, trouble: str, repo: Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.engine.sharded_peer", str(folder), str(folder / "plan.json"), trouble]
    return [
        subprocess.Popen(
            command,
            cwd=repo,
            env=environment | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def test_trouble_of_one_rank_is_an_error_of_the_other(folder: Path, repo: Path) -> None:
    silence = "PeerError: a peer died or does not answer: keys and values of layer 1 did not arrive"
    messages = {
        "dies": silence,
        "is silent": silence,
        "disagrees": "PeerError: rank 0 has another batch than ranks [1]",
    }
    runs = {trouble: start(folder, trouble, repo) for trouble in messages}
    try:
        for trouble, message in messages.items():
            out, errors = runs[trouble][0].communicate(timeout=200)
            assert message in out, f"{trouble}: {out}\n{errors}"
            assert runs[trouble][0].returncode == 1, trouble
    finally:
        for process in (process for ranks in runs.values() for process in ranks):
            process.kill()
            process.communicate()


def test_the_command_line_under_torchrun(folder: Path, repo: Path) -> None:
    words = "the quick brown fox jumps over the lazy dog and " * 40
    arguments = ["generate", str(folder), "-", "--plan", str(folder / "plan.json"), "--max-tokens", "4", "--json"]
    arguments += ["--temperature", "1"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "dseek.cli.main", *arguments, "--shard-strategy", "zigzag"],
        cwd=repo,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        input=words,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # one object: the other rank says nothing
    assert found["num_prompt_tokens"] > 300 and 1 <= found["num_tokens"] <= 4


def test_a_strategy_without_ranks_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"there are no ranks: torch.distributed is not initialised and RANK, WORLD_"):
        load(str(folder), plan=folder / "plan.json", shard_strategy="auto")
    with pytest.raises(ConfigError, match="the shard strategy is 'striped'; needed: one of contiguous, zigzag, auto"):
        load(str(folder), plan=folder / "plan.json", shard_strategy="striped")  # type: ignore[arg-type]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "many")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ConfigError, match="the ranks' environment variables are wrong"):
        load(str(folder), plan=folder / "plan.json", shard_strategy="auto")
    assert not dist.is_initialized()


def test_ranks_on_a_host_share_its_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    here = dataclasses.replace(machine(), num_cores=8)
    monkeypatch.delenv("DSEEK_NUM_THREADS", raising=False)
    for local, threads in (("2", 4), ("3", 2), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        share = sharding.share_of_host(here, None, None)
        assert share["threads"] == threads
        assert share["memory_limit_bytes"] == here.memory_limit_bytes // int(local)
        assert sharding.share_of_host(here, 5, 10**9) == {"machine": here, "threads": 5, "memory_limit_bytes": 10**9}
    monkeypatch.setenv("DSEEK_NUM_THREADS", "3")
    assert sharding.share_of_host(here, None, None)["threads"] is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "none")
    with pytest.raises(ConfigError, match="LOCAL_WORLD_SIZE is 'none'"):
        sharding.share_of_host(here, None, None)


def test_a_step_grows_with_the_ranks_up_to_the_context(folder: Path) -> None:
    plan = dataclasses.replace(make_plan(folder, BLOCKS, "bf16", "bf16"), prefill_chunk_tokens=512)
    chunks = [sharding.with_longer_steps(plan, num_ranks).prefill_chunk_tokens for num_ranks in (1, 2, 8)]
    assert chunks == [512, 1024, plan.context_tokens]


def _meet(rank: int, world_size: int, folder: str) -> dict[str, object]:
    """Everything that ranks settle before the first prompt."""
    ranks = Ranks()
    found: dict[str, object] = {
        "link": measure_link(ranks),
        "text": ranks.broadcast_text("Grüße" if rank == 1 else None, 1),
    }
    found["empty"] = ranks.broadcast_text("" if rank == 0 else None)
    tensor = torch.full((3,), float(rank))
    ranks.broadcast(tensor, 2)
    found["tensor"] = tensor.tolist()
    agree_on_text(ranks, "the same", "text")
    with pytest.raises(PeerError) as caught:
        agree_on_text(ranks, "other" if rank == 2 else "same", "text")
    found["error"] = str(caught.value)
    # Rank 0 plans for all, though the others have measured another machine.
    random.seed(rank)
    here = dataclasses.replace(machine(), num_cores=2 + rank)
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    with load(folder, machine=here, context=2048, precision="bf16", shard_strategy="contiguous") as llm:
        found["plan"] = llm.plan.to_json()
        found["chunk"] = llm.plan.prefill_chunk_tokens
        found["threads"] = llm.plan.num_threads
        answer = llm.generate([tiny.token_ids(900)], max_new_tokens=20, temperature=1.0, ignore_eos=True)[0]
        found["answer"] = answer.token_ids
        found["sharded"] = llm.engine.runner.num_sharded  # type: ignore[attr-defined]
    limit = 1 if rank == 0 else None
    with pytest.raises(DseekError) as refused:
        load(folder, machine=here, context=2048, memory_limit_bytes=limit, shard_strategy="auto")
    found["refused"] = str(refused.value)
    return found


def test_ranks_settle_on_one_plan_one_seed_and_one_link(folder: Path) -> None:
    first, *others = run_ranks(3, _meet, str(folder))
    assert first["text"] == "Grüße" and first["empty"] == "" and first["tensor"] == [2.0, 2.0, 2.0]
    assert first["threads"] == 1
    assert first["sharded"] == 1
    for other in others:
        for key in ("link", "text", "empty", "tensor", "plan", "answer", "sharded"):
            assert other[key] == first[key], key
        assert str(other["refused"]).startswith(f"rank 0 has no plan: {first['refused']}")
    assert "memory" in str(first["refused"])
    assert str(first["error"]).startswith("rank 0 has another text than ranks [2]")
    assert str(others[1]["error"]).startswith("rank 2 has another text than ranks [0, 1]")
