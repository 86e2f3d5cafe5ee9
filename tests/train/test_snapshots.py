"""Snapshots of `dseek train`: every kind of state comes back bit for bit, damage is passed over, ranks restart."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dseek.cli.main import main
from dseek.core.errors import ConfigError
from dseek.train import offload
from dseek.train.checkpoints import Checkpoint, complete_steps
from dseek.train.run import ready
from tests.models import tiny
from tests.parallel.distributed import run_ranks
from tests.train.trainings import Told, config_of, losses, run, write_texts

EVERY_TWO = {"checkpoints__snapshot_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, and texts beside it."""
    path = tiny.save("llama-16-mqa-tied", tmp_path_factory.mktemp("models") / "tiny")
    write_texts(path.parent / "texts.jsonl")
    return path


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of a training that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    run(_config(folder, out))
    return load_file(out / "model.safetensors")


def _config(folder: Path, out: Path, **changes: Any) -> Any:
    return config_of(folder, folder.parent / "texts.jsonl", out, data__shuffle=True, **changes)


def _interrupted(folder: Path, out: Path, **changes: Any) -> Any:
    """Train five steps of six with snapshots behind the second and the fourth, and lose the folder of the fifth."""
    config = _config(folder, out, **EVERY_TWO | changes)
    result, _ = run(config, stop_after=4)
    assert result.was_stopped and result.global_step == 5
    shutil.rmtree(out / "checkpoint-5")
    return config


def _start_of(told: Told) -> int:
    return int(next(figures["global_step"] for what, figures in told if what == "start"))


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": "adamw_torch_fused"},
        {"optim": "adamw_torch"},
        {"optim": "adamw_8bit"},
        {"memory__offload_optimizer": "disk"},
        {"method": "lora", "lora__lora_dropout": 0.2, "gradient_accumulation_steps": 2},
    ],
    ids=lambda changes: str(next(iter(changes.values()))),
)
def test_every_kind_of_state_comes_back_bit_by_bit(
    folder: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "OFFLOAD_PART_VALUES", 2048)
    _, wanted = run(_config(folder, tmp_path / "whole", **changes))
    _, told = run(_interrupted(folder, tmp_path / "parts", **changes))
    assert _start_of(told) == 4 and losses(told) == losses(wanted)[4:]
    name = "adapter_model.safetensors" if "method" in changes else "model.safetensors"
    assert _same(load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name))
    files = [
        json.loads((tmp_path / part / "checkpoint-6/trainer_state.json").read_text()) for part in ("whole", "parts")
    ]
    assert files[0]["data"] == files[1]["data"] and files[0]["log_history"] == files[1]["log_history"]


