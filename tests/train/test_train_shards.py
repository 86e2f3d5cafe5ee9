"""Several ranks: each stage of ZeRO learns what one process learns, and takes up what another number of ranks saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models import tiny
from tests.parallel.distributed import run_ranks
from tests.train.trainings import config_of, losses, run, write_texts

STRATEGIES = ("none", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tied heads, and texts beside it."""
    path = tiny.save("llama-16-mqa-tied", tmp_path_factory.mktemp("models") / "tiny")
    write_texts(path.parent / "texts.jsonl")
    return path


SETTINGS: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 4, "memory__gradient_checkpointing": 1}


def _train_all(rank: int, world_size: int, folder: str, out: str) -> dict[str, list[float]]:
    """Every strategy on this rank, adapters, 8-bit moments that go on; losses as the first rank saw them."""
    model, texts = Path(folder), Path(folder).parent / "texts.jsonl"
    found = {}
    for name in STRATEGIES:
        settings = SETTINGS | {"per_device_train_batch_size": 1, "memory__shard_strategy": name}
        config = config_of(model, texts, Path(out) / name, data__eval=(str(texts),), **settings)
        result, told = run(config)
        found[name] = [*losses(told), result.eval_loss or 0.0]
    lora = SETTINGS | {"per_device_train_batch_size": 1, "memory__shard_strategy": "zero3", "method": "lora"}
    found["lora"] = losses(run(config_of(model, texts, Path(out) / "lora", lora__merge=True, **lora))[1])
    narrow = SETTINGS | {"per_device_train_batch_size": 1, "memory__shard_strategy": "zero2", "optim": "adamw_8bit"}
    found["narrow"] = losses(run(config_of(model, texts, Path(out) / "narrow", **narrow))[1])
    onward = config_of(model, texts, Path(out) / "narrow", **narrow | {"max_steps": 5})
    disk = SETTINGS | {"per_device_train_batch_size": 1, "memory__shard_strategy": "zero3"}
    disk |= {"memory__offload_optimizer": "disk"}
    found["disk"] = losses(run(config_of(model, texts, Path(out) / "disk", **disk))[1])
    found["onward"] = losses(run(onward)[1])
    return found


def test_every_stage_learns_what_one_process_learns(folder: Path, tmp_path: Path) -> None:
    texts = folder.parent / "texts.jsonl"
    found, nothing = run_ranks(2, _train_all, str(folder), str(tmp_path))
    assert not any(nothing[name] for name in ("lora", "narrow", "onward")), "only the first rank is told"
    assert len(found["onward"]) == 1

    one = config_of(folder, texts, tmp_path / "one", data__eval=(str(texts),), **SETTINGS)
    result, told = run(one)
    expected = [*losses(told), result.eval_loss]
    weights = _weights(tmp_path / "one/model.safetensors")
    for name in STRATEGIES:
        assert found[name] == pytest.approx(expected, rel=1e-5), name
        for tensor, values in _weights(tmp_path / name / "model.safetensors").items():
            assert abs(values - weights[tensor]).max() < 2e-5, (name, tensor)
    assert found["disk"] == pytest.approx(expected[:4], rel=1e-5)
    _, told = run(config_of(folder, texts, tmp_path / "lora-one", method="lora", lora__merge=True, **SETTINGS))
    assert found["lora"] == pytest.approx(losses(told), rel=1e-5)
    merged, other = (_weights(tmp_path / name / "merged/model.safetensors") for name in ("lora", "lora-one"))
    assert merged.keys() == other.keys() and all(abs(merged[name] - other[name]).max() < 2e-5 for name in other)
    assert found["narrow"] == pytest.approx(expected[:4], abs=0.05)

    # What two ranks saved, one takes up, as it would have gone on itself.
    onward, own = SETTINGS | {"max_steps": 6}, tmp_path / "zero3"
    changed = config_of(folder, texts, own, data__eval=(str(texts),), **onward | {"per_device_train_batch_size": 1})
    _, told = run(changed)
    assert len(losses(told)) == 2


def _weights(path: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(path)