def test_the_newest_of_both_kinds_is_gone_on_from(folder: Path, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    config = _config(folder, tmp_path, **EVERY_TWO)
    run(config, stop_after=4)
    assert complete_steps(tmp_path / "snapshots") == [2, 4]
    _, told = run(config)
    assert _start_of(told) == 5 and _same(load_file(tmp_path / "model.safetensors"), whole)


def test_a_damaged_snapshot_is_passed_over(
    folder: Path, whole: dict[str, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _interrupted(folder, tmp_path, checkpoints__keep_last=3)
    kept, damaged = ({*Checkpoint(tmp_path / "snapshots", step).parts[0].chunks} for step in (2, 4))
    victim = min(damaged - kept)
    path = tmp_path / "snapshots/chunks" / victim[:2] / victim
    path.write_bytes(path.read_bytes()[:-1])
    _, told = run(config)
    assert "step 4" in caplog.text and _start_of(told) == 2
    assert complete_steps(tmp_path / "snapshots") == [2, 4], "the damaged one was written anew"
    assert _same(load_file(tmp_path / "model.safetensors"), whole)
    assert main(["checkpoint", "verify", str(tmp_path / "snapshots")]) == 0


def test_the_second_folder_serves_where_the_first_is_gone(
    folder: Path, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    remote = {"checkpoints__remote": str(tmp_path / "remote")}
    _interrupted(folder, tmp_path / "lost", **remote)
    shutil.rmtree(tmp_path / "lost")
    _, told = run(_config(folder, tmp_path / "new", **EVERY_TWO | remote))
    assert _start_of(told) == 4 and _same(load_file(tmp_path / "new/model.safetensors"), whole)
    with pytest.raises(ConfigError, match=r"learning_rate = 0\.001"):
        run(_config(folder, tmp_path / "other", learning_rate=1e-4, **EVERY_TWO | remote))


def test_weights_of_a_snapshot_are_a_models(folder: Path, tmp_path: Path) -> None:
    _interrupted(folder, tmp_path)
    out = tmp_path / "weights.safetensors"
    assert main(["checkpoint", "restore", str(tmp_path / "snapshots"), "--out", str(out)]) == 0
    assert load_file(out).keys() == load_file(folder / "model.safetensors").keys()


def test_memory_is_saved_as_when_the_training_began(folder: Path, tmp_path: Path) -> None:
    run(_config(folder, tmp_path), stop_after=1)
    path = tmp_path / "checkpoint-2/trainer_state.json"
    state = json.loads(path.read_text())
    assert state["memory"] == {"shard_strategy": "none", "checkpointed_layers": 0, "logits_chunk_tokens": 0}
    state["memory"]["checkpointed_layers"] = 1
    path.write_text(json.dumps(state))
    for changes, expected in (({}, 1), ({"memory__mlp_chunk_tokens": 16}, 0)):
        with ready(_config(folder, tmp_path, **changes)) as training:
            assert training.choice.work.checkpointed_layers == expected


def test_copies_of_the_state_are_foreseen(folder: Path, tmp_path: Path) -> None:
    for changes, copies in (({}, 0), (EVERY_TWO, 2), (EVERY_TWO | {"memory__offload_optimizer": "disk"}, 0)):
        with ready(_config(folder, tmp_path, **changes)) as training:
            memory = training.choice.memory
        assert memory.snapshots_bytes == copies * 3 * memory.weights_bytes


SHARED = {"per_device_train_batch_size": 1, "memory__shard_strategy": "zero3", "save_steps": 4, "save_total_limit": 0}
NARROW = {"per_device_train_batch_size": 1, "memory__shard_strategy": "zero2", "optim": "adamw_8bit"}


def _on_two_ranks(rank: int, world_size: int, folder: str, out: str) -> dict[str, tuple[list[float], ...]]:
    """Undisturbed and interrupted trainings on this rank, and the snapshots that are left for another number."""
    found = {}
    for name, changes in (("shared", SHARED), ("narrow", NARROW)):
        model, place = Path(folder), Path(out) / name
        _, wanted = run(_config(model, place / "whole", **changes))
        config = _config(model, place / "parts", **EVERY_TWO | changes)
        run(config, stop_after=4)
        if rank == 0:
            shutil.rmtree(place / "parts/checkpoint-5")
            shutil.copytree(place / "parts", place / "left")
        torch.distributed.barrier()
        _, told = run(config)
        found[name] = losses(wanted), losses(told)
    return found


@pytest.fixture(scope="module")
def shared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What two ranks left, and what they told."""
    out = tmp_path_factory.mktemp("shared")
    return out, run_ranks(2, _on_two_ranks, str(folder), str(out))[0]


def test_shards_come_back_bit_by_bit_and_serve_other_numbers_of_ranks(
    folder: Path, shared: tuple[Path, Any], tmp_path: Path
) -> None:
    out, found = shared
    for name, (wanted, told) in found.items():
        assert told == wanted[4:], name
        results = [load_file(out / name / part / "model.safetensors") for part in ("whole", "parts")]
        assert _same(*results), name
    # One rank goes on from the shards of two as it does from the whole tensors of the same step.
    results = []
    for name in ("snapshot", "folder"):
        shutil.copytree(out / "shared/left", tmp_path / name)
        if name == "folder":
            shutil.rmtree(tmp_path / "folder/snapshots")
        _, told = run(_config(folder, tmp_path / name, per_device_train_batch_size=1))
        assert _start_of(told) == 4
        results.append(load_file(tmp_path / name / "model.safetensors"))
    assert _same(*results)
    with pytest.raises(ConfigError, match="made by 2 ranks"):
        run(_config(folder, out / "narrow/left", per_device_train_batch_size=1, optim="adamw_8bit"))


def _toml(folder: Path, path: Path, more: str = "") -> str:
    path.write_text(
        f'model = "{folder}"\noutput_dir = "{path.parent / "out"}"\nmax_steps = 6\nlearning_rate = 1e-3\n'
        f'device = "cpu"\nlogging_steps = 1\nsave_steps = 0\nper_device_train_batch_size = 1\n{more}'
        '[memory]\nshard_strategy = "zero3"\n'
        f'[data]\ntrain = ["{folder.parent / "texts.jsonl"}"]\nmax_length = 32\nshuffle = true\n'
        "[checkpoints]\nsnapshot_steps = 1\n"
    )
    return str(path)


@pytest.mark.slow
def test_a_killed_rank_changes_no_bit(folder: Path, shared: tuple[Path, Any], tmp_path: Path) -> None:
    recipe = _toml(folder, tmp_path / "run.toml")
    command = [sys.executable, "-m", "dseek.cli.main", "train", recipe, "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--inject-fault", "kill:1@4", "--json"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "rank 1 is lost at step 4: killed by signal 9" in done.stderr
    assert json.loads(done.stdout)["global_step"] == 6
    assert _same(*(load_file(out / "model.safetensors") for out in (shared[0] / "shared/whole", tmp_path / "out")))


@pytest.mark.parametrize(
    ("more", "arguments", "message"),
    [
        ("", ("--nproc-per-node", "0"), "--nproc-per-node is 0"),
        ("", ("--max-restarts", "2"), "--max-restarts without --nproc-per-node"),
        ("", ("--nproc-per-node", "2", "--max-restarts", "-1"), "negative"),
        ("", ("--nproc-per-node", "2", "--inject-fault", "kill:2@1"), "names rank 2"),
        ("", ("--inject-fault", "burn:0@1"), "KIND:RANK@STEP"),
        ("", ("--inject-fault", "torn:0@1:part"), "needs no files"),
        ('method = "gate"\n', ("--nproc-per-node", "2"), "gates learn on one process"),
        ("", ("--set", "checkpoints.keep_last=0"), "checkpoints.keep_last is 0"),
        ("", ("--set", "checkpoints.snapshot_step=1"), "did you mean 'snapshot_steps'"),
        ("", ("--set", "checkpoints.remote=OUT/snapshots"), "the second folder is the first"),
        ("", ("--set", "checkpoints.remote=FILE/below"), "cannot be made"),
    ],
)
def test_mistakes_are_told(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: str,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    recipe = _toml(folder, tmp_path / "run.toml", more)
    given = [text.replace("OUT", str(tmp_path / "out")).replace("FILE", recipe) for text in arguments]
    assert main(["train", recipe, *given]) == 2
    assert message in capsys.readouterr().err


def test_two_launchers_are_one_too_many(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert main(["train", _toml(folder, tmp_path / "run.toml"), "--nproc-per-node", "2"]) == 2
    assert "needed: one of the two" in capsys.readouterr().err
